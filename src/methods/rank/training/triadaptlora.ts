/** TriAdaptLoRA (Liang et al., arXiv 2501.08008): a square core between the factors that grows by triangles, in more layers the later (adapters.md 8.3). */
import { RecipeError } from '../../../errors.ts';
import { coreFactors } from './core.ts';
import { growModule, grownExactly, rankTargets, requireStart } from './growth.ts';
import { place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import { GradientProbe, type ProbeState } from './probe.ts';
import type { TraceEntry, TrainedModule, TrainingSchedule } from './schedule.ts';

const SCALE = 8;
const SCALE_GUARD = 1e-5;
const REGULARISERS = { best: 0.1, paper: 0.5 };
const WARM_UP = 0.05;
/** Part of the run after which all layers grow at once until the budget is met. */
export const GROWN_AFTER = { best: 0.7, paper: 1 };
/** Looks at who should grow. */
const LOOKS = 40;
const LEAST_STEPS = 20;

/**
 * Layers that grow at once: `left` ranks times `part`, or to the power of it, at least one and at most `layers`.
 * @param part of the time of growth that has passed, 0 to 1
 */
export function growingLayers(law: 'linear' | 'exponential', left: number, part: number, layers = Infinity): number {
  const count = law === 'linear' ? left * part : Math.exp(part * Math.log(left));
  return Math.min(layers, Math.max(1, Math.floor(count + 1e-9)));
}

interface State {
  readonly probe: ProbeState;
  readonly blocks: Readonly<Record<string, readonly { readonly start: number; readonly end: number }[]>>;
  readonly norms: Readonly<Record<string, number>>;
  readonly finalFrom: number | null;
  readonly trace: readonly TraceEntry[];
}

export function triadaptlora(options: ScheduleOptions): TrainingSchedule {
  const { steps, budget, preset, seed, growth = 'linear' } = options;
  const paper = preset === 'paper';
  if (steps < LEAST_STEPS)
    throw new RecipeError(`--steps ${steps}: triadaptlora needs at least ${LEAST_STEPS}, to grow on its way`);
  const startRank = options.startRank ?? (paper ? 1 : 0);
  const warmUp = Math.floor(WARM_UP * steps);
  const grownAfter = GROWN_AFTER[preset] * steps;
  const interval = Math.max(1, Math.floor(steps / LOOKS));
  const probe = new GradientProbe(seed);
  /** Runs of components that came together, by layer. */
  const blocks = new Map<string, { readonly start: number; readonly end: number }[]>();
  /** Of the core over its blocks, at the last look. */
  const norms = new Map<string, number>();
  const corners = new Map<string, Float32Array>();
  const trace: TraceEntry[] = [];
  let finalFrom = Infinity;
  let [alpha, each, meanCost] = [0, 1, 1];

  const scaleOf = (rank: number) => (paper ? alpha / (rank + SCALE_GUARD) : (options.scale ?? SCALE));
  const add = (module: TrainedModule, count: number, step: number): void => {
    const { name, rank } = module;
    growModule(module, count, step, { seed, middle: 'core' });
    if (count > 0) blocks.get(name)!.push({ start: rank, end: rank + count });
    const scale = scaleOf(Math.max(1, module.rank));
    // The scale falls as the rank grows: the core makes up for it, so that the update stays as it is.
    const { values } = module.parameters.get('core')!;
    if (rank > 0) for (let i = 0; i < values.length; i++) values[i] *= module.scale / scale;
    module.scale = scale;
  };
  const normOf = ({ name, parameters }: TrainedModule) =>
    Math.hypot(...parameters.get('core')!.values) / Math.max(1, blocks.get(name)!.length);
  const spent = (modules: readonly TrainedModule[]) =>
    modules.reduce((sum, module) => sum + module.rank * budget.cost(module), 0);
  const grow = (step: number, modules: readonly TrainedModule[]): void => {
    const ranks = new Map(modules.map(({ name, rank }) => [name, rank]));
    const left = (budget.total - spent(modules)) / meanCost;
    const part = Math.min(1, (step - warmUp) / (grownAfter - warmUp));
    const gained = new Map(modules.map((module) => [module, normOf(module) - norms.get(module.name)!]));
    const grown = grownExactly(modules, {
      budget,
      ranks,
      most: growingLayers(growth, left, part, modules.length),
      each,
      score: (module) => (paper ? gained.get(module)! : probe.score(module.name)),
    });
    for (const module of modules) norms.set(module.name, normOf(module));
    for (const [module, count] of grown) add(module, count, step);
    if (grown.size > 0) {
      const totalRank = modules.reduce((sum, { rank }) => sum + rank, 0);
      trace.push({ step, totalRank, changed: [...grown.keys()].map(({ name }) => name) });
    }
    probe.redraw();
    const least = Math.min(...modules.map((module) => budget.cost(module)));
    if (grown.size === 0 || budget.total - spent(modules) < least - 1e-9) finalFrom = step;
  };

  return {
    form: 'core',
    regulariser: REGULARISERS[preset],
    learningRate: 5e-4,
    get finalFrom() {
      return finalFrom;
    },
    trace,
    init(modules) {
      const { mean, total } = rankTargets(budget, modules);
      alpha = (options.scale ?? SCALE) * Math.max(1, Math.floor(mean));
      each = Math.max(1, Math.floor(mean / 2));
      meanCost = budget.total / total;
      requireStart('triadaptlora', startRank, budget, modules);
      for (const module of modules) {
        const { name, outFeatures: m, inFeatures: n } = module;
        place(module, 'loraA', [0, n], new Float32Array());
        place(module, 'loraB', [m, 0], new Float32Array());
        place(module, 'core', [0, 0], new Float32Array());
        blocks.set(name, []);
        norms.set(name, 0);
        module.scale = scaleOf(1);
        add(module, Math.min(startRank, m, n), 0);
      }
    },
    async observe(module, gradient, blas) {
      if (finalFrom === Infinity && !paper) await probe.observe(module, gradient, blas);
    },
    before(step, modules) {
      probe.commit();
      if (finalFrom === Infinity && step > warmUp && step % interval === 0) grow(step, modules);
      if (paper) for (const { name, parameters } of modules) corners.set(name, parameters.get('core')!.values.slice());
    },
    after(_, modules) {
      if (!paper) return;
      // As published a block is a run of rows and one of columns: both hold the corner that they share, so that it moves twice as far.
      for (const { name, rank, parameters } of modules) {
        const { values } = parameters.get('core')!;
        const before = corners.get(name)!;
        for (const { start, end } of blocks.get(name)!)
          for (let i = start; i < end; i++)
            for (let j = start; j < end; j++) values[i * rank + j] += values[i * rank + j] - before[i * rank + j];
      }
    },
    ranks: (modules) => new Map(modules.map(({ name, rank }) => [name, rank])),
    factors: coreFactors,
    state: (): State => ({
      probe: probe.state(),
      blocks: Object.fromEntries(blocks),
      norms: Object.fromEntries(norms),
      finalFrom: finalFrom === Infinity ? null : finalFrom,
      trace,
    }),
    restore(raw) {
      const state = raw as State;
      probe.restore(state.probe);
      for (const [name, own] of Object.entries(state.blocks)) blocks.set(name, [...own]);
      for (const [name, norm] of Object.entries(state.norms)) norms.set(name, norm);
      finalFrom = state.finalFrom ?? Infinity;
      trace.splice(0, trace.length, ...state.trace);
    },
  };
}
