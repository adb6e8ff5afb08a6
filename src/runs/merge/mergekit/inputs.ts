/** The models of a mergekit configuration: sources at the same place of every slice become one expert, its layers renumbered. */
import { basename } from 'node:path';
import { labelOf, type MergeInput, placesOf } from '../../../artifacts/merge/merge-input.ts';
import { openExpert } from '../../../artifacts/merge/plain-adapter.ts';
import { requireSameConfig } from '../../../artifacts/merge/same-config.ts';
import { requireSameVocabulary } from '../../../artifacts/merge/same-vocabulary.ts';
import { type LayerRange, layerCountOf, StackedSource } from '../../../artifacts/merge/stacked-source.ts';
import { RecipeError } from '../../../errors.ts';
import { mergerOf } from '../../../methods/merge/index.ts';
import type { MergekitConfig, MergekitSlice, MergekitSource } from './config.ts';
import { portableVocabulary } from './vocabulary.ts';

export interface MergekitInputs {
  /** In the file's order. */
  readonly experts: readonly MergeInput[];
  readonly base: MergeInput | undefined;
}

/** A slice with the base told from the experts. */
export interface MergekitRoles {
  readonly base: MergekitSource | undefined;
  readonly experts: readonly MergekitSource[];
}

/** Which source of a slice is the base, by mergekit's rule: the one that is `base_model`, listed or not. */
export function rolesOf({ method, base }: MergekitConfig, { sources }: MergekitSlice): MergekitRoles {
  if (base === undefined) return { base: undefined, experts: sources };
  const listed = sources.find(({ model }) => model === base);
  const { layers } = sources[0];
  const added: MergekitSource = { model: base, ...(layers ? { layers } : {}), parameters: {} };
  if (mergerOf(method).base !== 'unused') {
    return { base: listed ?? added, experts: sources.filter((source) => source !== listed) };
  }
  if (listed || method === 'karcher') return { base: undefined, experts: listed ? sources : [...sources, added] };
  throw new RecipeError(
    `--config: base_model ${base}: ${method} has no use for a base; list it among the models, with its weight`,
  );
}

/**
 * Opens every model once; `opened` gets what must be closed.
 * @throws RecipeError for slices that do not fit together or ask for layers a model does not have
 */
export async function openMergekitInputs(config: MergekitConfig, opened: MergeInput[]): Promise<MergekitInputs> {
  const models = new Map<string, MergeInput>();
  const open = async (path: string): Promise<MergeInput> => {
    const known = models.get(path);
    if (known) return known;
    const [place] = await placesOf([path]);
    const input = await openExpert(place, labelOf(place));
    opened.push(input);
    models.set(path, input);
    return input;
  };
  const slices = config.slices.map((slice) => rolesOf(config, slice));
  const counts = slices.map(({ experts }) => experts.length);
  const other = counts.findIndex((count) => count !== counts[0]);
  if (other > 0) {
    throw new RecipeError(
      `--config: slices[${other}] merges ${counts[other]} models besides the base, slices[0] ${counts[0]}; every slice must have equally many`,
    );
  }
  if (counts[0] === 0) throw new RecipeError('--config: there is no model to merge besides the base');
  const columns: MergeInput[] = [];
  for (let k = 0; k < counts[0]; k++) {
    const column = await stack(
      slices.map(({ experts }) => experts[k]),
      open,
    );
    columns.push({ ...column, label: unused(column.label, columns) });
  }
  const bases = slices.flatMap(({ base }) => base ?? []);
  const base = bases.length === 0 ? undefined : await stack(bases, open);
  if (base?.adapter)
    throw new RecipeError(`--config: base_model ${base.place.path}: is an adapter; name the model that it was trained on`);
  return { experts: columns, base };
}

function unused(stem: string, taken: readonly MergeInput[]): string {
  const labels = new Set(taken.map(({ label }) => label));
  let label = stem;
  for (let copy = 2; labels.has(label); copy++) label = `${stem}-${copy}`;
  return label;
}

/** The sources of one place in every slice as one input. */
async function stack(sources: readonly MergekitSource[], open: (path: string) => Promise<MergeInput>): Promise<MergeInput> {
  const inputs: MergeInput[] = [];
  for (const { model } of sources) inputs.push(await open(model));
  const [first] = inputs;
  if (sources.length === 1 && sources[0].layers === undefined) return first;
  const ranges = sources.map(({ model, layers }, i): LayerRange => {
    const { adapter, tensors } = inputs[i];
    if (adapter)
      throw new RecipeError(`--config: ${model}: is an adapter, which has no layers to slice; merge it into its base first`);
    const count = layerCountOf(tensors);
    const [start, end] = layers ?? [0, count];
    if (end > count) throw new RecipeError(`--config: layer_range [${start}, ${end}] of ${model}: it has ${count} layers`);
    return { source: tensors, start, end };
  });
  const count = ranges.reduce((sum, { start, end }) => sum + end - start, 0);
  const configs = inputs.map(({ config }) => config && withLayers(config, count));
  for (const [i, { place }] of inputs.entries()) {
    const [own, wanted] = [configs[i], configs[0]];
    if (own && wanted) requireSameConfig(place.path, own, wanted);
    if (place.kind === 'folder' && first.place.kind === 'folder') await requireSameVocabulary(place.path, first.place.path);
  }
  const config = configs[0] && { ...configs[0], ...layerTypes(inputs, ranges) };
  const label = [...new Set(inputs.map((input) => input.label))].join('+');
  return { place: first.place, label, tensors: new StackedSource(ranges), ...(config ? { config } : {}) };
}

type Config = Readonly<Record<string, unknown>>;

function withLayers(config: Config, count: number): Config {
  const key = config['num_hidden_layers'] === undefined && config['n_layer'] !== undefined ? 'n_layer' : 'num_hidden_layers';
  return { ...config, [key]: count };
}

/** Newer configurations say of every layer what attention it has. */
function layerTypes(inputs: readonly MergeInput[], ranges: readonly LayerRange[]): Config {
  const lists = inputs.map(({ config }) => config?.['layer_types']);
  if (!lists.every(Array.isArray)) return {};
  return { layer_types: ranges.flatMap(({ start, end }, i) => (lists[i] as unknown[]).slice(start, end)) };
}

/** As pcomp.json has it: without folders on the way to models. */
export function portableMergekit({ text: _, base, slices, vocabulary, ...rest }: MergekitConfig): Record<string, unknown> {
  return {
    ...rest,
    ...(base === undefined ? {} : { base: basename(base) }),
    vocabulary: portableVocabulary(vocabulary),
    slices: slices.map(({ sources, parameters }) => ({
      sources: sources.map((source) => ({ ...source, model: basename(source.model) })),
      parameters,
    })),
  };
}
