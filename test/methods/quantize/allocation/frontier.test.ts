import { describe, expect, test } from 'vitest';
import { RecipeError } from '../../../../src/errors.ts';
import { BudgetError, frontier, type LayerCosts, solveWithin } from '../../../../src/methods/quantize/allocation/frontier.ts';
import { paretoFront } from '../../../../src/methods/quantize/allocation/pareto.ts';
import { randomSource } from '../../../support/random.ts';
import { everyPlan, leastWithin, pareto, planesBits, randomLayer, SUM_TOLERANCE } from './support.ts';

const sizesAsWidths = (groups: number, widths: readonly number[]) => Array.from({ length: groups }, () => widths);

describe('vectors of the specification', () => {
  test('costs a 4^-b with a = (256, 64, 16, 4) and 10 bits give 4 3 2 1 and equal losses', () => {
    const widths = [1, 2, 3, 4, 5];
    const a = [256, 64, 16, 4];
    const costs = a.map((a) => widths.map((width) => a * 4 ** -width));
    for (const monotone of [true, false]) {
      const plan = solveWithin({ widths, costs, sizes: sizesAsWidths(4, widths), monotone }, 10);
      expect(plan).toEqual({ size: 10, cost: 4, bits: [4, 3, 2, 1] });
    }
  });

  test('widths are the mean plus half the log2 of importance over its geometric mean', () => {
    const widths = [1, 2, 3, 4, 5, 6, 7, 8];
    const expected = [7, 2, 4, 4, 3, 1];
    const mean = 21 / 6;
    const costs = expected.map((bits) => widths.map((width) => 4 ** (bits - mean) * 4 ** -width));
    expect(solveWithin({ widths, costs, sizes: sizesAsWidths(6, widths), monotone: false }, 21).bits).toEqual(expected);
  });

  test.each([
    [5, [3, 1, 1], 15],
    [6, [3, 2, 1], 11],
    [7, [3, 2, 2], 8],
  ])('the table of three groups, %i bits', (budget, bits, cost) => {
    const widths = [1, 2, 3, 4];
    const costs = [
      [10, 9.9, 1, 0.9],
      [8, 4, 3.9, 3.8],
      [6, 3, 2.9, 2.8],
    ];
    for (const monotone of [true, false]) {
      expect(solveWithin({ widths, costs, sizes: sizesAsWidths(3, widths), monotone }, budget)).toEqual({
        size: budget,
        cost,
        bits,
      });
    }
  });
});

describe.each([true, false])('against every plan, monotone %s', (monotone) => {
  test.each(Array.from({ length: 24 }, (_, seed) => seed))('layer %i', (seed) => {
    const random = randomSource(seed);
    const groups = 1 + (seed % 6);
    // From one size per width to sizes of groups that have nothing in common, and do not even rise with the width.
    const sizeOf = [
      (width: number) => width,
      planesBits(7, 8),
      (width: number, group: number) => width * (group === groups - 1 ? 3 : 8),
      () => 1 + Math.floor(1000 * random()),
    ][seed % 4];
    checkFrontier(randomLayer(random, groups, [1, 2, 3, 4, 8], monotone, sizeOf));
  });

  test('widths that are not offered are never taken', () => {
    const layer = randomLayer(randomSource(99), 4, [1, 2, 3, 4], monotone, (width) => width);
    layer.costs.forEach((cost, g) => {
      (cost as Float64Array)[g] = Infinity;
    });
    checkFrontier(layer);
  });

  test('groups that cost nothing take the least size', () => {
    const layer = {
      widths: [1, 2],
      costs: [
        [0, 0],
        [0, 0],
      ],
      sizes: [
        [3, 2],
        [1, 2],
      ],
      monotone,
    };
    const { sizes, costs } = frontier(layer);
    expect([...sizes]).toEqual([3]);
    expect([...costs]).toEqual([0]);
  });
});

describe.each([true, false])('what a layer takes beyond its groups, monotone %s', (monotone) => {
  test.each(Array.from({ length: 12 }, (_, seed) => seed))('layer %i', (seed) => {
    const random = randomSource(seed);
    const groups = 1 + (seed % 5);
    const widths = [1, 2, 3, 4];
    // Each width there is takes something once, and some order takes more.
    const rest = (bits: readonly number[]) =>
      [...new Set(bits)].reduce((sum, width) => sum + 3 * width, bits.some((width, g) => width > bits[g - 1]) ? 5 : 0);
    const layer = { ...randomLayer(random, groups, widths, monotone, planesBits(3, 8)), rest };
    const plans = everyPlan(layer).map((plan) => ({ ...plan, size: plan.size + rest(plan.bits) }));
    const most = Math.max(...plans.map(({ bits }) => rest(bits)));
    const { sizes, costs } = frontier(layer);
    expect([...sizes]).toEqual([...sizes].sort((a, b) => a - b));
    for (const [i, size] of sizes.entries()) {
      const { bits, ...plan } = solveWithin(layer, size + 0.5);
      expect(plan).toEqual({ size, cost: costs[i] });
      const attained = plans.find((one) => one.bits.join() === bits.join())!;
      expect(attained.size).toBe(size);
      expect(attained.cost).toBeCloseTo(costs[i], 12);
      expect(costs[i]).toBeGreaterThanOrEqual(leastWithin(plans, size) * (1 - SUM_TOLERANCE));
      expect(costs[i]).toBeLessThanOrEqual(leastWithin(plans, size - most) * (1 + SUM_TOLERANCE));
    }
    expect(costs.at(-1)).toBeCloseTo(leastWithin(plans, Infinity), 12);
  });
});

