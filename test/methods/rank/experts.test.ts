/** Experts over the depth: the specification's profiles and remainders (adapters.md 12.13), and never more than the budget. */
import { describe, expect, it } from 'vitest';
import { routedParameters } from '../../../src/graph/routed-branch.ts';
import { allocateExperts, parseProfile, profileAt, shareExperts } from '../../../src/methods/rank/experts.ts';
import { spendable } from '../../../src/methods/rank/rank-budget.ts';

const over = (text: string, blocks: number) =>
  Array.from({ length: blocks }, (_, l) => profileAt(parseProfile(text) as readonly number[], l, blocks));
const sum = (values: readonly number[]) => values.reduce((all, value) => all + value, 0);

describe('a profile', () => {
  it('gives quarters of the depth their digits', () => {
    const runs = (blocks: number) => [2, 4, 6, 8].map((digit) => over('2468', blocks).filter((count) => count === digit).length);
    expect(runs(32)).toEqual([8, 8, 8, 8]);
    expect(runs(30)).toEqual([8, 7, 8, 7]);
    expect(runs(22)).toEqual([6, 5, 6, 5]);
    expect([32, 30, 22].map((blocks) => sum(over('2468', blocks)))).toEqual([160, 148, 108]);
    expect(over('2,12', 4)).toEqual([2, 2, 12, 12]);
  });

  it('of another total keeps its proportions by largest remainder, the last of equals first', () => {
    const counts = shareExperts(over('2468', 30), 150, 2);
    expect(sum(counts)).toBe(150);
    expect(counts.slice(-3)).toEqual([8, 9, 9]);
    expect(counts.slice(0, -2)).toEqual(over('2468', 30).slice(0, -2));
    expect(sum(shareExperts([1, 1, 8], 7, 2))).toBe(7);
    expect(Math.min(...shareExperts([1, 1, 8], 7, 2))).toBe(2);
    expect(shareExperts([1, 2, 8], 17, 2, 8)).toEqual([3, 6, 8]);
  });

  it.each(['248', '2048', '2,x', 'diamond', '5', ''])('%s is refused', (text) => {
    expect(() => parseProfile(text)).toThrow(/--profile/);
  });
});

describe('experts within a budget', () => {
  const layers = Array.from({ length: 8 }, (_, block) =>
    ['q', 'up'].map((kind) => ({ name: `${block} ${kind}`, block, outFeatures: kind === 'q' ? 16 : 48, inFeatures: 16 })),
  ).flat();
  const options = { profile: [2, 4, 6, 8], blocks: 8, routing: 'topk', topK: 2 } as const;
  const spent = (shapes: ReturnType<typeof allocateExperts>) =>
    sum(layers.map((layer) => routedParameters(shapes.get(layer.name)!, layer)));

  it('spend as much of it as another expert leaves, in the proportions of the profile', () => {
    for (const amount of [3000, 9_000, 20_000]) {
      const budget = spendable({ kind: 'params', amount }, layers, { least: 1 });
      const shapes = allocateExperts(layers, { ...options, budget });
      expect(spent(shapes)).toBeLessThanOrEqual(amount);
      const { rank } = shapes.get('0 q')!;
      const dearest = Math.max(...[0, 1].map((i) => layers[i].outFeatures + layers[i].inFeatures));
      expect(spent(shapes) + 2 * (rank * dearest + 16)).toBeGreaterThan(amount - (rank === 8 ? 0 : 16 * 3 * dearest));
      const counts = [0, 2, 4, 6].map((block) => shapes.get(`${block} q`)!.experts);
      expect(counts).toEqual(counts.toSorted((a, b) => a - b));
      expect(counts[0]).toBeGreaterThanOrEqual(2);
    }
  });

  it('are counted by block, or by their ranks', () => {
    const budget = spendable({ kind: 'experts', amount: 40 }, layers, { least: 1 });
    const shapes = allocateExperts(layers, { ...options, budget });
    expect(over('2468', 8)).toEqual(Array.from({ length: 8 }, (_, block) => shapes.get(`${block} up`)!.experts));
    expect(shapes.get('7 up')).toMatchObject({ experts: 8, rank: 8, topK: 2 });
    const ranks = allocateExperts(layers, {
      ...options,
      rank: 4,
      budget: spendable({ kind: 'r', amount: 20 }, layers, { least: 1 }),
    });
    expect(sum([...ranks.values()].map(({ experts, rank }) => experts * rank))).toBeLessThanOrEqual(20 * 16);
    expect(sum([...ranks.values()].map(({ experts, rank }) => experts * rank))).toBe(320);
  });

  it('of TMoE are all gone through, on one A', () => {
    const budget = spendable({ kind: 'params', amount: 20_000 }, layers, { least: 1 });
    const shapes = allocateExperts(layers, { ...options, profile: [4], routing: 'soft', budget });
    expect(shapes.get('0 q')).toMatchObject({ sharedA: true, routing: 'soft' });
    expect(shapes.get('0 q')!.topK).toBe(shapes.get('0 q')!.experts);
    expect(spent(shapes)).toBeLessThanOrEqual(20_000);
  });

  it('go where the importance is, at most eight to a block', () => {
    const budget = spendable({ kind: 'experts', amount: 30 }, layers, { least: 1 });
    const importance = [0, 0, 1, 0, 0, 9, 0, 0];
    const shapes = allocateExperts(layers, { ...options, profile: [1], importance, budget });
    const counts = Array.from({ length: 8 }, (_, block) => shapes.get(`${block} q`)!.experts);
    expect(sum(counts)).toBe(30);
    expect(counts[5]).toBe(8);
    expect(counts[2]).toBe(8);
    expect(Math.min(...counts)).toBe(2);
  });

  it('that buys not even two everywhere is refused with both numbers', () => {
    const budget = spendable({ kind: 'params', amount: 500 }, layers, { least: 1 });
    expect(() => allocateExperts(layers, { ...options, budget })).toThrow(/allows 500, and 2 experts of rank 1 .* cost 2048/);
  });
});
