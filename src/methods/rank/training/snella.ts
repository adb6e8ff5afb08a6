/** SNELLA (arXiv 2510.24037): updates of few non-zeros out of a kernel, layer by layer as many as it is sensitive, ever fewer (adapters.md 8.6). */
import { RecipeError } from '../../../errors.ts';
import { KERNEL_HEADS, kernelDelta, kernelStart, nonZeros } from '../kernel-delta.ts';
import { waterfill } from '../waterfill.ts';
import { cubicBudget } from './adalora.ts';
import { kaimingUniform, place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import type { TraceEntry, TrainedModule, TrainingSchedule } from './schedule.ts';
import { Sensitivity } from './sensitivity.ts';

/** q: coordinates of a point, over all heads. */
const COORDINATES = 32;
/** Cuts in a run. */
const CUTS = 100;
/** Points whose sensitivity counts. */
const SCORED = ['kernelIn', 'kernelOut'] as const;

interface State {
  /** Non-zeros by layer; null: all. */
  readonly kept: Readonly<Record<string, number | null>>;
  readonly scores: Readonly<Record<string, Readonly<Record<string, Pick<Sensitivity, 'mean' | 'deviation'>>>>>;
  readonly trace: readonly TraceEntry[];
}

export function snella({ steps, budget, preset, seed }: ScheduleOptions): TrainingSchedule {
  const total = Math.floor(budget.total);
  const interval = Math.max(1, Math.floor(steps / CUTS));
  const scores = new Map<string, Map<string, Sensitivity>>();
  const trace: TraceEntry[] = [];
  let all: readonly TrainedModule[] = [];
  let whole = 0;

  const score = (): void => {
    for (const { name, parameters } of all) {
      for (const key of SCORED) {
        const { values, gradient } = parameters.get(key)!;
        scores.get(name)!.get(key)!.add(values, gradient);
      }
    }
  };
  const cut = (step: number): void => {
    const allowed = Math.floor(cubicBudget(step, { from: whole, to: total, start: 0, end: steps }) + 1e-9);
    const vessels = all.map(({ name, outFeatures, inFeatures }) => {
      const share = SCORED.reduce((sum, key) => sum + meanOf(scores.get(name)!.get(key)!), 0);
      return { name, share: Number.isFinite(share) ? share : 0, cost: 1, least: 0, most: outFeatures * inFeatures };
    });
    const counts = waterfill(vessels, allowed);
    const changed = all.filter(({ name, kernel }) => kernel!.kept !== counts.get(name));
    for (const { name, kernel } of all) kernel!.kept = counts.get(name)!;
    if (changed.length > 0) trace.push({ step, totalRank: keptOf(all), changed: changed.map(({ name }) => name) });
  };

  return {
    form: 'kernel',
    regulariser: 0,
    learningRate: 1e-3,
    finalFrom: steps,
    trace,
    init(modules) {
      all = modules;
      whole = modules.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
      if (steps === 0)
        throw new RecipeError('--steps 0: snella has nothing to write before it is trained; give a number of steps');
      if (total >= whole)
        throw new RecipeError(`--budget: allows ${total} non-zeros, and the layers have ${whole} weights: nothing is left out`);
      for (const module of modules) {
        const { name, outFeatures: m, inFeatures: n } = module;
        const width = COORDINATES / KERNEL_HEADS;
        module.kernel = { published: preset === 'paper' };
        for (const [key, side, rows] of [
          ['kernelIn', 'initialIn', n],
          ['kernelOut', 'initialOut', m],
        ] as const) {
          // Within 1 / sqrt(rows * width).
          const unscaled = kaimingUniform(KERNEL_HEADS * rows, width, seed, `${name} ${key}`);
          const points = unscaled.map((value) => value / Math.sqrt(rows));
          place(module, key, [KERNEL_HEADS, rows, width], points);
          if (preset === 'best') place(module, side, [KERNEL_HEADS, rows, width], points.slice(), true);
        }
        for (const [key, value] of [
          ['alpha', 1],
          ['gamma', 1],
          ['beta', 0],
        ] as const)
          place(module, key, [1], Float32Array.of(value));
        scores.set(name, new Map(SCORED.map((key) => [key, new Sensitivity(module.parameters.get(key)!.values.length)])));
      }
    },
    before(step) {
      if (preset === 'best' && step < steps) score();
    },
    after(step) {
      if (preset === 'paper' && step < steps) score();
      if (step % interval === 0 || step === steps) cut(step);
    },
    ranks: (modules) => new Map(modules.map(({ name }) => [name, 0])),
    size({ outFeatures, inFeatures, kernel }) {
      const count = kernel?.kept ?? outFeatures * inFeatures;
      return { spent: count, parameters: count };
    },
    factors: async (module, blas) => nonZeros(await kernelDelta(blas, module, await kernelStart(blas, module))),
    state: (): State => ({
      kept: Object.fromEntries(all.map(({ name, kernel }) => [name, kernel!.kept ?? null])),
      scores: Object.fromEntries(
        [...scores].map(([name, own]) => [
          name,
          Object.fromEntries([...own].map(([key, { mean, deviation }]) => [key, { mean, deviation }])),
        ]),
      ),
      trace,
    }),
    restore(raw) {
      const state = raw as State;
      for (const { name, kernel } of all) kernel!.kept = state.kept[name] ?? undefined;
      for (const [name, own] of Object.entries(state.scores)) {
        for (const [key, { mean, deviation }] of Object.entries(own)) {
          scores.get(name)!.get(key)!.mean.set(mean);
          scores.get(name)!.get(key)!.deviation.set(deviation);
        }
      }
      trace.splice(0, trace.length, ...state.trace);
    },
  };
}

function meanOf(sensitivity: Sensitivity): number {
  const { length } = sensitivity.mean;
  let sum = 0;
  for (let i = 0; i < length; i++) sum += sensitivity.at(i);
  return sum / length;
}

function keptOf(modules: readonly TrainedModule[]): number {
  return modules.reduce((sum, { outFeatures, inFeatures, kernel }) => sum + (kernel!.kept ?? outFeatures * inFeatures), 0);
}
