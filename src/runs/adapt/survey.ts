/** What methods look at before they spend ranks: what enters every layer, gradients, spectra of weights and of quantization errors. One block in memory. */

import { Calibration } from '../../calibration/calibration.ts';
import type { MeasuredInput } from '../../calibration/measured.ts';
import { ModelGradient, type OnGradients } from '../../calibration/model-gradient.ts';
import type { Matrix } from '../../compute/blas.ts';
import { compensate } from '../../methods/rank/compensation.ts';
import { type Directions, EVA_RATIO, principalDirections } from '../../methods/rank/eva.ts';
import type { SpendableBudget } from '../../methods/rank/rank-budget.ts';
import type { TrainedModule } from '../../methods/rank/training/schedule.ts';
import type { WeightReader } from '../../model/model.ts';
import type { Forward } from '../forward.ts';
import type { RunHooks } from '../run.ts';
import { NextTokenLoss } from './next-token-loss.ts';
import { surveyWindows } from './text.ts';

/** Windows that the mean gradient is taken over. */
export const GRADIENT_WINDOWS = 32;
const BATCH_TOKENS = 2048;

/** What a layer's ranks are worth, and the factors of its first ones. */
export interface RepairedLayer {
  /** Of each rank, descending. */
  readonly gains: Float64Array;
  /** (ranks, inFeatures) */
  readonly loraA: Float32Array;
  /** (outFeatures, ranks) */
  readonly loraB: Float32Array;
}

/**
 * Calls `on` with the mean gradient of the loss over windows of the text by each layer's weight, (outFeatures, inFeatures), and with what reads that weight; before that
 * `each`, where it is there, with what every window adds to the mean.
 */
export async function surveyGradients(
  { model, engine, spool, path, signal }: Forward,
  weights: WeightReader,
  modules: readonly TrainedModule[],
  training: readonly Int32Array[],
  progress: RunHooks['progress'],
  on: (module: TrainedModule, gradient: Float32Array, weight: () => Promise<Float32Array>) => Promise<void>,
  each?: (module: TrainedModule, gradient: Float32Array) => Promise<void>,
): Promise<void> {
  const windows = spread(training, GRADIENT_WINDOWS);
  const batchTokens = each ? Math.max(...windows.map(({ length }) => length)) : BATCH_TOKENS;
  const wanted = new Map(modules.map((module) => [module.name, module]));
  const sites = new Set(wanted.keys());
  await using pass = new ModelGradient({ model, engine, path, spool, windows, batchTokens, signal, sites });
  const hidden = await pass.forward(weights);
  await using cotangent = spool.allocate(pass.tokenCount, model.shape.hiddenSize);
  await (await NextTokenLoss.open(model, engine, weights)).score(hidden, windows, cotangent);
  const onWindow: OnGradients = async (_, gradients) => {
    for (const [site, gradient] of gradients) {
      const module = wanted.get(site.name);
      if (module) await each!(module, gradient);
    }
  };
  const onMean: OnGradients = async (block, gradients) => {
    const total = model.blocks.length;
    progress?.({ phase: `gradients of ${block.name}`, done: total - 1 - block.index, total });
    for (const [site, gradient] of gradients) {
      const module = wanted.get(site.name);
      if (module) await on(module, gradient, () => weights.loadSite(site));
    }
  };
  await pass.backward(weights, cotangent, onMean, each ? { each: onWindow } : {});
}

/** The spectrum of a layer's weight. */
export interface WeightSpectrum {
  /** Squared singular values, in parts of all of them, descending. */
  readonly ratios: Float64Array;
  /** Singular values. */
  readonly values: Float64Array;
  /** Right singular vectors as rows, (ranks, inFeatures). */
  readonly directions: Float32Array;
  /** Left ones as columns, (outFeatures, ranks). */
  readonly left: Matrix;
}

