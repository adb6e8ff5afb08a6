/** `merge --method moe`: dense siblings as the experts of a sparse model; a copy of every tensor, and routers made from prompts. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type FloatDType, fromFloat32 } from '../../../formats/dtype.ts';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../../formats/safetensors/writer.ts';
import type { MergeInput } from '../../artifacts/merge/merge-input.ts';
import { SourceWeights } from '../../artifacts/source-weights.ts';
import { Calibration } from '../../calibration/calibration.ts';
import { parseTextFile, readPrompts } from '../../calibration/text.ts';
import { loadTokenizer, type Tokenizer } from '../../calibration/tokenizer.ts';
import { createEngine } from '../../compute/ort.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { RecipeError } from '../../errors.ts';
import { type MlpPart, type MoeLayout, moeConfig, moeLayout, SHARED_FEATURES } from '../../methods/merge/moe/layouts.ts';
import { conditionOf, MeanVector, routerRow } from '../../methods/merge/moe/router.ts';
import { normal } from '../../methods/rank/training/initial.ts';
import { createModel } from '../../model/architectures/index.ts';
import type { Model } from '../../model/model.ts';
import type { RunHooks } from '../run.ts';
import type { MergeInputs, OutputTensor } from './inputs.ts';
import type { MergeRecipe } from './recipe.ts';

/** Routers whose rows point the same way more than this are reported. */
const CONDITION_LIMIT = 5;
const PARTS = ['gate', 'up', 'down'] as const;

export interface SparseInputs extends AsyncDisposable {
  readonly inputs: MergeInputs;
}

/**
 * What the sparse model is copied from. Throws RecipeError for fewer than two experts, adapters, and prompts that are missing; UnsupportedError for
 * an architecture without a sparse sibling.
 */
export async function sparseInputs(inputs: MergeInputs, recipe: MergeRecipe, hooks: RunHooks): Promise<SparseInputs> {
  const { base, experts, config, network, folder } = inputs;
  if (experts.length < 2) throw new RecipeError(`--method moe: takes at least 2 experts, and ${experts.length} were given`);
  if (recipe.topK > experts.length)
    throw new RecipeError(`--top-k ${recipe.topK}: there are ${experts.length} experts to choose from`);
  const adapter = experts.find((expert) => expert.adapter);
  if (adapter) throw new RecipeError(`${adapter.place.path}: is an adapter; fold it in first (adapt convert --to merged)`);
  if (!config || !network)
    throw new RecipeError(`${base!.place.path}: there is no config.json beside it, which --method moe needs`);
  const model = createModel(network, join(folder, 'config.json'), base!.tensors);
  const layout = moeLayout(model.architecture);
  const sparseConfig = moeConfig(layout, config, experts.length, recipe.topK);
  const routers = await routersOf(model, inputs, recipe, hooks);
  const conditions = [...routers].map(([block, rows]) => [block, conditionOf(rows)] as const);
  const notes = [...inputs.notes];
  const close = conditions.filter(([, condition]) => condition > CONDITION_LIMIT);
  if (close.length > 0) {
    const [block, worst] = close.reduce((most, one) => (one[1] > most[1] ? one : most));
    notes.push(
      `the rows of ${close.length} of ${conditions.length} routers nearly point the same way (condition ${worst.toPrecision(3)} in ${block}): the prompts do not tell the experts apart there`,
    );
  }
  const made = await mkdtemp(join(tmpdir(), 'pcomp-routers-'));
  const path = join(made, 'routers.safetensors');
  try {
    await writeRouters(path, layout, model, routers, inputs);
    const tensors = await openSafetensors(path);
    const source: MergeInput = { place: { kind: 'file', path }, label: 'routers', tensors };
    const all = [...inputs.all, source];
    return {
      inputs: { ...inputs, all, config: sparseConfig, outputs: outputsOf(layout, model, inputs, source), notes },
      async [Symbol.asyncDispose]() {
        await tensors.close();
        await rm(made, { recursive: true, force: true });
      },
    };
  } catch (error) {
    await rm(made, { recursive: true, force: true });
    throw error;
  }
}

