/** Where learned coefficients start from: the training-free merge, and the scale of it, that is nearest to all experts (merging.md 6.1). */
import type { StateStore } from '../../../calibration/state-store.ts';
import { mergeBlock, mergeTensor } from '../../../methods/merge/drive.ts';
import { mergerOf } from '../../../methods/merge/index.ts';
import type { Start } from '../../../methods/merge/merge-plan.ts';
import type { Merger } from '../../../methods/merge/merger.ts';
import { resolveParameters } from '../../../methods/merge/parameters.ts';
import type { LinearSite } from '../../../model/model.ts';
import type { Forward } from '../../forward.ts';
import type { MergeWeights } from '../weights.ts';
import { distances, meanKl } from './distances.ts';
import type { Lesson } from './forward-pass.ts';
import { LearnedWeights, type Passive, type StartUpdates } from './learned-weights.ts';
import type { Teachers } from './teachers.ts';

/** Methods that are tried. */
const START_METHODS = ['task-arithmetic', 'tsv-m', 'iso-c', 'regmean'] as const;
const START_SCALES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.3, 1.6, 2] as const;
/** Where the search of a scale begins: between a mean of two and a whole. */
const MIDDLE_SCALE = 5;
/** Samples of each expert that candidates are judged on. */
export const SEARCHED = 16;

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
  /** What was measured of every expert at a site, for methods that need it. */
  readonly statisticsOf: (method: string, site: LinearSite) => Promise<readonly Float32Array[]>;
  /** What an interrupted search had found. */
  readonly known: readonly TriedStart[];
  readonly onTried: (tried: TriedStart, count: number) => Promise<void>;
}

export interface TriedStart {
  readonly method: string;
  readonly scale: number;
  readonly passive: Passive;
  /** Mean over experts. */
  readonly kl: number;
}

export interface FoundStart {
  readonly start: Start;
  readonly passive: Passive;
  readonly updates: StartUpdates | undefined;
  /** Everything that was tried. */
  readonly tried: readonly TriedStart[];
}

/** Methods to try, by the value of the parameter `start`; of all of them those that the predicate allows. */
export function startMethods(start: string, allowed: (merger: Merger) => boolean): readonly string[] {
  if (start === 'auto') return START_METHODS.filter((method) => allowed(mergerOf(method)));
  return start === 'none' ? [] : [start];
}

/** The base as it is. */
const NONE: Start = { method: 'task-arithmetic', scale: 0 };

/**
 * Tries all methods, then the other way with what is not learned. A method's scale is found from the middle of the list: on to the better
 * neighbour until none is. Divergence has one valley along a line through the base, and that takes half as many passes as all scales.
 */
export async function findStart(search: StartSearch): Promise<FoundStart> {
  const { forward, teachers, weights, labels, known } = search;
  const lessons = labels.flatMap((_, k) => search.lessons.filter(({ sample }) => sample.expert === k).slice(0, SEARCHED));
  const tried: TriedStart[] = [];
  const judge = async (start: Start, updatesOf: () => Promise<StartUpdates | undefined>, passive: Passive): Promise<number> => {
    const same = (other: TriedStart) => other.method === start.method && other.scale === start.scale && other.passive === passive;
    let found = tried.find(same) ?? known.find(same);
    if (found === undefined) {
      forward.signal?.throwIfAborted();
      const updates = await updatesOf();
      const model = new LearnedWeights({ weights, expertCount: labels.length, updates, scale: start.scale, passive });
      found = { ...start, passive, kl: meanKl(await distances(forward, teachers, lessons, labels.length, model)) };
      await search.onTried(found, tried.length + 1);
    }
    if (!tried.some(same)) tried.push(found);
    return found.kl;
  };
  const first = search.passive === 'auto' ? 'mean' : search.passive;
  let best: { start: Start; updates: Lazy; kl: number } | undefined;
  for (const method of search.methods) {
    const updates = new Lazy(() => mergedTaskVectors(search, method));
    const at = (index: number) => judge({ method, scale: START_SCALES[index] }, () => updates.get(), first);
    const index = await valley(START_SCALES.length, MIDDLE_SCALE, at);
    const kl = await at(index);
    const beaten = best === undefined || kl < best.kl ? best?.updates : updates;
    if (best === undefined || kl < best.kl) best = { start: { method, scale: START_SCALES[index] }, updates, kl };
    await beaten?.release();
  }
  const { start, updates } = best ?? { start: NONE, updates: undefined };
  const result = async (passive: Passive): Promise<FoundStart> => ({ start, updates: await updates?.get(), passive, tried });
  if (search.passive !== 'auto') return result(first);
  const get = async () => updates?.get();
  const moved = await judge(start, get, first);
  const still = await judge(start, get, 'base');
  return result(still <= moved ? 'base' : 'mean');
}

/** Where a list of values with one valley is least, walking down from `from`. */
export async function valley(length: number, from: number, at: (index: number) => Promise<number>): Promise<number> {
  let index = from;
  let value = await at(index);
  for (const direction of [1, -1]) {
    let moved = false;
    for (let next = index + direction; next >= 0 && next < length; next += direction) {
      const other = await at(next);
      if (other >= value) break;
      [index, value, moved] = [next, other, true];
    }
    if (moved) break;
  }
  return index;
}

/** What a method makes of the task vectors, made when it is first needed. */
class Lazy {
  readonly #make: () => Promise<StartUpdates>;
  #updates: Promise<StartUpdates> | undefined;

  constructor(make: () => Promise<StartUpdates>) {
    this.#make = make;
  }

  get(): Promise<StartUpdates> {
    this.#updates ??= this.#make();
    return this.#updates;
  }

  async release(): Promise<void> {
    for (const store of (await this.#updates)?.values() ?? []) await store[Symbol.asyncDispose]();
  }
}

/** What a method makes of the task vectors of every site, at scale 1. */
async function mergedTaskVectors(
  { forward, weights, labels, seed, statisticsOf }: StartSearch,
  method: string,
): Promise<StartUpdates> {
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
      const statistics = merger.statistics ? { statistics: await statisticsOf(method, site) } : {};
      const block = mergeBlock(0, { base, experts: taskVectors, taskVectors, ...statistics });
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