/** All of the frontier, and the plan at, below and between its points. */
function checkFrontier(layer: LayerCosts): void {
  const { sizes, costs, cell } = frontier(layer);
  const plans = everyPlan(layer);
  const expected = pareto(plans);
  expect(cell).toBe(0);
  // Plans that tie but for rounding may both be in one list and not in the other: compare what a budget buys.
  for (const limit of new Set([...sizes, ...expected.map(({ size }) => size)])) {
    const least = leastWithin(expected, limit);
    const at = sizes.findLastIndex((size) => size <= limit);
    expect(Math.abs(costs[at] - least)).toBeLessThanOrEqual(SUM_TOLERANCE * least);
    for (const budget of [limit, limit + 0.5]) {
      const plan = solveWithin(layer, budget);
      expect(plan.size).toBe(sizes[at]);
      expect(plan.cost).toBe(costs[at]);
      expect(plan.bits.reduce((sum, width, g) => sum + layer.sizes[g][layer.widths.indexOf(width)], 0)).toBe(plan.size);
      expect(plan.bits.reduce((sum, width, g) => sum + layer.costs[g][layer.widths.indexOf(width)], 0)).toBeCloseTo(
        plan.cost,
        12,
      );
      if (layer.monotone) expect(plan.bits).toEqual([...plan.bits].sort((a, b) => b - a));
    }
  }
  expect(() => solveWithin(layer, expected[0].size - 1)).toThrow(BudgetError);
}

test('a budget too small says what can be reached', () => {
  const layer = {
    widths: [2, 4],
    costs: [
      [3, 1],
      [2, 1],
    ],
    sizes: [
      [20, 40],
      [10, 20],
    ],
    monotone: true,
  };
  const error = (() => {
    try {
      return solveWithin(layer, 29);
    } catch (error) {
      return error;
    }
  })();
  expect(error).toBeInstanceOf(RecipeError);
  expect(error).toMatchObject({ budget: 29, least: 30, most: 60 });
});

describe('long lists', () => {
  const random = randomSource(5);
  const stages = Array.from({ length: 12 }, () => {
    const importance = Math.exp(4 * random());
    return {
      sizes: [1, 2, 3, 4].map((width) => 1000 * width + Math.floor(100 * random())),
      costs: [1, 2, 3, 4].map((width) => importance * 4 ** -width),
    };
  });
  for (const monotone of [true, false]) {
    test(`thinned ones keep both ends and lose at most a cell a stage, monotone ${monotone}`, () => {
      const exact = paretoFront({ stages, monotone, maxLabels: Infinity, band: Infinity });
      const thinned = paretoFront({ stages, monotone, maxLabels: 40, band: Infinity });
      expect(exact.cell).toBe(0);
      expect(thinned.cell).toBeGreaterThan(0);
      expect(thinned.sizes.length).toBeLessThanOrEqual(42);
      expect(thinned.sizes[0]).toBe(exact.sizes[0]);
      expect(thinned.costs.at(-1)).toBe(exact.costs.at(-1));
      const within = (front: typeof exact, limit: number) => front.costs[front.sizes.findLastIndex((size) => size <= limit)];
      for (const size of exact.sizes) {
        const allowed = within(exact, size - stages.length * thinned.cell);
        if (allowed !== undefined) expect(within(thinned, size)).toBeLessThanOrEqual(allowed);
        const reached = within(thinned, size);
        if (reached !== undefined) expect(reached).toBeGreaterThanOrEqual(within(exact, size));
      }
    });
  }
});

test.each([
  // Labels looked at, not seconds: a table over (group, width, size) in steps of one bit per row would have 3.3e7 and 1.3e8 entries.
  [86, 128, 2e6],
  [344, 32, 2e7],
])('a layer 11008 wide in %i groups of %i is exact with few labels', (groups, columns, most) => {
  const layer = randomLayer(randomSource(3), groups, [1, 2, 3, 4, 8], true, planesBits(4096, columns));
  for (const monotone of [true, false]) {
    const stages = layer.costs.map((costs, g) => ({ costs, sizes: layer.sizes[g] }));
    const { work } = paretoFront({ stages, monotone, maxLabels: Infinity, band: Infinity });
    expect(work).toBeLessThan(most);
    expect(frontier({ ...layer, monotone }).cell).toBe(0);
  }
});

test('malformed input is refused', () => {
  const layer = { widths: [1, 2], costs: [[2, 1]], sizes: [[1, 2]], monotone: false };
  expect(() => frontier({ ...layer, costs: [[2, Number.NaN]] })).toThrow(RangeError);
  expect(() => frontier({ ...layer, costs: [[2, -1]] })).toThrow(RangeError);
  expect(() => frontier({ ...layer, sizes: [[1, 2.5]] })).toThrow(RangeError);
  expect(() => frontier({ ...layer, sizes: [[1, 2, 3]] })).toThrow(RangeError);
  expect(() => frontier({ ...layer, sizes: [] })).toThrow(RangeError);
  expect(() => frontier({ ...layer, costs: [[Infinity, Infinity]] })).toThrow(RangeError);
});