/** The spectrum of every layer's weight, or of what it lacks of an `original`, up to `most` ranks. */
export async function surveySpectra(
  { model, blas, signal }: Forward,
  weights: WeightReader,
  modules: readonly TrainedModule[],
  most: number,
  progress: RunHooks['progress'],
  original?: WeightReader,
): Promise<Map<string, WeightSpectrum>> {
  const wanted = new Set(modules.map(({ name }) => name));
  const found = new Map<string, WeightSpectrum>();
  for (const block of model.blocks) {
    signal?.throwIfAborted();
    progress?.({ phase: `spectra of ${block.name}`, done: block.index, total: model.blocks.length });
    for (const site of block.sites.filter(({ name }) => wanted.has(name))) {
      const { outFeatures: rows, inFeatures: columns } = site;
      const data = await weights.loadSite(site);
      const lost = (await original?.loadSite(site))?.map((value, i) => value - data[i]);
      const weight = { rows, columns, data: lost ?? data };
      const { values, total, loraA, loraB, rank } = await compensate(blas, weight, undefined, Math.min(most, rows, columns));
      // Both factors hold the root of the singular value.
      const roots = values.map((value) => Math.sqrt(Math.sqrt(value)) || 1);
      found.set(site.name, {
        ratios: values.slice(0, rank).map((value) => (total > 0 ? value / total : 0)),
        values: values.slice(0, rank).map(Math.sqrt),
        directions: loraA.map((value, i) => value / roots[Math.floor(i / columns)]),
        left: { rows, columns: rank, data: loraB.map((value, i) => value / roots[i % rank]) },
      });
    }
  }
  return found;
}

/** What a low-rank branch can repair of a quantized layer, by what enters it in the quantized model; `original` are the weights before. */
export async function surveyErrors(
  { model, engine, blas, path, signal }: Forward,
  weights: WeightReader,
  original: WeightReader,
  modules: readonly TrainedModule[],
  most: number,
  training: readonly Int32Array[],
  progress: RunHooks['progress'],
): Promise<Map<string, RepairedLayer>> {
  const wanted = new Set(modules.map(({ name }) => name));
  const found = new Map<string, RepairedLayer>();
  await using calibration = new Calibration({
    model,
    engine,
    blas,
    windows: surveyWindows(training),
    path,
    ...(signal ? { signal } : {}),
  });
  await calibration.start(weights);
  for (const block of model.blocks) {
    progress?.({ phase: `errors of ${block.name}`, done: block.index, total: model.blocks.length });
    const sites = block.sites.filter(({ name }) => wanted.has(name));
    const inputs = [...new Set(sites.map(({ input }) => input))];
    await using measured = await calibration.measure(block, weights, { inputs, replay: false, advance: true });
    for (const site of sites) {
      const { outFeatures: rows, inFeatures: columns } = site;
      const data = (await original.loadSite(site)).slice();
      const quantized = await weights.loadSite(site);
      for (let i = 0; i < data.length; i++) data[i] -= quantized[i];
      const { hessian } = measured.get(site.input)!;
      const { values, loraA, loraB } = await compensate(blas, { rows, columns, data }, hessian, Math.min(most, rows, columns));
      found.set(site.name, { gains: values.map((value) => value / 2), loraA, loraB });
    }
  }
  return found;
}

/** `count` of the windows, evenly over the text. */
function spread(windows: readonly Int32Array[], count: number): readonly Int32Array[] {
  const kept = Math.min(windows.length, count);
  return Array.from({ length: kept }, (_, i) => windows[Math.floor((i * windows.length) / kept)]);
}

/** Principal directions of every layer's input, by layer. Layers that share an input share them. */
export async function surveyDirections(
  { model, engine, blas, path, signal }: Forward,
  weights: WeightReader,
  modules: readonly TrainedModule[],
  budget: SpendableBudget,
  training: readonly Int32Array[],
  progress: RunHooks['progress'],
): Promise<Map<string, Directions>> {
  const windows = surveyWindows(training);
  const wanted = new Set(modules.map(({ name }) => name));
  const mean = budget.total / modules.reduce((sum, module) => sum + budget.cost(module), 0);
  const count = Math.max(1, Math.round(EVA_RATIO * mean));
  const found = new Map<string, Directions>();
  await using calibration = new Calibration({ model, engine, blas, windows, path, ...(signal ? { signal } : {}) });
  await calibration.start(weights);
  for (const block of model.blocks) {
    progress?.({ phase: `look at ${block.name}`, done: block.index, total: model.blocks.length });
    const inputs = [...new Set(block.sites.filter(({ name }) => wanted.has(name)).map(({ input }) => input))];
    await using measured = await calibration.measure(block, weights, { inputs, advance: true });
    for (const input of inputs) {
      const stats = measured.get(input)!;
      const directions = await principalDirections(blas, stats.hessian, await meanOf(stats), count);
      for (const site of block.sites) if (site.input === input && wanted.has(site.name)) found.set(site.name, directions);
    }
  }
  return found;
}

async function meanOf(stats: MeasuredInput): Promise<Float64Array> {
  const { features, tokenCount } = stats;
  const mean = new Float64Array(features);
  for await (const { data } of stats.batches()) for (let i = 0; i < data.length; i++) mean[i % features] += data[i] / tokenCount;
  return mean;
}
