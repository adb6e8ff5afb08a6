/** MoLA (arXiv 2402.08562): LoRA experts, more of them where a profile says so, and a router that sends every token through a few; TMoE (arXiv 2503.18338): through all, on one A. */
import { ROUTED_TENSORS, routedParameters, routedSizes } from '../../../graph/routed-branch.ts';
import { expertCost } from '../experts.ts';
import { kaimingUniform, normal, place } from './initial.ts';
import type { ScheduleOptions } from './options.ts';
import type { TrainingSchedule } from './schedule.ts';

/** alpha over the rank, unless it is given. */
const SCALE = 2;
/** Weight of the balance in the loss of every block. */
const BALANCE = 0.001;
/** TMoE as published: standard deviation of the experts at the start. */
const SPREAD = 0.02;

/** Needs a start that says how many experts every layer has. */
export function mola({ budget, preset, seed, scale, start }: ScheduleOptions): TrainingSchedule {
  let blocks = new Map<number, number>();
  return {
    form: 'routed',
    regulariser: 0,
    balance: BALANCE,
    learningRate: 3e-4,
    finalFrom: 0,
    trace: [],
    init(modules) {
      blocks = new Map();
      for (const module of modules) {
        const { name, inFeatures: n } = module;
        const shape = start!.routed!(name);
        const sizes = routedSizes(shape, module);
        const [, width] = sizes.expertsB;
        module.routed = shape;
        module.rank = width;
        module.scale = scale ?? SCALE;
        blocks.set(module.block, (blocks.get(module.block) ?? 0) + 1);
        const published = preset === 'paper' && shape.routing === 'soft';
        for (const key of ROUTED_TENSORS) {
          const [rows, columns] = sizes[key];
          const random = () =>
            published && key !== 'router'
              ? truncated(rows * columns, seed, `${name} ${key}`)
              : kaimingUniform(rows, n, seed, `${name} ${key}`);
          place(module, key, [rows, columns], key === 'expertsB' && !published ? new Float32Array(rows * columns) : random());
        }
      }
    },
    before() {},
    after() {},
    ranks: (modules) => new Map(modules.map(({ name, rank }) => [name, rank])),
    size(module) {
      const parameters = routedParameters(module.routed!, module);
      // Experts are counted by block, whatever layers of it have them.
      const spent =
        budget.unit === 'experts'
          ? module.routed!.experts / blocks.get(module.block)!
          : expertCost(module.routed!, module, budget);
      return { spent, parameters };
    },
    factors({ routed, scale: own, parameters }) {
      const [router, expertsA, expertsB] = ROUTED_TENSORS.map((key) => parameters.get(key)!.values.slice());
      return { routed: routed!, router, expertsA, expertsB: expertsB.map((value) => own * value) };
    },
    state: () => null,
    restore() {},
  };
}

/** Normal, without what is further than two standard deviations. */
function truncated(length: number, seed: number, name: string): Float32Array {
  const values = normal(length, SPREAD, seed, name);
  for (let again = 1; values.some((value) => Math.abs(value) > 2 * SPREAD); again++) {
    const others = normal(length, SPREAD, seed, `${name} ${again}`);
    for (let i = 0; i < length; i++) if (Math.abs(values[i]) > 2 * SPREAD) values[i] = others[i];
  }
  return values;
}
