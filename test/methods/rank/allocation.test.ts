/** Ranks by greed and by EVA against published vectors (adapters.md, section 12) and brute force. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { eigh } from '../../../src/compute/linalg/eigh.ts';
import { evaRanks, principalDirections } from '../../../src/methods/rank/eva.ts';
import { greedyRanks } from '../../../src/methods/rank/greedy.ts';
import { spendable } from '../../../src/methods/rank/rank-budget.ts';
import { solveRanks } from '../../../src/methods/rank/solve.ts';
import { normal } from '../../../src/methods/rank/training/initial.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const GAINS = [
  [100, 40, 10, 4, 1],
  [90, 80, 70, 60, 50],
  [30, 1, 0.5, 0.2, 0.1],
];
const layers = (costs: readonly number[]) => ['a', 'b', 'd'].map((name, i) => ({ name, cost: costs[i], gains: GAINS[i] }));

describe('greedy ranks', () => {
  it.each([
    [40_000, [1, 2, 0]],
    [62_000, [2, 3, 0]],
    [80_000, [2, 4, 0]],
  ])('under %i go where gain over cost is largest', (total, expected) => {
    expect([...greedyRanks(layers([8192, 15_104, 8192]), total).values()]).toEqual(expected);
  });

  it('at equal costs are the largest gains', () => {
    expect([...greedyRanks(layers([1, 1, 1]), 8).values()]).toEqual([2, 5, 1]);
  });

  it('at equal costs are as good as any choice, and never overspend', () => {
    const gains = fc
      .array(fc.integer({ min: 0, max: 20 }), { minLength: 1, maxLength: 4 })
      .map((list) => list.toSorted((x, y) => y - x));
    fc.assert(
      fc.property(fc.array(gains, { minLength: 1, maxLength: 3 }), fc.integer({ min: 0, max: 8 }), (all, total) => {
        const choices = all.map((own, i) => ({ name: `${i}`, cost: 1, gains: own }));
        const ranks = [...greedyRanks(choices, total).values()];
        const value = (picked: readonly number[]) =>
          picked.reduce((sum, k, i) => sum + all[i].slice(0, k).reduce((a, b) => a + b, 0), 0);
        expect(ranks.reduce((a, b) => a + b, 0)).toBeLessThanOrEqual(total);
        let best = 0;
        const go = (i: number, left: number, picked: number[]): void => {
          if (i === all.length) {
            best = Math.max(best, value(picked));
            return;
          }
          for (let k = 0; k <= Math.min(left, all[i].length); k++) go(i + 1, left - k, [...picked, k]);
        };
        go(0, total, []);
        expect(value(ranks)).toBe(best);
      }),
    );
  });
});

describe('eva', () => {
  const shape = { outFeatures: 8, inFeatures: 4 };
  const two = [
    { name: 'a', ...shape, ratios: [0.5, 0.25, 0.125, 0.125] },
    { name: 'b', ...shape, ratios: [0.9, 0.05, 0.025, 0.025] },
  ];
  it('takes the largest ratios of all layers', () => {
    expect([...evaRanks(two, spendable({ kind: 'r', amount: 2 }, two)).values()]).toEqual([3, 1]);
    const choices = two.map(({ name, ratios }) => ({ name, cost: 1, gains: ratios }));
    expect([...solveRanks(choices, 4, { solver: 'auto', least: 0, multiple: 1 }).ranks.values()]).toEqual([3, 1]);
  });

  it('never overspends parameters, however layers differ', () => {
    const uneven = [two[0], { ...two[1], outFeatures: 100 }];
    const ranks = evaRanks(uneven, spendable({ kind: 'params', amount: 150 }, uneven));
    expect(12 * ranks.get('a')! + 104 * ranks.get('b')!).toBeLessThanOrEqual(150);
  });

  it('finds the eigenvectors of the covariance, and their part of the variance', async () => {
    const [tokens, n] = [200, 6];
    const x = normal(tokens * n, 1, 5, 'x').map((value, i) => value * (1 + (i % n)) + (i % n === 2 ? 3 : 0));
    const gram = new Float64Array(n * n);
    const mean = new Float64Array(n);
    for (let t = 0; t < tokens; t++) {
      for (let i = 0; i < n; i++) {
        mean[i] += x[t * n + i] / tokens;
        for (let j = 0; j < n; j++) gram[i * n + j] += (x[t * n + i] * x[t * n + j]) / tokens;
      }
    }
    const covariance = gram.map((value, at) => value - mean[Math.floor(at / n)] * mean[at % n]);
    const { values, vectors } = eigh(covariance, n);
    const total = values.reduce((a, b) => a + b, 0);
    const { ratios, directions } = await principalDirections(naiveBlas(), gram, mean, 3);
    for (let k = 0; k < 3; k++) {
      expect(ratios[k]).toBeCloseTo(values[k] / total, 5);
      const along = vectors.subarray(k * n, (k + 1) * n).reduce((sum, value, j) => sum + value * directions[k * n + j], 0);
      expect(Math.abs(along)).toBeCloseTo(1, 4);
    }
  });
});