/** The base's tensors in their order, its MLPs replaced by all experts' and a router. */
function outputsOf(layout: MoeLayout, model: Model, { outputs, all }: MergeInputs, routers: MergeInput): OutputTensor[] {
  const base = all.length - 1;
  const places = new Map<string, { readonly block: string; readonly part: MlpPart }>();
  for (const { name: block } of model.blocks)
    for (const part of PARTS) places.set(`${block}.mlp.${part}_proj.weight`, { block, part });
  const results: OutputTensor[] = [];
  const routed = new Set<string>();
  const add = (input: MergeInput, index: number, own: string, name: string): void => {
    const { dtype, shape } = input.tensors.tensors.get(own)!;
    results.push({ name, dtype, shape, role: 'matrix', transposed: false, made: { by: 'copy', input: index, name: own } });
  };
  for (const output of outputs) {
    const { name, made } = output;
    const place = places.get(name);
    if (!place) {
      results.push(made.by === 'merge' ? copyOf(output, base, made.base?.kind === 'stored' ? made.base.name : name) : output);
      continue;
    }
    const { block, part } = place;
    if (!routed.has(block)) {
      routed.add(block);
      for (const own of routers.tensors.tensors.keys()) if (own.startsWith(`${block}.`)) add(routers, base + 1, own, own);
    }
    if (made.by !== 'merge') throw new Error(`${name} is not merged`);
    made.experts.forEach((origin, k) => {
      const [index, own] = origin.kind === 'stored' ? [k, origin.name] : [base, name];
      add(all[index], index, own, layout.expert(block, k, part));
    });
  }
  return results;
}

function copyOf({ name, shape, role, transposed, dtype }: OutputTensor, input: number, own: string): OutputTensor {
  return { name, dtype, shape, role, transposed, made: { by: 'copy', input, name: own } };
}

/** Routers, and shared experts of zeros where the layout wants one, in the type of the block's MLP. */
async function writeRouters(
  path: string,
  layout: MoeLayout,
  model: Model,
  routers: ReadonlyMap<string, readonly Float32Array[]>,
  { base }: MergeInputs,
): Promise<void> {
  const { hiddenSize } = model.shape;
  const tensors: { name: string; dtype: FloatDType; shape: number[]; values: Float32Array }[] = [];
  for (const { name: block } of model.blocks) {
    const stored = base!.tensors.tensors.get(`${block}.mlp.gate_proj.weight`)!.dtype;
    const dtype: FloatDType = stored === 'F16' || stored === 'BF16' ? stored : 'F32';
    const rows = routers.get(block)!;
    const values = new Float32Array(rows.length * hiddenSize);
    for (const [k, row] of rows.entries()) values.set(row, k * hiddenSize);
    tensors.push({ name: layout.router(block), dtype, shape: [rows.length, hiddenSize], values });
    if (!layout.shared) continue;
    const zeros = (name: string, shape: number[]) =>
      tensors.push({ name, dtype, shape, values: new Float32Array(shape[0] * shape[1]) });
    zeros(layout.shared.part(block, 'gate'), [SHARED_FEATURES, hiddenSize]);
    zeros(layout.shared.part(block, 'up'), [SHARED_FEATURES, hiddenSize]);
    zeros(layout.shared.part(block, 'down'), [hiddenSize, SHARED_FEATURES]);
    zeros(layout.shared.gate(block), [1, hiddenSize]);
  }
  await using sink = await createSafetensorsSink(path, tensors);
  for (const { name, dtype, values } of tensors) await sink.write(name, fromFloat32(dtype, values));
  await sink.finalize();
}

