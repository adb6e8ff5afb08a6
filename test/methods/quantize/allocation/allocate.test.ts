import { describe, expect, test } from 'vitest';
import { allocate, lossCurve } from '../../../../src/methods/quantize/allocation/allocate.ts';
import { BudgetError, frontier, type LayerCosts } from '../../../../src/methods/quantize/allocation/frontier.ts';
import { type ChoiceSet, lowerHull, segmentsByGain, setHull } from '../../../../src/methods/quantize/allocation/hull.ts';
import { randomSource } from '../../../support/random.ts';
import { everyTotal, leastWithin, planesBits, randomLayer, randomSet, type Total } from './support.ts';

/** Of the largest loss: sums in different orders. */
const TOLERANCE = 1e-12;

const single = (name: string, layer: LayerCosts, omega = 1): ChoiceSet => ({
  name,
  choices: [{ label: 'only', fixedBits: 0, members: [{ name, frontier: frontier(layer), omega }] }],
});

/** Sizes and losses of every member's widths, added up from the tables. */
function recount(sets: readonly ChoiceSet[], allocation: ReturnType<typeof allocate>): Total {
  let size = 0;
  let cost = 0;
  sets.forEach((set, i) => {
    const plan = allocation.sets[i];
    const choice = set.choices.find(({ label }) => label === plan.label);
    size += choice?.fixedBits ?? Number.NaN;
    choice?.members.forEach(({ frontier: { layer }, omega }, m) => {
      plan.members[m].bits.forEach((width, g) => {
        const k = layer.widths.indexOf(width);
        size += layer.sizes[g][k];
        cost += omega * layer.costs[g][k];
      });
    });
  });
  return { size, cost };
}

const PROBLEMS: [string, ChoiceSet[]][] = [
  ['one layer', [randomSet('a', 1, { members: 1, choices: 1, groups: 5 })]],
  ['three layers', [2, 3, 4].map((seed) => randomSet(`layer ${seed}`, seed, { members: 1, choices: 1, groups: 3 }))],
  ['one set with a choice', [randomSet('a', 5, { members: 2, choices: 3, groups: 3 })]],
  ['sets with choices', [6, 7, 8].map((seed) => randomSet(`set ${seed}`, seed, { members: 2, choices: 3, groups: 3 }))],
  [
    'a layer that does not matter',
    [
      ...[9, 10].map((seed) => randomSet(`set ${seed}`, seed, { members: 1, choices: 2, groups: 4 })),
      single('idle', randomLayer(randomSource(1), 4, [1, 2], true, planesBits(5, 4)), 0),
    ],
  ],
];

describe.each(PROBLEMS)('%s, against every plan', (_, sets) => {
  const totals = everyTotal(sets);
  const curve = lossCurve(sets);
  const scale = curve[0].loss;
  const largestGain = Math.max(...segmentsByGain(sets.map(setHull)).map(({ gain }) => gain));
  const least = totals[0].size;
  const most = curve[curve.length - 1].size;
  const budgets = Array.from({ length: 120 }, (_, i) => least + Math.floor(((most - least) * i) / 110));

  test('never exceeds the budget, reports what it took, and is within one segment of the optimum and of the bound', () => {
    for (const budget of budgets) {
      const allocation = allocate(sets, budget);
      const { size, cost } = recount(sets, allocation);
      expect(size).toBe(allocation.size);
      expect(Math.abs(cost - allocation.loss)).toBeLessThanOrEqual(TOLERANCE * scale);
      expect(size).toBeLessThanOrEqual(budget);
      const best = leastWithin(totals, budget);
      expect(allocation.bound).toBeLessThanOrEqual(best + TOLERANCE * scale);
      expect(best).toBeLessThanOrEqual(allocation.loss + TOLERANCE * scale);
      expect(allocation.loss - allocation.bound).toBeLessThanOrEqual(largestGain + TOLERANCE * scale);
      expect(allocation.sets.map((set) => set.size).reduce((a, b) => a + b)).toBe(size);
    }
  });

  test('a larger budget never gives a larger loss', () => {
    let last = Infinity;
    for (let budget = least; budget <= most; budget += Math.max(1, Math.floor((most - least) / 400))) {
      const { loss } = allocate(sets, budget);
      expect(loss).toBeLessThanOrEqual(last + TOLERANCE * scale);
      last = loss;
    }
  });

  test('both ends are those of every plan, and less is refused with what can be reached', () => {
    expect(allocate(sets, least).size).toBe(least);
    expect(allocate(sets, least)).toMatchObject({ least, most });
    const all = allocate(sets, Infinity);
    expect(Math.abs(all.loss - totals[totals.length - 1].cost)).toBeLessThanOrEqual(TOLERANCE * scale);
    expect(all.size).toBe(most);
    expect(() => allocate(sets, least - 1)).toThrow(expect.objectContaining({ budget: least - 1, least, most }));
    expect(() => allocate(sets, Number.NaN)).toThrow(BudgetError);
  });

  test('the loss curve runs through optimal plans, by falling gain per bit', () => {
    let slope = Infinity;
    curve.forEach(({ size, loss }, i) => {
      expect(Math.abs(loss - leastWithin(totals, size))).toBeLessThanOrEqual(TOLERANCE * scale);
      expect(Math.abs(loss - allocate(sets, size).loss)).toBeLessThanOrEqual(TOLERANCE * scale);
      if (i === 0) return;
      const next = (curve[i - 1].loss - loss) / (size - curve[i - 1].size);
      expect(next).toBeLessThanOrEqual(slope * (1 + 1e-6));
      slope = next;
    });
  });
});

