/** Where learned coefficients start from: the training-free merge, and the scale of it, that is nearest to all experts (merging.md 6.1). */
import type { StateStore } from './calibration/state-store.ts';
import { distances, type Forward, type Lesson, meanKl, type Teachers } from './expert-teachers.ts';
import { LearnedWeights, type Passive, type Start, type StartUpdates } from './learned-weights.ts';
import type { MergeWeights } from './merge-weights.ts';
import { mergeBlock, mergeTensor } from './methods/merge/drive.ts';
import { mergerOf } from './methods/merge/index.ts';
import { resolveParameters } from './methods/merge/parameters.ts';

/** Methods that are tried. */
export const START_METHODS = ['task-arithmetic', 'tsv-m', 'iso-c'] as const;
export const START_SCALES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.3] as const;
/** Samples of each expert that candidates are judged on. */
const SEARCHED = 16;

export interface StartSearch {
  readonly forward: Forward;
  readonly teachers: Teachers;
  readonly weights: MergeWeights;
  readonly labels: readonly string[];
  readonly lessons: readonly Lesson[];
  readonly seed: number;
  /** Methods to try; none: the base is the start. */
  readonly methods: readonly string[];
  readonly passive: Passive | 'auto';
  readonly onCandidate: (done: number, total: number) => void;
}

export interface FoundStart {
  readonly start: Start;
  readonly passive: Passive;
  readonly updates: StartUpdates | undefined;
  /** Everything that was tried. */
  readonly tried: readonly { readonly method: string; readonly scale: number; readonly passive: Passive; readonly kl: number }[];
}

/** The base as it is. */
const NONE: Start = { method: 'task-arithmetic', scale: 0 };

/** Tries all methods at all scales, then the other way with what is not learned. */
export async function findStart(search: StartSearch): Promise<FoundStart> {
  const { forward, teachers, weights, labels } = search;
  const lessons = labels.flatMap((_, k) => search.lessons.filter(({ sample }) => sample.expert === k).slice(0, SEARCHED));
  const tried: { method: string; scale: number; passive: Passive; kl: number }[] = [];
  const total = search.methods.length * START_SCALES.length + (search.passive === 'auto' ? 1 : 0);
  const judge = async (start: Start, updates: StartUpdates | undefined, passive: Passive): Promise<number> => {
    forward.signal?.throwIfAborted();
    const model = new LearnedWeights({ weights, expertCount: labels.length, updates, scale: start.scale, passive });
    const kl = meanKl(await distances(forward, teachers, lessons, labels.length, model));
    tried.push({ ...start, passive, kl });
    search.onCandidate(tried.length, total);
    return kl;
  };
  const first = search.passive === 'auto' ? 'mean' : search.passive;
  let best: { start: Start; updates: StartUpdates | undefined; kl: number } | undefined;
  for (const method of search.methods) {
    const updates = await mergedTaskVectors(search, method);
    for (const scale of START_SCALES) {
      const start = { method, scale };
      const kl = await judge(start, updates, first);
      if (best === undefined || kl < best.kl) {
        if (best?.updates && best.updates !== updates) await release(best.updates);
        best = { start, updates, kl };
      }
    }
    if (best?.updates !== updates) await release(updates);
  }
  if (search.passive !== 'auto') return { start: best?.start ?? NONE, updates: best?.updates, passive: first, tried };
  best ??= { start: NONE, updates: undefined, kl: await judge(NONE, undefined, first) };
  const still = await judge(best.start, best.updates, 'base');
  return { start: best.start, updates: best.updates, passive: still <= best.kl ? 'base' : 'mean', tried };
}

/** What a method makes of the task vectors of every site, at scale 1. */
async function mergedTaskVectors({ forward, weights, labels, seed }: StartSearch, method: string): Promise<StartUpdates> {
  const merger = mergerOf(method);
  const values = resolveParameters(merger, { shared: {} }, labels, 'best');
  const updates = new Map<string, StateStore>();
  for (const { sites } of forward.model.blocks) {
    for (const site of sites) {
      forward.signal?.throwIfAborted();
      const taskVectors = labels.map((_, k) => weights.taskVector(k, site));
      const { outFeatures, inFeatures } = site;
      // On a base of zeros, a merged model is its own update.
      const base = new Float32Array(outFeatures * inFeatures);
      const tensor = { name: `${site.name}.weight`, shape: [outFeatures, inFeatures], role: 'matrix' as const, experts: labels };
      const block = mergeBlock(0, { base, experts: taskVectors, taskVectors });
      const context = { seed, blas: forward.blas, note: () => undefined };
      const store = forward.spool.allocate(outFeatures, inFeatures);
      let row = 0;
      for await (const rows of mergeTensor(merger, tensor, () => [block], values, context)) {
        await store.write(row, rows);
        row += rows.length / inFeatures;
      }
      updates.set(site.name, store);
    }
  }
  return updates;
}

async function release(updates: StartUpdates): Promise<void> {
  for (const store of updates.values()) await store[Symbol.asyncDispose]();
}