/** By block: a row for each expert. */
async function routersOf(
  model: Model,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  hooks: RunHooks,
): Promise<Map<string, Float32Array[]>> {
  const { experts, base, folder } = inputs;
  const labels = experts.map(({ label }) => label);
  const { hiddenSize } = model.shape;
  if (recipe.gate === 'random') {
    const row = (block: string, label: string) =>
      routerRow(Float64Array.from(normal(hiddenSize, 1, recipe.seed, `${block} ${label}`)), undefined);
    return new Map(model.blocks.map(({ name }) => [name, labels.map((label) => row(name, label))]));
  }
  const tokenizer = await loadTokenizer(folder, model.shape.vocabSize);
  const prompts = await promptsOf(recipe, labels, tokenizer, model.shape.contextLength);
  const weights = new SourceWeights(base!.tensors);
  if (recipe.gate === 'embed') {
    const means = meansFor(labels, hiddenSize);
    for (const { expert, negative, tokens } of prompts)
      for (const token of tokens)
        means[expert][negative ? 1 : 0].add(await weights.loadRows(model.tokenEmbedding, token, token + 1), 0);
    const rows = rowsOf(means);
    return new Map(model.blocks.map(({ name }) => [name, rows]));
  }
  await using engine = await createEngine({ threads: recipe.threads, onNote: (note) => hooks.note?.(note) });
  await using calibration = new Calibration({
    model,
    engine,
    blas: createBlas(engine),
    windows: prompts.map(({ tokens }) => tokens),
    path: base!.place.path,
    ...(hooks.signal ? { signal: hooks.signal } : {}),
  });
  await calibration.start(weights);
  const routers = new Map<string, Float32Array[]>();
  for (const block of model.blocks) {
    hooks.progress?.({ phase: `routers: ${block.name}`, done: block.index, total: model.blocks.length });
    const input = block.sites.find(({ name }) => name === `${block.name}.mlp.gate_proj`)!.input;
    await using measured = await calibration.measure(block, weights, { inputs: [input], advance: true });
    const means = meansFor(labels, hiddenSize);
    let [prompt, token] = [0, 0];
    for await (const { rows, data } of measured.get(input)!.batches()) {
      for (let row = 0; row < rows; row++) {
        const { expert, negative, tokens } = prompts[prompt];
        const last = ++token === tokens.length;
        if (last || recipe.gate === 'hidden-avg') means[expert][negative ? 1 : 0].add(data, row);
        if (last) [prompt, token] = [prompt + 1, 0];
      }
    }
    routers.set(block.name, rowsOf(means));
  }
  return routers;
}

type Means = readonly (readonly [MeanVector, MeanVector])[];

function meansFor(labels: readonly string[], length: number): Means {
  return labels.map(() => [new MeanVector(length), new MeanVector(length)] as const);
}

function rowsOf(means: Means): Float32Array[] {
  return means.map(([positive, negative]) => routerRow(positive.mean, negative.isEmpty ? undefined : negative.mean));
}

interface RouterPrompt {
  readonly expert: number;
  readonly negative: boolean;
  readonly tokens: Int32Array;
}

/** Every line of a text file, or every prompt of a JSON lines file. Throws RecipeError for an expert without any. */
async function promptsOf(
  { prompts, negative }: MergeRecipe,
  labels: readonly string[],
  tokenizer: Tokenizer,
  contextLength: number,
): Promise<RouterPrompt[]> {
  const found: RouterPrompt[] = [];
  for (const [flag, list] of [
    ['--prompts', prompts],
    ['--negative', negative],
  ] as const) {
    for (const argument of list) {
      const equals = argument.indexOf('=');
      const expert = labels.indexOf(argument.slice(0, Math.max(0, equals)));
      if (expert < 0) throw new RecipeError(`${flag} ${argument}: label=FILE is expected, of the experts ${labels.join(', ')}`);
      for await (const document of readPrompts(parseTextFile(argument.slice(equals + 1)))) {
        const texts =
          typeof document === 'string'
            ? document.split('\n')
            : 'messages' in document
              ? [document.messages.map(({ content }) => content).join('\n')]
              : [document.prompt];
        for (const text of texts) {
          if (text.trim() === '') continue;
          const tokens = Int32Array.from(tokenizer.encode(text)).slice(0, contextLength);
          if (tokens.length > 0) found.push({ expert, negative: flag === '--negative', tokens });
        }
      }
    }
  }
  const bare = labels.filter((_, k) => !found.some(({ expert, negative: against }) => expert === k && !against));
  if (bare.length > 0)
    throw new RecipeError(`--prompts: none for expert ${bare.join(', ')}; give ${bare[0]}=FILE, or --gate random`);
  return found;
}