test.each([2.1, 2.25, 2.37, 2.6, 3.1])(
  'seven layers of a small model use at least 99.5 percent of %d stored bits per weight',
  (bits) => {
    const shapes = [...Array(4).fill([256, 256]), [688, 256], [688, 256], [256, 688]];
    const random = randomSource(11);
    const sets = shapes.map(([rows, n], i) => {
      const columns = (g: number) => Math.min(32, n - 32 * g);
      const layer = randomLayer(random, Math.ceil(n / 32), [1, 2, 3, 4, 8], i % 2 === 0, (width, g) =>
        planesBits(rows, columns(g))(width),
      );
      return single(`layer ${i}`, layer);
    });
    const budget = bits * shapes.reduce((total, [rows, n]) => total + rows * n, 0);
    const { size, least, most } = allocate(sets, budget);
    expect(least).toBeLessThan(budget);
    expect(most).toBeGreaterThan(budget);
    expect(size).toBeLessThanOrEqual(budget);
    expect(size).toBeGreaterThanOrEqual(0.995 * budget);
  },
);

test('omega says where bits go', () => {
  const layer = { widths: [1, 2], costs: [[4, 1]], sizes: [[10, 20]], monotone: false };
  const { sets, size, loss } = allocate([single('a', layer, 1), single('b', layer, 2)], 30);
  expect(sets.map(({ members }) => members[0].bits)).toEqual([[1], [2]]);
  expect([size, loss]).toEqual([30, 4 + 2]);
});

test('a choice is taken when it pays for its fixed bits, and the first on a tie', () => {
  const member = (cost: number[]) => ({
    name: 'm',
    frontier: frontier({ widths: [1, 2], costs: [cost], sizes: [[10, 20]], monotone: false }),
    omega: 1,
  });
  const set = {
    name: 's',
    choices: [
      { label: 'none', fixedBits: 0, members: [member([8, 2])] },
      { label: 'same', fixedBits: 0, members: [member([8, 2])] },
      { label: 'perm', fixedBits: 5, members: [member([3, 1])] },
    ],
  };
  const taken = [10, 14, 15, 19, 20, 25].map((budget) => allocate([set], budget).sets[0]);
  expect(taken.map(({ label }) => label)).toEqual(['none', 'none', 'perm', 'perm', 'none', 'perm']);
  expect(taken.map(({ size }) => size)).toEqual([10, 10, 15, 15, 20, 25]);
});

test('what is left over goes to points between the hulls', () => {
  // Hull: 10 -> 30 bits. The point at 20 lies above it and is all that 20 bits can buy.
  const layer = { widths: [1, 2, 3], costs: [[10, 9, 0]], sizes: [[10, 20, 30]], monotone: false };
  expect(allocate([single('a', layer)], 29)).toMatchObject({ size: 20, loss: 9 });
});

test('a hull keeps no point on or above a chord, and of equal sizes the cheapest', () => {
  expect(lowerHull([1, 2, 3, 4, 5, 5, 6], [10, 7, 4, 3.5, 3, 2, 2])).toEqual([0, 2, 5]);
});

test('malformed sets are refused', () => {
  const layer = { widths: [1], costs: [[1]], sizes: [[1]], monotone: false };
  expect(() => allocate([single('a', layer, Number.NaN)], 9)).toThrow(RangeError);
  expect(() => allocate([{ name: 's', choices: [] }], 9)).toThrow(RangeError);
  expect(() => allocate([{ name: 's', choices: [{ label: 'x', fixedBits: 0.5, members: [] }] }], 9)).toThrow(RangeError);
});
