/** Small random layers, and the slow obvious way to allocate bits: try every plan. */
import { frontier, type LayerCosts } from '../../../../src/methods/quantize/allocation/frontier.ts';
import type { Choice, ChoiceSet } from '../../../../src/methods/quantize/allocation/hull.ts';
import { randomSource } from '../../../support/random.ts';

/** Relative: totals are added up in different orders. */
export const SUM_TOLERANCE = 1e-12;

export interface Total {
  readonly size: number;
  readonly cost: number;
}

/** Every plan of a layer. */
export function everyPlan({ widths, costs, sizes, monotone }: LayerCosts): (Total & { bits: number[] })[] {
  let plans = [{ size: 0, cost: 0, bits: [] as number[] }];
  costs.forEach((cost, g) => {
    plans = plans.flatMap((plan) =>
      widths.flatMap((width, k) => {
        if (monotone && width > (plan.bits.at(-1) ?? Infinity)) return [];
        if (cost[k] === Infinity) return [];
        return [{ size: plan.size + sizes[g][k], cost: plan.cost + cost[k], bits: [...plan.bits, width] }];
      }),
    );
  });
  return plans;
}

/** Every plan of the whole model: a choice of each set, a plan of each member. */
export function everyTotal(sets: readonly ChoiceSet[]): Total[] {
  const sums = (totals: Total[], more: readonly Total[], factor = 1) =>
    totals.flatMap((total) => more.map(({ size, cost }) => ({ size: total.size + size, cost: total.cost + factor * cost })));
  const ofChoice = ({ fixedBits, members }: Choice) =>
    members.reduce(
      (totals, { frontier: { layer }, omega }) => pareto(sums(totals, everyPlan(layer), omega)),
      [{ size: fixedBits, cost: 0 }],
    );
  return sets.reduce((totals, { choices }) => pareto(sums(totals, choices.flatMap(ofChoice))), [{ size: 0, cost: 0 }]);
}

/** The totals that no other undercuts, by size. */
export function pareto<T extends Total>(totals: readonly T[]): T[] {
  const sorted = [...totals].sort((a, b) => a.size - b.size || a.cost - b.cost);
  let least = Infinity;
  return sorted.filter(({ cost }) => {
    const kept = cost < least;
    if (kept) least = cost;
    return kept;
  });
}

/** Least cost within a size. */
export function leastWithin(totals: readonly Total[], limit: number): number {
  return totals.reduce((least, { size, cost }) => (size <= limit ? Math.min(least, cost) : least), Infinity);
}

/** Costs that fall by about 4 a bit, with kinks; `sizeOf` gives the size of a width. */
export function randomLayer(
  random: () => number,
  groups: number,
  widths: readonly number[],
  monotone: boolean,
  sizeOf: (width: number, group: number) => number,
): LayerCosts {
  const costs = Array.from({ length: groups }, () => {
    const importance = Math.exp(6 * random() - 3);
    return Float64Array.from(widths, (width) => importance * 4 ** -width * (0.4 + random()));
  });
  return { widths, costs, sizes: costs.map((_, g) => widths.map((width) => sizeOf(width, g))), monotone };
}

/** Bits of `planes` for a group of `columns` in a layer of `rows` (slim-llm 6). */
export function planesBits(rows: number, columns: number): (width: number) => number {
  return (width) => rows * (width * columns + 16) + (width === 1 ? 16 * rows : 32 * Math.ceil((width * rows) / 32));
}

/** A set of `members` layers with `choices` alternatives of random quality. */
export function randomSet(name: string, seed: number, shape: { members: number; choices: number; groups: number }): ChoiceSet {
  const random = randomSource(seed);
  const choices = Array.from({ length: shape.choices }, (_, c) => ({
    label: `choice ${c}`,
    fixedBits: 16 * c,
    members: Array.from({ length: shape.members }, (_, m) => {
      const columns = 2 + Math.floor(4 * random());
      const layer = randomLayer(random, shape.groups, [1, 2, 3, 4], random() < 0.5, planesBits(5, columns));
      return { name: `${name}.${m}`, frontier: frontier(layer), omega: 0.2 + random() };
    }),
  }));
  return { name, choices };
}
