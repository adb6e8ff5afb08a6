/** Expert Merging and Expert Merging++: teachers once, a start, coefficients per tensor, then per chunk where it matters (merging.md, section 6). */
import { join } from 'node:path';
import { Spool } from '../../../calibration/state-store.ts';
import { createEngine } from '../../../compute/ort.ts';
import { createBlas } from '../../../compute/ort-blas.ts';
import { mergerOf } from '../../../methods/merge/index.ts';
import type { MeasuredText } from '../../../methods/merge/merge-plan.ts';
import type { Forward } from '../../forward.ts';
import type { RunHooks } from '../../run.ts';
import type { MergeInputs } from '../inputs.ts';
import type { TensorJob } from '../jobs.ts';
import type { MergeRecipe } from '../recipe.ts';
import { type MergeStatistics, measureStatistics } from '../statistics.ts';
import { MergeWeights } from '../weights.ts';
import { askExperts, type LearningPlace } from './ask-experts.ts';
import { type LearnedMerge, Learner } from './learner.ts';
import { LearningProgress } from './learning-progress.ts';
import { KEPT_PART, type PreparedLearning, requireTemporarySpace } from './prepare.ts';
import { findStart } from './start.ts';

/** Learns a plan. @param jobs of any schedule over the same inputs: where every tensor's parts are */
export async function learnMerge(
  prepared: PreparedLearning,
  inputs: MergeInputs,
  jobs: readonly TensorJob[],
  recipe: MergeRecipe,
  place: LearningPlace,
  hooks: RunHooks,
): Promise<LearnedMerge> {
  await requireTemporarySpace(prepared.cost);
  const { model, folder, labels, values, samples } = prepared;
  const progress = await LearningProgress.open(join(place.folder, 'learning.json'), place.keep, recipe.threads);
  if (progress.interrupted)
    hooks.note?.(`learning goes on after update ${progress.interrupted.update} of ${progress.interrupted.name}`);
  if (progress.threads !== recipe.threads)
    hooks.note?.(`learning goes on with the ${progress.threads} threads it began with; others would round otherwise`);
  await using engine = await createEngine({ threads: progress.threads, onNote: (note) => hooks.note?.(note) });
  await using spool = new Spool({ ramBytes: recipe.maxMemory * (1 - KEPT_PART) });
  using weights = new MergeWeights(inputs, jobs, recipe.maxMemory * KEPT_PART, values.trim);
  const forward: Forward = { model, engine, blas: createBlas(engine), spool, path: folder, signal: hooks.signal };
  const report = (phase: string) => (done: number, total: number) => hooks.progress?.({ phase, done, total });
  await using teachers = await askExperts(forward, weights, {
    text: prepared,
    values,
    middle: values.hidden > 0,
    recipe,
    memoryBytes: recipe.maxMemory * (1 - KEPT_PART),
    place,
    hooks,
  });
  const text: MeasuredText = {
    samples: values.samples,
    length: prepared.sequenceLength,
    seed: recipe.seed,
    heldOut: recipe.preset !== 'paper',
  };
  const measured = new Map<string, Promise<MergeStatistics>>();
  const statisticsOf = (method: string): Promise<MergeStatistics> => {
    const made =
      measured.get(method) ?? measureStatistics(mergerOf(method), inputs, jobs, recipe, place, hooks, progress.threads, text);
    measured.set(method, made);
    return made;
  };
  const found = await findStart({
    forward,
    teachers,
    weights,
    labels,
    lessons: teachers.lessons.slice(0, samples.training.length),
    seed: recipe.seed,
    methods: prepared.starts,
    statisticsOf: async (method, site) => weights.stored((await statisticsOf(method)).tensors.get(`${site.name}.weight`)!),
    passive: values.passive,
    known: progress.tried,
    onTried: async (tried, count) => {
      report('start')(count, count + 1);
      await progress.addTried(tried);
    },
  });
  const start = mergerOf(found.start.method).statistics ? { ...found.start, measured: text } : found.start;
  return await new Learner({
    prepared,
    recipe,
    forward,
    teachers,
    weights,
    found: { ...found, start },
    progress,
    hooks,
  }).learn();
}
