/** IncreLoRA (Zhang et al., arXiv 2308.12043): layers start with next to nothing, and those that the loss pulls hardest get components (adapters.md 8.2). */
import { RecipeError } from '../../../errors.ts';
import { growModule, grownByThreshold, grownExactly, layersAtATime, rankTargets, requireStart, shrinkModule } from './growth.ts';
import { place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import { GradientProbe, type ProbeState } from './probe.ts';
import type { TraceEntry, TrainedModule, TrainingSchedule } from './schedule.ts';
import { Sensitivity } from './sensitivity.ts';

const SCALE = 8;
const SCALE_GUARD = 1e-5;
const REGULARISER = 0.1;
/** Parts of the run before the first growth, and from then to the last one. */
const WARM_UP = 0.05;
const GROWING = 0.45;
/** Part of the run that a new component warms up in. */
const RESTART = 0.03;
/** What a component holds that learns in advance, before it is selected: frozen, and too little to matter. */
const RESERVE = 1e-5;

/** Factor on the rate of what came after update `born`: up within `warmUp` updates, then down to nothing at the end. */
export function restartFactor(step: number, born: number, warmUp: number, steps: number): number {
  const age = step - born;
  if (age < warmUp) return age / warmUp;
  return steps - born <= warmUp ? 1 : (steps - step) / (steps - born - warmUp);
}

/** `sum |D * G| / sqrt(m n)`, D being the update as it is in effect: how much the loss depends on a layer's update. */
export function updateSensitivity(update: ArrayLike<number>, gradient: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < update.length; i++) sum += Math.abs(update[i] * gradient[i]);
  return sum / Math.sqrt(update.length);
}

interface State {
  readonly ranks: Readonly<Record<string, number>>;
  readonly scores: Readonly<Record<string, readonly [number, number]>>;
  readonly probe: ProbeState;
  readonly finalFrom: number | null;
  readonly trace: readonly TraceEntry[];
}

