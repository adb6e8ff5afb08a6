/** What some merge methods need to know of every expert's text first: measured once, kept on disk beside the unfinished result. */
import { access, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../../formats/safetensors/writer.ts';
import type { TensorSink } from '../../../formats/tensor.ts';
import { Calibration } from '../../calibration/calibration.ts';
import { ModelGradient } from '../../calibration/model-gradient.ts';
import { Spool } from '../../calibration/state-store.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import { createEngine } from '../../compute/ort.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { Random } from '../../compute/random.ts';
import { RecipeError } from '../../errors.ts';
import type { MeasuredText } from '../../methods/merge/merge-plan.ts';
import type { Merger } from '../../methods/merge/merger.ts';
import { createModel } from '../../model/architectures/index.ts';
import type { Model, WeightReader } from '../../model/model.ts';
import { NextTokenLoss } from '../adapt/next-token-loss.ts';
import { OutputHead } from '../evaluate/output-head.ts';
import type { Forward } from '../forward.ts';
import type { RunHooks } from '../run.ts';
import { drawToken } from '../token-choice.ts';
import { readSamples } from './experts/samples.ts';
import type { MergeInputs } from './inputs.ts';
import type { StoredTensor, TensorJob } from './jobs.ts';
import { parametersOf } from './parameters.ts';
import type { MergeRecipe } from './recipe.ts';
import { MergeWeights } from './weights.ts';

export interface MergeStatistics {
  /** By weight of a linear layer: what was measured, for each expert. */
  readonly tensors: ReadonlyMap<string, readonly StoredTensor[]>;
  /** Of each expert over the whole model; for Fisher information. */
  readonly norms?: readonly number[];
}

interface Place {
  /** Where the files are kept. */
  readonly folder: string;
  /** Called before the first file is written. */
  readonly keep: () => Promise<void>;
}

const NORMS = 'statistics.json';

/**
 * @param jobs of any schedule over the same inputs: where every tensor's parts are
 * @param threads of the engine: another number may round otherwise
 * @param text which samples; by the recipe's settings of the method when absent
 */
export async function measureStatistics(
  merger: Merger,
  inputs: MergeInputs,
  jobs: readonly TensorJob[],
  recipe: MergeRecipe,
  { folder: kept, keep }: Place,
  hooks: RunHooks,
  threads: number,
  text?: MeasuredText,
): Promise<MergeStatistics> {
  const { network, folder, template } = inputs;
  if (network === undefined) {
    throw new RecipeError(`${folder}: ${merger.name} runs the models, and there is no config.json to tell how`);
  }
  const model = createModel(network, join(folder, 'config.json'), template.tensors);
  const labels = inputs.experts.map(({ label }) => label);
  const paths = labels.map((_, k) => join(kept, `statistics-${k}.safetensors`));
  const normsPath = join(kept, NORMS);
  if (!(await exists(normsPath))) {
    const tokenizer = await loadTokenizer(folder, model.shape.vocabSize);
    const { samples, length, seed, heldOut } = text ?? textOf(merger, inputs, recipe);
    const { training, notes } = await readSamples(tokenizer, {
      calibration: recipe.calibration,
      labels,
      count: samples,
      sequenceLength: Math.min(length, model.shape.contextLength),
      seed,
      holdOut: heldOut,
    });
    if (text === undefined) for (const note of notes) hooks.note?.(note);
    await using engine = await createEngine({ threads, onNote: (note) => hooks.note?.(note) });
    await using spool = new Spool({ ramBytes: recipe.maxMemory });
    using weights = new MergeWeights(inputs, jobs, 0);
    const forward: Forward = { model, engine, blas: createBlas(engine), spool, path: folder, signal: hooks.signal };
    await keep();
    const norms: number[] = [];
    for (const [k, path] of paths.entries()) {
      const windows = training.filter(({ expert }) => expert === k).map(({ tokens }) => tokens);
      const progress = (done: number, total: number) =>
        hooks.progress?.({ phase: `measure ${labels[k]}`, done: k * total + done, total: paths.length * total });
      await using sink = await createSafetensorsSink(path, declarationsOf(model, merger));
      const measured = { forward, windows, weights: weights.expert(k), sink, progress };
      if (merger.statistics === 'gram') await measureGrams(measured);
      else norms.push(await measureFisher(measured, new Random(recipe.seed, `labels of ${labels[k]}`)));
      await sink.finalize();
    }
    await writeFile(normsPath, JSON.stringify(norms));
  }
  const norms = JSON.parse(await readFile(normsPath, 'utf8')) as number[];
  return { tensors: await placesOf(model, merger, paths), ...(norms.length === 0 ? {} : { norms }) };
}

/** As the method's own settings have it. */
function textOf(merger: Merger, { experts, outputs }: MergeInputs, recipe: MergeRecipe): MeasuredText {
  const labels = experts.map(({ label }) => label);
  const names = outputs.map(({ name }) => name);
  const values = parametersOf(merger, recipe, labels, names)('');
  return { samples: Number(values['samples']), length: Number(values['length']), seed: recipe.seed, heldOut: false };
}

async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}

