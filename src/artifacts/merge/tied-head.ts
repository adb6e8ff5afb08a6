/** Output heads that share the embedding's weights: what a merge does when base and experts do not agree on it. */
import type { TensorInfo } from '../../../formats/tensor.ts';
import { RecipeError } from '../../errors.ts';
import type { MergeInput } from './merge-input.ts';
import type { NetworkNames } from './network-names.ts';
import { sameBytes } from './same-tensors.ts';
import type { TensorOrigin } from './tensor-origin.ts';

/** How the output stores its head: not at all; as the base's own tensor; as a copy of the merged embedding; apart, though the base ties it. */
export type HeadStorage = 'absent' | 'own' | 'copy' | 'untied';

export interface TiedHead {
  readonly embedding: string;
  readonly name: string;
  readonly storage: HeadStorage;
}

export interface HeadExpert {
  readonly input: MergeInput;
  /** Base name -> origin; gets an entry for the head where the output stores one. */
  readonly origins: Map<string, TensorOrigin>;
  /** The expert's own name of its head, when it stores one. */
  readonly head?: string;
}

/** How the template stores its head. Undefined where no head can be told from the names. Throws RecipeError when it contradicts itself. */
export async function headOf(template: MergeInput, names: NetworkNames, untie: boolean): Promise<TiedHead | undefined> {
  const { tokenEmbedding: embedding, head: name, tied } = names;
  const { tensors } = template.tensors;
  if (embedding === undefined || name === undefined || !tensors.has(embedding)) {
    if (untie) throw new RecipeError(`--untie: ${template.place.path} has no embedding and output head that pcomp knows by name`);
    return undefined;
  }
  const stored = tensors.has(name);
  if (!stored && tied === false) return undefined;
  if (!stored) return { embedding, name, storage: untie ? 'untied' : 'absent' };
  if (tied !== true) return { embedding, name, storage: 'own' };
  if (untie) return { embedding, name, storage: 'untied' };
  const at = (tensor: string) => ({ source: template.tensors, name: tensor });
  if (await sameBytes(at(embedding), at(name))) return { embedding, name, storage: 'copy' };
  throw new RecipeError(
    `${template.place.path}: its configuration ties ${name} to ${embedding}, but it stores two that differ. Keep both with --untie.`,
  );
}

/** Gives every expert an origin for the head where the output stores one; refuses a head that would be lost. Returns notes. */
export async function alignHeads(
  head: TiedHead,
  experts: readonly HeadExpert[],
  base: ReadonlyMap<string, TensorInfo>,
): Promise<string[]> {
  const notes: string[] = [];
  for (const expert of experts) {
    const { input, origins } = expert;
    const embedding = origins.get(head.embedding) ?? { kind: 'base' };
    switch (head.storage) {
      case 'absent':
      case 'copy':
        if (input.adapter ? origins.has(head.name) : expert.head !== undefined && !(await isTied(expert, head))) {
          const advice = 'Store the head apart in the result with --untie.';
          throw new RecipeError(
            `${input.place.path}: has an output head of its own, but the base ties it to the embedding. ${advice}`,
          );
        }
        if (expert.head !== undefined) notes.push(`${input.label}: its ${head.name} is its embedding, which stands for both`);
        origins.delete(head.name);
        break;
      case 'untied':
        if (expert.head !== undefined) origins.set(head.name, { kind: 'stored', name: expert.head });
        else if (!origins.has(head.name)) origins.set(head.name, embedding);
        break;
      case 'own':
        if (input.adapter || origins.has(head.name)) break;
        if (input.config?.['tie_word_embeddings'] === false) {
          throw new RecipeError(
            `${input.place.path}: lacks "${head.name}", one of the base's ${base.size} tensors, and is not tied`,
          );
        }
        origins.set(head.name, embedding);
        notes.push(`${input.label}: stores no ${head.name}, so its embedding stands for it`);
        break;
      default:
        throw new Error(head.storage satisfies never);
    }
  }
  return notes;
}

async function isTied({ input, origins, head }: HeadExpert, { embedding }: TiedHead): Promise<boolean> {
  const origin = origins.get(embedding);
  if (origin?.kind !== 'stored' || head === undefined) return false;
  return sameBytes({ source: input.tensors, name: origin.name }, { source: input.tensors, name: head });
}
