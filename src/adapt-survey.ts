/** Looks at what enters every layer on the training text: the principal directions that EVA spends ranks on. One block in memory. */

import { surveyWindows } from './adapt-text.ts';
import { Calibration } from './calibration/calibration.ts';
import type { MeasuredInput } from './calibration/measured.ts';
import type { Forward } from './expert-teachers.ts';
import { type Directions, EVA_RATIO, principalDirections } from './methods/rank/eva.ts';
import type { SpendableBudget } from './methods/rank/rank-budget.ts';
import type { TrainedModule } from './methods/rank/training/schedule.ts';
import type { WeightReader } from './model/model.ts';
import type { RunHooks } from './run.ts';

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
    await using measured = await calibration.measure(block, weights, { ...(inputs.length > 0 ? { inputs } : {}), advance: true });
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
