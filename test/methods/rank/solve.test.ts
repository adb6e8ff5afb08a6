/** Ranks within a budget against every way there is, and what rules say of them. */
import { describe, expect, it } from 'vitest';
import { Random } from '../../../src/compute/random.ts';
import { type RankRules, solveRanks, type TiedChoices } from '../../../src/methods/rank/solve.ts';

const RULES: RankRules = { solver: 'auto', least: 0, multiple: 1 };
const ranksOf = (layers: readonly TiedChoices[], total: number, rules: Partial<RankRules> = {}) => [
  ...solveRanks(layers, total, { ...RULES, ...rules }).ranks.values(),
];

/** The most that ranks within the budget are worth, over all of them. */
function bruteForce(layers: readonly TiedChoices[], total: number, allowed: (ranks: readonly number[]) => boolean): number {
  let best = Number.NEGATIVE_INFINITY;
  const ranks = layers.map(() => 0);
  const visit = (i: number, left: number, value: number): void => {
    if (i === layers.length) {
      if (allowed(ranks)) best = Math.max(best, value);
      return;
    }
    let sum = value;
    for (let rank = 0; rank <= layers[i].gains.length && rank * layers[i].cost <= left; rank++) {
      ranks[i] = rank;
      visit(i + 1, left - rank * layers[i].cost, sum);
      sum += layers[i].gains[rank] ?? 0;
    }
    ranks[i] = 0;
  };
  visit(0, total, 0);
  return best;
}

function randomLayers(random: Random): TiedChoices[] {
  return ['a', 'b', 'c', 'd'].map((name, i) => ({
    name,
    cost: 1 + Math.floor(random.nextFloat() * 7),
    gains: Array.from({ length: 4 }, () => random.nextFloat() * 10).sort((x, y) => y - x),
    ...(i < 2 ? { tie: 'shared' } : {}),
  }));
}

describe('the dynamic programme', () => {
  it('beats the greedy where costs differ', () => {
    const layers = [
      { name: 'a', cost: 1, gains: [10, 1] },
      { name: 'b', cost: 2, gains: [15] },
    ];
    expect(solveRanks(layers, 2, { ...RULES, solver: 'greedy' })).toMatchObject({ value: 11, solver: 'greedy' });
    expect(solveRanks(layers, 2, RULES)).toMatchObject({ value: 15, solver: 'dp' });
    // The fractional best: all of a's first rank, half of b's.
    expect(solveRanks(layers, 2, RULES).bound).toBeCloseTo(17.5, 9);
  });

  it('is as good as trying everything, never above the bound or the budget', () => {
    const random = new Random(5, 'layers');
    for (let round = 0; round < 60; round++) {
      const layers = randomLayers(random).map(({ tie: _, ...layer }) => layer);
      const total = Math.floor(random.nextFloat() * 40);
      const { ranks, value, bound } = solveRanks(layers, total, { ...RULES, solver: 'dp' });
      expect(value).toBeCloseTo(
        bruteForce(layers, total, () => true),
        9,
      );
      expect(bound).toBeGreaterThanOrEqual(value - 1e-9);
      expect(layers.reduce((sum, { name, cost }) => sum + cost * ranks.get(name)!, 0)).toBeLessThanOrEqual(total);
      expect(value).toBeGreaterThanOrEqual(solveRanks(layers, total, { ...RULES, solver: 'greedy' }).value - 1e-9);
    }
  });

  it('finds what the spec has for three layers', () => {
    const layers = [
      { name: 'a', cost: 8192, gains: [100, 40, 10, 4, 1] },
      { name: 'b', cost: 15_104, gains: [90, 80, 70, 60, 50] },
      { name: 'd', cost: 8192, gains: [30, 1, 0.5, 0.2, 0.1] },
    ];
    expect(ranksOf(layers, 40_000)).toEqual([1, 2, 0]);
    expect(ranksOf(layers, 62_000)).toEqual([2, 3, 0]);
    expect(ranksOf(layers, 80_000)).toEqual([2, 4, 0]);
  });
});

describe('rules', () => {
  it('hold in the best ranks that obey them: least, most, multiples and ties', () => {
    const random = new Random(7, 'rules');
    for (let round = 0; round < 40; round++) {
      const layers = randomLayers(random);
      const rules = { least: round % 3, most: 2 + (round % 3), multiple: 1 + (round % 2), solver: 'dp' } as const;
      const first = Math.ceil(rules.least / rules.multiple) * rules.multiple;
      const total = 60;
      const allowed = (ranks: readonly number[]) =>
        ranks[0] === ranks[1] &&
        ranks.every((rank) => rank >= first && rank <= Math.max(first, rules.most) && rank % rules.multiple === 0);
      const { ranks, value } = solveRanks(layers, total, { ...RULES, ...rules });
      const list = layers.map(({ name }) => ranks.get(name)!);
      expect(allowed(list), `${list} by ${JSON.stringify(rules)}`).toBe(true);
      expect(value).toBeCloseTo(bruteForce(layers, total, allowed), 9);
    }
  });

  it('that cost more than there is are refused with both numbers', () => {
    const layers = [{ name: 'a', cost: 5, gains: [3, 2] }];
    expect(() => solveRanks(layers, 8, { ...RULES, least: 2 })).toThrow(
      /--r-min 2: costs 10 in all 1 layers, and the budget is 8/,
    );
  });

  it('dp is refused where it would take too long, and auto goes without', () => {
    const layers = Array.from({ length: 200 }, (_, i) => ({
      name: `layer ${i}`,
      cost: 1001 + i,
      gains: Array.from({ length: 100 }, (__, k) => 100 - k),
    }));
    expect(() => solveRanks(layers, 5e6, { ...RULES, solver: 'dp' })).toThrow(/--solver dp: takes \d+ steps here/);
    expect(solveRanks(layers, 5e6, RULES).solver).toBe('greedy');
  });
});
