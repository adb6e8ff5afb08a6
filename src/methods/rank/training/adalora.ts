/** AdaLoRA (Zhang et al., arXiv 2303.10512): every layer starts with half as many components again, and the least important go (adapters.md 8.1). */
import { RecipeError } from '../../../errors.ts';
import { keepBest } from '../keep-best.ts';
import { normal, place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import type { TraceEntry, TrainedModule, TrainingSchedule } from './schedule.ts';
import { Sensitivity } from './sensitivity.ts';

/** Standard deviation of the factors at the start; `e` starts at 0, so that nothing changes. */
const SPREAD = 0.02;
/** Components at the start, for each that stays. */
export const START_RATIO = 1.5;
const SCALE = 8;
const REGULARISER = 0.1;
/** Parts of the run before the first component goes, and after the last. */
const WARM_UP = 0.1;
const FINAL = 0.4;
const LEAST_STEPS = 10;
/** Cuts in a run. */
const CUTS = 100;

/** What may be spent after step t: from `from` to `to` along a cubic between `start` and `end`. */
export function cubicBudget(
  t: number,
  { from, to, start, end }: { from: number; to: number; start: number; end: number },
): number {
  if (t <= start) return from;
  if (t >= end) return to;
  return to + (from - to) * (1 - (t - start) / (end - start)) ** 3;
}

/** The last step before the first cut, and the last cut. */
export function cutTimes(steps: number): { readonly start: number; readonly end: number } {
  return { start: Math.floor(WARM_UP * steps), end: steps - Math.floor(FINAL * steps) };
}

interface State {
  readonly scores: Readonly<Record<string, Readonly<Record<string, Pick<Sensitivity, 'mean' | 'deviation'>>>>>;
  readonly masked: Readonly<Record<string, readonly number[]>>;
  readonly trace: readonly TraceEntry[];
}

export function adalora(options: ScheduleOptions): TrainingSchedule {
  const { steps, budget, preset, seed } = options;
  const { start, end } = cutTimes(steps);
  const interval = Math.max(1, Math.floor(steps / CUTS));
  if (steps < LEAST_STEPS)
    throw new RecipeError(`--steps ${steps}: adalora needs at least ${LEAST_STEPS}, to cut ranks on its way`);
  const scores = new Map<string, Map<string, Sensitivity>>();
  /** Components that are switched off, by layer. */
  const masked = new Map<string, Set<number>>();
  const trace: TraceEntry[] = [];
  let startCost = 0;

  const score = (modules: readonly TrainedModule[]): void => {
    for (const { name, parameters } of modules) {
      for (const [key, { values, gradient }] of parameters) scores.get(name)!.get(key)!.add(values, gradient);
    }
  };
  const cut = (step: number, modules: readonly TrainedModule[]): void => {
    const allowed = cubicBudget(step, { from: startCost, to: budget.total, start, end });
    const before = new Map(modules.map(({ name }) => [name, [...masked.get(name)!].sort((a, b) => a - b).join()]));
    // The whole of what the cubic law gives is a number of ranks under `r`.
    keepWithin(modules, Math.floor(allowed + 1e-9));
    const changed = modules.filter(({ name }) => [...masked.get(name)!].sort((a, b) => a - b).join() !== before.get(name));
    if (changed.length > 0) trace.push({ step, totalRank: totalRank(modules), changed: changed.map(({ name }) => name) });
  };
  const keepWithin = (modules: readonly TrainedModule[], allowed: number): void => {
    const triplets = modules.flatMap((layer) =>
      Array.from({ length: layer.rank }, (_, k) => ({
        layer,
        k,
        cost: budget.cost(layer),
        value: importance(layer, scores.get(layer.name)!, k),
      })),
    );
    const kept = keepBest(triplets, allowed);
    for (const { name, rank } of modules) {
      const own = new Set(kept.get(name));
      masked.set(name, new Set(Array.from({ length: rank }, (_, k) => k).filter((k) => !own.has(k))));
    }
  };
  const mask = (modules: readonly TrainedModule[]): void => {
    for (const { name, parameters } of modules) {
      const { values } = parameters.get('e')!;
      for (const k of masked.get(name)!) values[k] = 0;
    }
  };
  const totalRank = (modules: readonly TrainedModule[]) =>
    modules.reduce((sum, { name, rank }) => sum + rank - masked.get(name)!.size, 0);

  return {
    form: 'svd',
    regulariser: REGULARISER,
    learningRate: 5e-4,
    finalFrom: end,
    trace,
    init(modules) {
      const mean = budget.total / modules.reduce((sum, module) => sum + budget.cost(module), 0);
      for (const module of modules) {
        const { name, outFeatures: m, inFeatures: n } = module;
        const rank = Math.min(options.startRank ?? Math.ceil(START_RATIO * mean), m, n);
        module.rank = rank;
        module.scale = options.scale ?? SCALE;
        place(module, 'loraA', [rank, n], normal(rank * n, SPREAD, seed, `${name} loraA`));
        place(module, 'loraB', [m, rank], normal(m * rank, SPREAD, seed, `${name} loraB`));
        place(module, 'e', [rank], new Float32Array(rank));
        scores.set(name, new Map([...module.parameters].map(([key, { values }]) => [key, new Sensitivity(values.length)])));
        masked.set(name, new Set());
      }
      startCost = modules.reduce((sum, module) => sum + module.rank * budget.cost(module), 0);
      if (startCost < budget.total) {
        throw new RecipeError(
          `--budget: allows ${budget.total}, and adalora starts with ${startCost}, which it only cuts; use a smaller budget or a larger --start-rank`,
        );
      }
    },
    before(step, modules) {
      if (preset === 'best' && step < end) score(modules);
    },
    after(step, modules) {
      if (preset === 'paper' && step < end) score(modules);
      if (step > start && step <= end && (step % interval === 0 || step === end)) {
        cut(step, modules);
        mask(modules);
      }
      if (step > end) mask(modules);
    },
    ranks: (modules) => new Map(modules.map(({ name, rank }) => [name, rank - masked.get(name)!.size])),
    factors(module) {
      const { name, rank, scale, inFeatures: n, outFeatures: m, parameters } = module;
      const kept = Array.from({ length: rank }, (_, k) => k).filter((k) => !masked.get(name)!.has(k));
      const [a, b, e] = ['loraA', 'loraB', 'e'].map((key) => parameters.get(key)!.values);
      const loraA = new Float32Array(kept.length * n);
      const loraB = new Float32Array(m * kept.length);
      kept.forEach((k, to) => {
        loraA.set(a.subarray(k * n, (k + 1) * n), to * n);
        for (let j = 0; j < m; j++) loraB[j * kept.length + to] = scale * e[k] * b[j * rank + k];
      });
      return { rank: kept.length, loraA, loraB };
    },
    state: (): State => ({
      scores: Object.fromEntries(
        [...scores].map(([name, own]) => [
          name,
          Object.fromEntries([...own].map(([key, { mean, deviation }]) => [key, { mean, deviation }])),
        ]),
      ),
      masked: Object.fromEntries([...masked].map(([name, own]) => [name, [...own]])),
      trace,
    }),
    restore(raw) {
      const state = raw as State;
      for (const [name, own] of Object.entries(state.scores)) {
        for (const [key, { mean, deviation }] of Object.entries(own)) {
          scores.get(name)!.get(key)!.mean.set(mean);
          scores.get(name)!.get(key)!.deviation.set(deviation);
        }
      }
      for (const [name, own] of Object.entries(state.masked)) masked.set(name, new Set(own));
      trace.splice(0, trace.length, ...state.trace);
    },
  };
}

/** `S = s(e_k) + mean_j s(A_kj) + mean_j s(B_jk)`. */
function importance(
  { rank, inFeatures: n, outFeatures: m }: TrainedModule,
  scores: ReadonlyMap<string, Sensitivity>,
  k: number,
): number {
  const [a, b, e] = ['loraA', 'loraB', 'e'].map((key) => scores.get(key)!);
  let ofA = 0;
  for (let j = 0; j < n; j++) ofA += a.at(k * n + j);
  let ofB = 0;
  for (let j = 0; j < m; j++) ofB += b.at(j * rank + k);
  return e.at(k) + ofA / n + ofB / m;
}
