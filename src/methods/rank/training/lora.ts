/** LoRA (Hu et al., arXiv 2106.09685): ranks stay as they are given, one for every layer unless something else was found. */
import { RecipeError } from '../../../errors.ts';
import { uniformRank } from '../rank-budget.ts';
import { kaimingUniform, place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainedFactors, TrainedModule, TrainingSchedule } from './schedule.ts';

/** Scale is this over the root of the rank, unless it is given or the factors are parts of the weight (adapters.md, section 7). */
const SCALE = 32;

export function lora({ budget, seed, scale, start }: ScheduleOptions): TrainingSchedule {
  return {
    form: 'lora',
    regulariser: 0,
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
        module.scale = scale ?? (start?.subtracted ? 1 : SCALE / Math.sqrt(Math.max(1, rank)));
        const loraA = start?.loraA?.(name, module.rank) ?? kaimingUniform(module.rank, n, seed, `${name} loraA`);
        place(module, 'loraA', [module.rank, n], loraA);
        const loraB = start?.loraB?.(name, module.rank).map((value) => value / module.scale);
        place(module, 'loraB', [m, module.rank], loraB ?? new Float32Array(m * module.rank));
        if (start?.subtracted) {
          place(module, 'initialA', [module.rank, n], loraA.slice(), true);
          place(module, 'initialB', [m, module.rank], loraB!.slice(), true);
        }
        // A layer without components is not in the adapter, and so stays as it is.
        if (start?.magnitude && module.rank > 0) place(module, 'magnitude', [m], start.magnitude(name));
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

/** A and s B; where a start was taken from the weight, it is taken from the update by as many components again. */
function loraFactors({ rank, scale, parameters, outFeatures: m }: TrainedModule): TrainedFactors {
  const [a, b, initialA, initialB, magnitude] = ['loraA', 'loraB', 'initialA', 'initialB', 'magnitude'].map(
    (key) => parameters.get(key)?.values,
  );
  const scaled = b!.map((value) => scale * value);
  if (!initialA || !initialB)
    return { rank, loraA: a!.slice(), loraB: scaled, ...(magnitude ? { magnitude: magnitude.slice() } : {}) };
  const loraA = new Float32Array(2 * a!.length);
  loraA.set(a!);
  loraA.set(initialA, a!.length);
  const loraB = new Float32Array(2 * scaled.length);
  for (let i = 0; i < m; i++) {
    for (let k = 0; k < rank; k++) {
      loraB[i * 2 * rank + k] = scaled[i * rank + k];
      loraB[i * 2 * rank + rank + k] = -scale * initialB[i * rank + k];
    }
  }
  return { rank: 2 * rank, loraA, loraB };
}
