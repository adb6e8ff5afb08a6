/** The models of a merge, opened and checked against each other before any weight is read: what every output tensor is made from. */
import { stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { quote } from '../../../formats/safetensors/header.ts';
import type { DType, TensorInfo } from '../../../formats/tensor.ts';
import { readAdapter } from '../../artifacts/merge/adapter.ts';
import { type AlignedNames, alignNames, isBuffer } from '../../artifacts/merge/aligned-names.ts';
import {
  ADAPTER_CONFIG,
  compareBytes,
  labelOf,
  type MergeInput,
  openInput,
  placesOf,
  readJsonObject,
} from '../../artifacts/merge/merge-input.ts';
import { type NetworkNames, networkNames } from '../../artifacts/merge/network-names.ts';
import { openExpert } from '../../artifacts/merge/plain-adapter.ts';
import { requireSameConfig } from '../../artifacts/merge/same-config.ts';
import { sameBytes } from '../../artifacts/merge/same-tensors.ts';
import { requireSameVocabulary } from '../../artifacts/merge/same-vocabulary.ts';
import type { TensorOrigin } from '../../artifacts/merge/tensor-origin.ts';
import { alignHeads, headOf, type TiedHead } from '../../artifacts/merge/tied-head.ts';
import { RecipeError, UnsupportedError } from '../../errors.ts';
import type { TensorRole } from '../../methods/merge/merger.ts';
import { openMergekitInputs } from './mergekit/inputs.ts';
import type { MergeRecipe } from './recipe.ts';
import { withOneVocabulary } from './vocabulary.ts';
import type { VocabularyReport } from './vocabulary-report.ts';

/** A tensor of the result, as the base names and shapes it. */
export interface OutputTensor {
  readonly name: string;
  /** As the template stores it. */
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly role: TensorRole;
  /** Stored (in, out). */
  readonly transposed: boolean;
  /** merged: by the method. copied: one input's bytes. tied: the bytes of the merged tensor `like`. */
  readonly made:
    | { readonly by: 'merge'; readonly base?: TensorOrigin; readonly experts: readonly TensorOrigin[] }
    | { readonly by: 'copy'; readonly input: number; readonly name: string }
    | { readonly by: 'tie'; readonly like: string };
}

export interface MergeInputs extends AsyncDisposable {
  readonly base: MergeInput | undefined;
  /** Sorted by label; with a mergekit configuration, in its order. */
  readonly experts: readonly MergeInput[];
  /** The experts, then the base, then what was made for the result: how `input` numbers count. */
  readonly all: readonly MergeInput[];
  /** Whose names, shapes and files the result takes: the base, else the first expert. */
  readonly template: MergeInput;
  /** Where config.json and the tokenizer are. */
  readonly folder: string;
  /** config.json for the result; undefined when the template has none. */
  readonly config: Readonly<Record<string, unknown>> | undefined;
  /** config.json as the template has it: how its tensors make a network. */
  readonly network: Readonly<Record<string, unknown>> | undefined;
  /** In the template's order. */
  readonly outputs: readonly OutputTensor[];
  readonly notes: readonly string[];
  /** How the vocabularies came to be one, where they were not. */
  readonly vocabulary?: VocabularyReport;
}

const FLOATS: ReadonlySet<DType> = new Set(['F64', 'F32', 'F16', 'BF16']);

/** Opens and checks everything. Throws RecipeError, UnsupportedError, FormatError, EnvironmentError; reads no weight but those that must be equal. */
export async function openMergeInputs(expertPaths: readonly string[], recipe: MergeRecipe): Promise<MergeInputs> {
  const opened: MergeInput[] = [];
  const close = async () => {
    await Promise.all(opened.map(({ tensors }) => tensors.close()));
  };
  try {
    if (recipe.mergekit) {
      if (expertPaths.length > 0) throw new RecipeError(`${expertPaths[0]}: --config names the models; leave them out here`);
      const { experts, base } = await openMergekitInputs(recipe.mergekit, opened);
      return await checked(experts, base, recipe, close);
    }
    const experts = await openExperts(expertPaths, opened);
    const base = recipe.base === undefined ? undefined : await openBase(recipe.base);
    if (base) opened.push(base);
    return await checked(experts, base, recipe, close);
  } catch (error) {
    await close();
    throw error;
  }
}

async function checked(
  experts: readonly MergeInput[],
  base: MergeInput | undefined,
  recipe: MergeRecipe,
  close: () => Promise<void>,
): Promise<MergeInputs> {
  const alike = recipe.tokenizer === 'base' && recipe.padVocab === 1 && recipe.mergekit?.vocabulary.tokens === undefined;
  if (alike) return { ...(await describe(experts, base, recipe)), [Symbol.asyncDispose]: close };
  return await unified(experts, base, recipe, close);
}

/** As `describe`, of models whose embeddings and heads are in the order of one vocabulary. */
async function unified(
  experts: readonly MergeInput[],
  base: MergeInput | undefined,
  recipe: MergeRecipe,
  close: () => Promise<void>,
): Promise<MergeInputs> {
  const { tokenizer: source, padVocab: multiple, calibration, mergekit } = recipe;
  const rules = mergekit?.vocabulary.tokens ?? {};
  const one = await withOneVocabulary(experts, base, { source, multiple, calibration, rules });
  try {
    const inputs = await describe(one.experts, one.base, recipe, source !== 'base' || Object.keys(rules).length > 0);
    return {
      ...inputs,
      folder: one.folder,
      vocabulary: one.report,
      notes: [...one.notes, ...inputs.notes],
      [Symbol.asyncDispose]: async () => {
        await one.dispose();
        await close();
      },
    };
  } catch (error) {
    await one.dispose();
    throw error;
  }
}

async function openExperts(paths: readonly string[], opened: MergeInput[]): Promise<MergeInput[]> {
  const places = await placesOf(paths);
  if (places.length === 0) throw new RecipeError('no expert: name at least one model to merge');
  const labels = new Set<string>();
  for (const place of places) {
    const stem = labelOf(place);
    let label = stem;
    for (let copy = 2; labels.has(label); copy++) label = `${stem}-${copy}`;
    labels.add(label);
    opened.push(await openExpert(place, label));
  }
  return [...opened].sort((a, b) => compareBytes(a.label, b.label));
}

async function openBase(path: string): Promise<MergeInput> {
  const [place] = await placesOf([path]);
  if (place.kind === 'adapter') throw new RecipeError(`--base ${path}: is an adapter; give the model that it was trained on`);
  return openInput(place, labelOf(place));
}

async function describe(
  experts: readonly MergeInput[],
  base: MergeInput | undefined,
  recipe: MergeRecipe,
  oneVocabulary = false,
): Promise<Omit<MergeInputs, typeof Symbol.asyncDispose>> {
  const adapter = experts.find((expert) => expert.adapter);
  if (!base && adapter)
    throw new RecipeError(`${adapter.place.path}: is an adapter; give the model that it was trained on as --base`);
  const template = base ?? experts[0];
  const folder = folderOf(template);
  const config = template.config ?? (await configBeside(folder));
  const names = networkNames(template.tensors, config);
  const notes: string[] = [];
  for (const { place, config: own } of experts) {
    if (own && config) requireSameConfig(place.path, own, config);
    if (place.kind === 'folder' && !oneVocabulary) await requireSameVocabulary(place.path, folder);
  }
  const head = await headOf(template, names, recipe.untie);
  const aligned = experts.map((input) => ({ input, ...align(input, template, head, recipe) }));
  for (const expert of aligned) notes.push(...expert.notes);
  if (head) notes.push(...(await alignHeads(head, aligned, template.tensors.tensors)));
  const all = base ? [...experts, base] : experts;
  const outputs = outputsOf({ template, base, all, names, head, aligned });
  outputs.push(...extrasOf(aligned, outputs, names));
  for (const output of outputs) await checkTypes(output, all, aligned);
  const untied = head?.storage === 'untied' && config ? { ...config, tie_word_embeddings: false } : config;
  return { base, experts, all, template, folder, config: untied, network: config, outputs, notes };
}

function folderOf({ place }: MergeInput): string {
  return place.kind === 'folder' ? place.path : dirname(place.path);
}

async function configBeside(folder: string): Promise<Readonly<Record<string, unknown>> | undefined> {
  const path = join(folder, 'config.json');
  try {
    await stat(path);
  } catch {
    return undefined;
  }
  return readJsonObject(path);
}

type Aligned = AlignedNames & { readonly input: MergeInput };

function align(input: MergeInput, template: MergeInput, head: TiedHead | undefined, recipe: MergeRecipe): AlignedNames {
  const { tensors } = template.tensors;
  const { place, label, adapter } = input;
  if (!adapter) return alignNames({ label, path: place.path, tensors: input.tensors.tensors }, tensors, head?.name, recipe);
  const configPath = join(place.path, ADAPTER_CONFIG);
  // An untied head has the embedding's shape.
  const known = head?.storage === 'untied' ? new Map([...tensors, [head.name, headInfo(head, tensors)]]) : tensors;
  const changed = readAdapter({ path: place.path, config: adapter, configPath, tensors: input.tensors.tensors }, known);
  for (const [name, origin] of changed) {
    const info = known.get(name);
    if (!info && name !== head?.name) throw new RecipeError(`${place.path}: changes ${quote(name)}, which the base has not`);
    const own = origin.kind === 'stored' || origin.kind === 'added' ? input.tensors.tensors.get(origin.name) : undefined;
    if (own && info && own.shape.join() !== info.shape.join()) {
      throw new RecipeError(
        `${place.path}: tensor ${quote(own.name)} is [${own.shape.join(', ')}], but the base's is [${info.shape.join(', ')}]; if the vocabulary has grown, fold the adapter in first (adapt convert --to merged), and merge with --tokenizer union`,
      );
    }
  }
  return { origins: changed, extra: new Map(), notes: [] };
}

function headInfo({ embedding, name }: TiedHead, tensors: ReadonlyMap<string, TensorInfo>): TensorInfo {
  return { ...tensors.get(embedding)!, name };
}

interface Parts {
  readonly template: MergeInput;
  readonly base: MergeInput | undefined;
  readonly all: readonly MergeInput[];
  readonly names: NetworkNames;
  readonly head: TiedHead | undefined;
  readonly aligned: readonly Aligned[];
}

function outputsOf({ template, base, all, names, head, aligned }: Parts): OutputTensor[] {
  const stored = template.tensors.tensors;
  const infos = [...stored.values()];
  if (head?.storage === 'untied' && !stored.has(head.name)) infos.push(headInfo(head, stored));
  return infos.map((info): OutputTensor => {
    const { name, dtype, shape } = info;
    const common = { name, dtype, shape, role: names.roleOf(name, shape), transposed: names.isTransposed(name) };
    if (head?.storage === 'copy' && name === head.name) return { ...common, made: { by: 'tie', like: head.embedding } };
    if (!FLOATS.has(dtype) || isBuffer(name)) return { ...common, made: { by: 'copy', input: all.indexOf(template), name } };
    const experts = aligned.map(({ origins }) => origins.get(name) ?? { kind: 'base' as const });
    const own = stored.has(name) ? name : head!.embedding;
    return { ...common, made: { by: 'merge', ...(base ? { base: { kind: 'stored', name: own } } : {}), experts } };
  });
}

/** Tensors that only experts have, under --on-extra copy. */
function extrasOf(aligned: readonly Aligned[], outputs: readonly OutputTensor[], names: NetworkNames): OutputTensor[] {
  const owners = new Map<string, OutputTensor>();
  const taken = new Set(outputs.map(({ name }) => name));
  aligned.forEach(({ extra, input }, index) => {
    for (const [name, own] of extra) {
      if (owners.has(name) || taken.has(name)) {
        throw new RecipeError(
          `--on-extra copy: several experts have ${quote(name)}, which the base has not; leave it out with ignore`,
        );
      }
      const { dtype, shape } = input.tensors.tensors.get(own)!;
      const made = { by: 'copy', input: index, name: own } as const;
      owners.set(name, { name, dtype, shape, role: names.roleOf(name, shape), transposed: false, made });
    }
  });
  return [...owners.values()];
}

/** Whole numbers must be equal everywhere, since nothing between them means anything; floats may mix. */
async function checkTypes(
  { name, dtype, made }: OutputTensor,
  all: readonly MergeInput[],
  aligned: readonly Aligned[],
): Promise<void> {
  for (const [i, { origins, input }] of aligned.entries()) {
    const origin = origins.get(name);
    if (origin?.kind !== 'stored') continue;
    const own = input.tensors.tensors.get(origin.name)!;
    if (FLOATS.has(own.dtype) !== FLOATS.has(dtype) || (!FLOATS.has(own.dtype) && own.dtype !== dtype)) {
      throw new UnsupportedError(`${input.place.path}: tensor ${quote(own.name)} is ${own.dtype}, but the base's is ${dtype}`);
    }
    if (made.by !== 'copy' || FLOATS.has(dtype) || made.input === i) continue;
    const [one, other] = [
      { source: input.tensors, name: own.name },
      { source: all[made.input].tensors, name: made.name },
    ];
    if (!(await sameBytes(one, other))) {
      throw new RecipeError(
        `${input.place.path}: tensor ${quote(own.name)} (${dtype}) differs from the base's; only numbers with fractions can be merged`,
      );
    }
  }
}
