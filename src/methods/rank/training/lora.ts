/** LoRA (Hu et al., arXiv 2106.09685): ranks stay as they are given, one for every layer unless something else was found. */
import { RecipeError } from '../../../errors.ts';
import { uniformRank } from '../rank-budget.ts';
import { kaimingUniform, place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainedModule, TrainingSchedule } from './schedule.ts';

/** Scale is this over the root of the rank, unless it is given (adapters.md, section 7). */
const SCALE = 32;

export function lora({ budget, seed, scale, start }: ScheduleOptions): TrainingSchedule {
  return {
    form: 'lora',
    regulariser: 0,
    needsWeightGradient: false,
    learningRate: 2e-4,
    finalFrom: 0,
    trace: [],
    init(modules) {
      const rank = uniformRank(budget, modules);
      if (rank < 1 && !start) {
        const needed = modules.reduce((sum, module) => sum + budget.cost(module), 0);
        throw new RecipeError(
          `--budget: allows ${budget.total}, and one rank of all ${modules.length} layers costs ${needed}; adapt fewer with --targets`,
        );
      }
      for (const module of modules) {
        const { name, outFeatures: m, inFeatures: n } = module;
        module.rank = Math.min(start?.ranks.get(name) ?? rank, m, n);
        module.scale = scale ?? SCALE / Math.sqrt(Math.max(1, rank));
        const loraA = start?.loraA?.(name, module.rank) ?? kaimingUniform(module.rank, n, seed, `${name} loraA`);
        place(module, 'loraA', [module.rank, n], loraA);
        const loraB = start?.loraB?.(name, module.rank).map((value) => value / module.scale);
        place(module, 'loraB', [m, module.rank], loraB ?? new Float32Array(m * module.rank));
      }
    },
    before() {},
    after() {},
    ranks: (modules) => new Map(modules.map(({ name, rank }) => [name, rank])),
    factors: loraFactors,
    state: () => null,
    restore() {},
  };
}

/** A and s B. */
export function loraFactors({ rank, scale, parameters }: TrainedModule) {
  const [a, b] = ['loraA', 'loraB'].map((key) => parameters.get(key)!.values);
  return { rank, loraA: a.slice(), loraB: b.map((value) => scale * value) };
}
