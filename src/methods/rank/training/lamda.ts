/** LaMDA (Azizi et al., arXiv 2406.12832): between the leading singular vectors of a weight, of which more and more are frozen, only a square core trains (adapters.md 8.4). */
import { coreFactors } from './core.ts';
import { place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainedModule, TrainingSchedule } from './schedule.ts';

/** Scale is this over the mean rank, unless it is given. */
const SCALE = 16;
/** Part of the run after which B is frozen. */
const FREEZING = 0.3;

/** Columns of B that are frozen after `step` updates: all of them once `end` is reached. */
export function frozenColumns(step: number, rank: number, end: number): number {
  return end <= 0 ? rank : Math.min(rank, Math.floor((rank * step) / end));
}

/** Needs a start with both factors, left and right singular vectors. */
export function lamda({ steps, scale, start }: ScheduleOptions): TrainingSchedule {
  const end = FREEZING * steps;
  const freeze = (step: number, modules: readonly TrainedModule[]): void => {
    for (const { rank, outFeatures: m, parameters } of modules) {
      const b = parameters.get('loraB')!;
      const count = frozenColumns(step, rank, end);
      for (let i = 0; i < m; i++) for (let k = 0; k < count; k++) b.frozen![i * rank + k] = 1;
    }
  };
  return {
    form: 'core',
    regulariser: 0,
    learningRate: 3e-4,
    finalFrom: 0,
    trace: [],
    init(modules) {
      const mean = modules.reduce((sum, { name }) => sum + start!.ranks.get(name)!, 0) / modules.length;
      for (const module of modules) {
        const { name, outFeatures: m, inFeatures: n } = module;
        const rank = Math.min(start!.ranks.get(name)!, m, n);
        module.rank = rank;
        module.scale = scale ?? SCALE / Math.max(1, mean);
        place(module, 'loraA', [rank, n], start!.loraA!(name, rank), true);
        place(module, 'loraB', [m, rank], start!.loraB!(name, rank));
        place(module, 'core', [rank, rank], new Float32Array(rank * rank));
        module.parameters.get('loraB')!.frozen = new Uint8Array(m * rank);
      }
    },
    before(step, modules) {
      freeze(step - 1, modules);
    },
    after() {},
    ranks: (modules) => new Map(modules.map(({ name, rank }) => [name, rank])),
    factors: coreFactors,
    state: () => null,
    restore() {},
  };
}
