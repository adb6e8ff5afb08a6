/** An expert's tensors under the base's names: what is missing, what is too much, and one prefix more or less. Nothing is dropped silently. */
import { quote } from '../../../formats/safetensors/header.ts';
import type { TensorInfo } from '../../../formats/tensor.ts';
import { RecipeError } from '../../errors.ts';
import type { TensorOrigin } from './tensor-origin.ts';

export interface NameRules {
  /** What a tensor of the base means that an expert lacks. */
  readonly onMissing: 'error' | 'base';
  /** What happens to an expert's tensor that the base lacks. */
  readonly onExtra: 'error' | 'ignore' | 'copy';
}

export interface AlignedNames {
  /** Base name -> origin, for every tensor of the base but the output head where the expert stores none. */
  readonly origins: Map<string, TensorOrigin>;
  /** Names in the expert that the base has not, by the base's way of naming: `copy` adds them to the output. */
  readonly extra: ReadonlyMap<string, string>;
  /** The expert's own name of its output head, when it stores one. */
  readonly head?: string;
  readonly notes: readonly string[];
}

/** Values that are computed anew when a model is loaded. */
const BUFFERS = /(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)|masked_bias|position_ids)$/;

/** Whether a tensor is a buffer of that kind: never merged. */
export function isBuffer(name: string): boolean {
  return BUFFERS.test(name);
}

/** What wrappers put before the names of the model inside them. */
const PREFIXES = [
  'model.',
  'language_model.',
  'transformer.',
  'model.language_model.',
  'language_model.model.',
  'base_model.model.',
];

export interface NamedTensors {
  readonly label: string;
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
}

/**
 * Lines an expert's names up with the base's. Shapes must be equal.
 * @param head the output head's name: its absence is a matter of tying, not of this
 * @throws RecipeError naming the first tensors that are missing, too many, or of another shape
 */
export function alignNames(
  expert: NamedTensors,
  base: ReadonlyMap<string, TensorInfo>,
  head: string | undefined,
  rules: NameRules,
): AlignedNames {
  const notes: string[] = [];
  const wanted = [...base.keys()];
  const own = [...expert.tensors.keys()].filter((name) => base.has(name) || !BUFFERS.test(name));
  const buffers = expert.tensors.size - own.length;
  if (buffers > 0) notes.push(`${expert.label}: ${buffers} buffers that the base does not store are left out`);
  const rename = renamingOf(own, wanted, head, expert, notes);
  const byName = new Map(own.map((name) => [rename(name), name]));
  const origins = new Map<string, TensorOrigin>();
  const missing: string[] = [];
  for (const [name, info] of base) {
    const source = byName.get(name);
    if (source === undefined) {
      if (name !== head) missing.push(name);
      continue;
    }
    checkShape(expert, info, expert.tensors.get(source)!);
    origins.set(name, { kind: 'stored', name: source });
  }
  const lacking = missing.filter((name) => !BUFFERS.test(name));
  if (lacking.length > 0 && rules.onMissing === 'error') {
    throw new RecipeError(
      `${expert.path}: lacks ${some(lacking)} of the base's ${base.size} tensors. If these are the base's own, use --on-missing base.`,
    );
  }
  if (lacking.length > 0)
    notes.push(`${expert.label}: ${lacking.length} tensors are missing and taken from the base: ${some(lacking)}`);
  for (const name of missing) origins.set(name, { kind: 'base' });
  const extra = new Map([...byName].filter(([name]) => !base.has(name) && name !== head));
  if (extra.size > 0 && rules.onExtra === 'error') {
    throw new RecipeError(
      `${expert.path}: has ${some([...extra.values()])}, which the base has not. Leave them out with --on-extra ignore, or add them with --on-extra copy.`,
    );
  }
  if (extra.size > 0) {
    notes.push(
      `${expert.label}: ${extra.size} tensors that the base has not are ${rules.onExtra === 'copy' ? 'added' : 'left out'}: ${some([...extra.values()])}`,
    );
  }
  const ownHead = head === undefined ? undefined : byName.get(head);
  return { origins, extra, notes, ...(ownHead === undefined ? {} : { head: ownHead }) };
}

type Rename = (name: string) => string;

/** The names as they are, or with the one prefix added or taken away that makes them the base's. */
function renamingOf(
  own: readonly string[],
  wanted: readonly string[],
  head: string | undefined,
  expert: NamedTensors,
  notes: string[],
): Rename {
  const needed = new Set(wanted.filter((name) => name !== head && !BUFFERS.test(name)));
  const asTheyAre = own.filter((name) => needed.has(name)).length;
  if (asTheyAre > 0) return (name) => name;
  for (const prefix of PREFIXES) {
    const ways: [string, Rename][] = [
      [`with "${prefix}" put in front`, (name) => (name === head ? name : prefix + name)],
      [`without "${prefix}"`, (name) => (name.startsWith(prefix) ? name.slice(prefix.length) : name)],
    ];
    for (const [how, rename] of ways) {
      const renamed = new Set(own.map(rename));
      const others = [...renamed].filter((name) => !needed.has(name) && name !== head);
      if (renamed.size !== own.length || others.length > 0 || ![...needed].every((name) => renamed.has(name))) continue;
      notes.push(`${expert.label}: names are the base's ${how}`);
      return rename;
    }
  }
  return (name) => name;
}

function checkShape({ path }: NamedTensors, base: TensorInfo, own: TensorInfo): void {
  if (base.shape.length === own.shape.length && base.shape.every((size, i) => size === own.shape[i])) return;
  const rows = own.shape.slice(1).join() === base.shape.slice(1).join() && base.shape.length === own.shape.length;
  throw new RecipeError(
    `${path}: tensor ${quote(own.name)} is [${own.shape.join(', ')}], but the base's is [${base.shape.join(', ')}]. ` +
      `Experts of one base have its shapes${rows ? '; if the vocabulary has grown, --tokenizer union brings all models to one' : ''}.`,
  );
}

function some(names: readonly string[]): string {
  const shown = names.slice(0, 3).map(quote).join(', ');
  return names.length <= 3 ? shown : `${shown} and ${names.length - 3} more`;
}
