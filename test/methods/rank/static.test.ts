/** Allocation without training: water levels, gradients and spectra against the vectors of adapters.md, section 12, and against definitions. */
import { describe, expect, it } from 'vitest';
import { Random } from '../../../src/compute/random.ts';
import { goraImportance, goraRanks, gradientStep } from '../../../src/methods/rank/gora.ts';
import { lamdaRanks } from '../../../src/methods/rank/lamda.ts';
import { spendable } from '../../../src/methods/rank/rank-budget.ts';
import { waterfill } from '../../../src/methods/rank/waterfill.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const vessels = (caps: readonly number[], shares: readonly number[]) =>
  caps.map((most, i) => ({ name: `${i}`, share: shares[i], cost: 1, least: 0, most }));

describe('water', () => {
  it.each([
    [[100, 400, 50], [0.5, 0.3, 0.2], 300, [100, 150, 50]],
    [[1000, 70, 500, 30], [0.1, 0.4, 0.3, 0.2], 900, [300, 70, 500, 30]],
    [[5, 5, 5], [0, 0, 0], 7, [3, 2, 2]],
  ])('under caps %j, shares %j and a budget of %i stands at its level', (caps, shares, total, expected) => {
    expect([...waterfill(vessels(caps, shares), total).values()]).toEqual(expected);
  });

  it('is never more than the budget, and leaves less than the cheapest unit that has room', () => {
    const random = new Random(1, 'water');
    for (let round = 0; round < 200; round++) {
      const all = Array.from({ length: 5 }, (_, i) => ({
        name: `${i}`,
        share: random.nextFloat(),
        cost: 1 + random.nextBelow(20),
        least: random.nextBelow(2),
        most: 2 + random.nextBelow(30),
      }));
      const floors = all.reduce((sum, { cost, least }) => sum + cost * least, 0);
      const total = floors + random.nextBelow(400);
      const units = waterfill(all, total);
      const spent = all.reduce((sum, { name, cost }) => sum + cost * units.get(name)!, 0);
      expect(spent).toBeLessThanOrEqual(total);
      for (const { name, cost, least, most } of all) {
        expect(units.get(name)).toBeGreaterThanOrEqual(least);
        expect(units.get(name)).toBeLessThanOrEqual(most);
        if (units.get(name)! < most) expect(total - spent).toBeLessThan(cost);
      }
    }
  });
});

describe('gora', () => {
  const shapes = [
    ['q', 4096, 4096, 4e-4],
    ['k', 4096, 4096, 1e-4],
    ['v', 4096, 4096, 6e-4],
    ['up', 11008, 4096, 2e-4],
    ['down', 4096, 11008, 7e-4],
  ].map(
    ([name, outFeatures, inFeatures, importance]) =>
      ({ name, outFeatures, inFeatures, importance }) as never as {
        name: string;
        outFeatures: number;
        inFeatures: number;
        importance: number;
      },
  );
  const parameters = shapes.reduce((sum, { outFeatures, inFeatures }) => sum + 8 * (outFeatures + inFeatures), 0);
  const budget = spendable({ kind: 'params', amount: parameters }, shapes);
  const spent = (ranks: ReadonlyMap<string, number>) =>
    shapes.reduce((sum, shape) => sum + budget.cost(shape) * ranks.get(shape.name)!, 0);

  it('gives the published ranks, which overspend where the floor binds, and within the budget others', () => {
    expect(parameters).toBe(438_272);
    const paper = goraRanks(shapes, budget, 'paper');
    expect([...paper.values()]).toEqual([10, 4, 16, 4, 10]);
    expect(spent(paper)).toBe(457_216);
    const best = goraRanks(shapes, budget, 'best');
    expect([...best.values()]).toEqual([10, 4, 15, 4, 9]);
    expect(spent(best)).toBe(433_920);
  });

  const [m, n] = [12, 20];
  const random = new Random(2, 'gradient');
  const data = Float32Array.from({ length: m * n }, () => random.nextFloat() - 0.5);
  const gradient = { rows: m, columns: n, data };
  const stepOf = ({ loraA, loraB }: { loraA: Float32Array; loraB: Float32Array }) => {
    const rank = loraA.length / n;
    return Float64Array.from({ length: m * n }, (_, i) => {
      let sum = 0;
      for (let k = 0; k < rank; k++) sum += loraB[Math.floor(i / n) * rank + k] * loraA[k * n + (i % n)];
      return sum;
    });
  };
  const dot = (a: ArrayLike<number>, b: ArrayLike<number>) => Array.from(a).reduce((sum, value, i) => sum + value * b[i], 0);

  it.each(['best', 'paper'] as const)('%s: starts with a step against the gradient', async (preset) => {
    const step = await gradientStep(naiveBlas(), gradient, 8, preset, { seed: 0, name: 'layer' });
    for (const rank of [1, 3, 8]) {
      const made = step.factors(rank);
      expect(made.loraA).toHaveLength(rank * n);
      const update = stepOf(made);
      expect(dot(update, data)).toBeLessThan(0);
      if (preset === 'best') expect(Math.sqrt(dot(update, update) / dot(data, data))).toBeCloseTo(1, 4);
      else {
        // The gradient on the rows of A: what is left of it there is nothing.
        const rest = update.map((value, i) => data[i] + value / Math.sqrt(n / rank));
        for (let i = 0; i < m; i++) {
          for (let k = 0; k < rank; k++) {
            const row = made.loraA.subarray(k * n, (k + 1) * n);
            expect(Math.abs(dot(rest.subarray(i * n, (i + 1) * n), row))).toBeLessThan(1e-5);
          }
        }
      }
    }
  });

  it('counts a layer by the mean of |W G|', () => {
    expect(goraImportance(Float32Array.of(1, -2, 3, 0), Float32Array.of(2, 1, -1, 5))).toBeCloseTo((2 + 2 + 3) / 4, 12);
  });
});

describe('lamda++', () => {
  it('gives more to flat spectra, in fifths (vector 9)', () => {
    const energies = { q: [0.8, 0.7, 0.6, 0.55, 0.5], v: [0.3, 0.35, 0.45, 0.4, 0.2] };
    const layers = Object.entries(energies).flatMap(([type, all]) =>
      all.map((energy, block) => ({
        name: `layers.${block}.${type}`,
        block,
        outFeatures: 64,
        inFeatures: 64,
        most: 64,
        energy: () => energy,
      })),
    );
    const budget = spendable({ kind: 'r', amount: 16 }, layers);
    const ranks = [...lamdaRanks(layers, budget, false).entries()];
    const of = (type: string) => layers.filter(({ name }) => name.endsWith(type)).map(({ name }) => new Map(ranks).get(name));
    expect(of('q')).toEqual([8, 12, 20, 20, 24]);
    expect(of('v')).toEqual([16, 16, 8, 12, 24]);
    const inverted = lamdaRanks(layers, budget, true);
    expect(inverted.get('layers.0.q')).toBe(24);
    expect([...inverted.values()].reduce((sum, rank) => sum + rank, 0)).toBe(160);
  });
});