export function increlora(options: ScheduleOptions): TrainingSchedule {
  const { steps, budget, preset, seed } = options;
  const paper = preset === 'paper';
  const startRank = options.startRank ?? (paper ? 1 : 0);
  const warmUp = Math.floor(WARM_UP * steps);
  const restart = Math.max(1, Math.round(RESTART * steps));
  const probe = new GradientProbe(seed);
  /** Of the published score; it is a single number a layer. */
  const scores = new Map<string, Sensitivity>();
  const coming = new Map<string, number>();
  /** Components that count, by layer: without those in reserve. */
  const ranks = new Map<string, number>();
  const trace: TraceEntry[] = [];
  let finalFrom = Infinity;
  let [alpha, each, most, interval] = [0, 1, 1, 1];

  const scaleOf = (rank: number) => (paper ? alpha / (rank + SCALE_GUARD) : (options.scale ?? SCALE));
  const reserve = (module: TrainedModule, step: number): void => {
    growModule(module, each, step, { seed, middle: 'e', inner: RESERVE });
    const e = module.parameters.get('e')!;
    e.frozen ??= new Uint8Array(e.values.length);
    e.frozen.fill(1, module.rank - each);
  };
  const grow = (step: number, modules: readonly TrainedModule[]): void => {
    const spent = modules.reduce((sum, module) => sum + ranks.get(module.name)! * budget.cost(module), 0);
    const least = Math.min(...modules.map((module) => budget.cost(module)));
    const left = Math.floor((budget.total - spent) / least + 1e-9);
    const grown = paper
      ? grownByThreshold(modules, { ranks, most: Math.min(most, left), each, score: ({ name }) => scores.get(name)!.at(0) })
      : grownExactly(modules, { budget, ranks, most, each, score: ({ name }) => probe.score(name) });
    for (const [module, count] of grown) {
      const rank = ranks.get(module.name)! + count;
      ranks.set(module.name, rank);
      if (paper) {
        module.parameters.get('e')!.frozen!.fill(0, 0, rank);
        reserve(module, step);
      } else growModule(module, count, step, { seed, middle: 'e' });
      module.scale = scaleOf(rank);
    }
    if (grown.size > 0) trace.push({ step, totalRank: totalRank(), changed: [...grown.keys()].map(({ name }) => name) });
    probe.redraw();
    const after = modules.reduce((sum, module) => sum + ranks.get(module.name)! * budget.cost(module), 0);
    if (grown.size > 0 && after + least <= budget.total + 1e-9) return;
    finalFrom = step;
    if (paper) for (const module of modules) shrinkModule(module, ranks.get(module.name)!);
  };
  const totalRank = () => [...ranks.values()].reduce((sum, rank) => sum + rank, 0);

  return {
    form: 'svd',
    regulariser: REGULARISER,
    learningRate: 5e-4,
    get finalFrom() {
      return finalFrom;
    },
    trace,
    init(modules) {
      const { mean, total } = rankTargets(budget, modules);
      alpha = (options.scale ?? SCALE) * Math.max(1, Math.floor(mean));
      each = Math.max(1, Math.floor(mean / 2));
      most = layersAtATime(modules.length);
      requireStart('increlora', startRank, budget, modules);
      const growths = Math.max(1, Math.ceil((total - startRank * modules.length) / (most * each)));
      if (warmUp + growths >= steps) {
        const needed = Math.ceil((growths + 2) / (1 - WARM_UP));
        throw new RecipeError(
          `--steps ${steps}: increlora grows ${growths} times within this budget, which takes ${needed} steps`,
        );
      }
      interval = Math.max(1, Math.floor((GROWING * steps) / growths));
      for (const module of modules) {
        const { name, outFeatures: m, inFeatures: n } = module;
        place(module, 'loraA', [0, n], new Float32Array());
        place(module, 'loraB', [m, 0], new Float32Array());
        place(module, 'e', [0], new Float32Array());
        const rank = Math.min(startRank, m, n);
        growModule(module, rank, 0, { seed, middle: 'e' });
        ranks.set(name, rank);
        module.scale = scaleOf(Math.max(1, rank));
        scores.set(name, new Sensitivity(1));
        if (paper) reserve(module, 0);
      }
    },
    async observe(module, gradient, blas) {
      if (finalFrom < Infinity) return;
      if (paper) coming.set(module.name, updateSensitivity(updateOf(module), gradient));
      else await probe.observe(module, gradient, blas);
    },
    before(step, modules) {
      for (const [name, value] of coming) scores.get(name)!.add(Float32Array.of(value), Float32Array.of(1));
      coming.clear();
      probe.commit();
      if (finalFrom === Infinity && step > warmUp && step % interval === 0) grow(step, modules);
    },
    after() {},
    rateFactor: (step, born) => restartFactor(step, born, restart, steps),
    ranks: (modules) => new Map(modules.map(({ name }) => [name, ranks.get(name)!])),
    factors(module) {
      const { name, rank: all, scale, inFeatures: n, outFeatures: m, parameters } = module;
      const rank = ranks.get(name)!;
      const [a, b, e] = ['loraA', 'loraB', 'e'].map((key) => parameters.get(key)!.values);
      const loraB = new Float32Array(m * rank);
      for (let i = 0; i < m; i++) for (let k = 0; k < rank; k++) loraB[i * rank + k] = scale * e[k] * b[i * all + k];
      return { rank, loraA: a.slice(0, rank * n), loraB };
    },
    state: (): State => ({
      ranks: Object.fromEntries(ranks),
      scores: Object.fromEntries([...scores].map(([name, { mean, deviation }]) => [name, [mean[0], deviation[0]] as const])),
      probe: probe.state(),
      finalFrom: finalFrom === Infinity ? null : finalFrom,
      trace,
    }),
    restore(raw) {
      const state = raw as State;
      for (const [name, rank] of Object.entries(state.ranks)) ranks.set(name, rank);
      for (const [name, [mean, deviation]] of Object.entries(state.scores)) {
        scores.get(name)!.mean[0] = mean;
        scores.get(name)!.deviation[0] = deviation;
      }
      probe.restore(state.probe);
      finalFrom = state.finalFrom ?? Infinity;
      trace.splice(0, trace.length, ...state.trace);
    },
  };
}

/** s B diag(e) A, those in reserve and all. */
function updateOf({ rank, scale, inFeatures: n, outFeatures: m, parameters }: TrainedModule): Float32Array {
  const [a, b, e] = ['loraA', 'loraB', 'e'].map((key) => parameters.get(key)!.values);
  const update = new Float32Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let k = 0; k < rank; k++) {
      const factor = scale * e[k] * b[i * rank + k];
      for (let j = 0; j < n; j++) update[i * n + j] += factor * a[k * n + j];
    }
  }
  return update;
}