/** Gram matrices are of an input, which layers share; Fisher information is of a weight. */
function declarationsOf(model: Model, { statistics }: Merger) {
  const sites = model.blocks.flatMap((block) => block.sites);
  const shapes =
    statistics === 'gram'
      ? new Map(sites.map(({ input, inFeatures: n }) => [input, [n, n]]))
      : new Map(sites.map(({ name, outFeatures, inFeatures }) => [name, [outFeatures, inFeatures]]));
  return [...shapes].map(([name, shape]) => ({ name, shape, dtype: 'F32' as const }));
}

async function placesOf(model: Model, { statistics }: Merger, paths: readonly string[]): Promise<Map<string, StoredTensor[]>> {
  const places = new Map<string, StoredTensor[]>();
  for (const [input, path] of paths.entries()) {
    await using source = await openSafetensors(path);
    for (const site of model.blocks.flatMap((block) => block.sites)) {
      const name = statistics === 'gram' ? site.input : site.name;
      const { dtype, shape, byteLength } = source.tensors.get(name)!;
      const weight = `${site.name}.weight`;
      places.set(weight, [...(places.get(weight) ?? []), { input, name, dtype, shape, byteLength, ...source.placeOf(name) }]);
    }
  }
  return places;
}

interface Measured {
  readonly forward: Forward;
  readonly windows: readonly Int32Array[];
  /** The expert's. */
  readonly weights: WeightReader;
  readonly sink: TensorSink;
  readonly progress: (done: number, total: number) => void;
}

/** `X^T X / T` of every input of a linear layer, as the expert itself makes it. */
async function measureGrams({ forward, windows, weights, sink, progress }: Measured): Promise<void> {
  const { model, engine, blas, path, signal } = forward;
  await using calibration = new Calibration({ model, engine, blas, windows, path, ...(signal ? { signal } : {}) });
  await calibration.start(weights);
  for (const block of model.blocks) {
    progress(block.index, model.blocks.length);
    await using measured = await calibration.measure(block, weights, { replay: false, advance: true });
    for (const [input, { hessian }] of measured) await sink.write(input, bytesOf(Float32Array.from(hessian)));
  }
}

/**
 * Mean over windows of the squared derivative of the log-probability of tokens that the expert itself would say there. Returns the norm over all
 * layers.
 */
async function measureFisher({ forward, windows, weights, sink, progress }: Measured, random: Random): Promise<number> {
  const { model, engine, blas, spool, path, signal } = forward;
  const { hiddenSize, vocabSize } = model.shape;
  const sites = model.blocks.flatMap((block) => block.sites);
  const sums = new Map(sites.map((site) => [site.name, spool.allocate(site.outFeatures, site.inFeatures)]));
  const head = new OutputHead(model, weights, engine, blas);
  const loss = await NextTokenLoss.open(model, engine, weights);
  for (const [i, window] of windows.entries()) {
    signal?.throwIfAborted();
    progress(i, windows.length);
    const rows = window.length;
    await using pass = new ModelGradient({ model, engine, path, spool, windows: [window], batchTokens: rows, signal });
    const states = await pass.forward(weights);
    const logits = await head.logits({ rows, columns: hiddenSize, data: await states.read(0, rows) });
    const labels = Int32Array.from({ length: rows }, (_, row) =>
      drawToken(logits.data.subarray(row * vocabSize, (row + 1) * vocabSize), random),
    );
    await using cotangent = spool.allocate(rows, hiddenSize);
    await loss.add(states, 0, labels, 1, cotangent);
    await pass.backward(weights, cotangent, async (_, gradients) => {
      for (const [site, gradient] of gradients) {
        const store = sums.get(site.name)!;
        const sum = (await store.read(0, site.outFeatures)).slice();
        for (let j = 0; j < sum.length; j++) sum[j] += (gradient[j] * gradient[j]) / windows.length;
        await store.write(0, sum);
      }
    });
  }
  let square = 0;
  for (const [name, store] of sums) {
    const sum = await store.read(0, store.rows);
    for (const value of sum) square += value * value;
    await sink.write(name, bytesOf(sum));
    await store[Symbol.asyncDispose]();
  }
  return Math.sqrt(square);
}

function bytesOf(values: Float32Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}
