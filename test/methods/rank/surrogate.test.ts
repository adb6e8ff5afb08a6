/** Calibration surrogates (adapters.md 5.5): scores against differences of the loss, and choices against definitions. */
import { describe, expect, it } from 'vitest';
import { Random } from '../../../src/compute/random.ts';
import { keepBest } from '../../../src/methods/rank/keep-best.ts';
import { spendable } from '../../../src/methods/rank/rank-budget.ts';
import { adalora } from '../../../src/methods/rank/surrogate/adalora.ts';
import {
  componentGradient,
  componentsOf,
  type FrozenComponents,
  factorsOf,
  gradientComponents,
} from '../../../src/methods/rank/surrogate/components.ts';
import { increlora, triadaptlora } from '../../../src/methods/rank/surrogate/growth.ts';
import { type CandidateLayer, gini, type Surrogate } from '../../../src/methods/rank/surrogate/surrogate.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const blas = naiveBlas();
const [M, N] = [7, 5];
const random = new Random(3, 'surrogate');
const draw = (length: number) => Float32Array.from({ length }, () => 2 * random.nextFloat() - 1);
const matrix = (data: Float32Array, rows = M, columns = N) => ({ rows, columns, data });

/** Sum of values_k u_k a_k, entry by entry. */
function updateOf({ values, left, right }: FrozenComponents, kept: readonly number[], m = M, n = N): Float64Array {
  const update = new Float64Array(m * n);
  for (const k of kept)
    for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) update[i * n + j] += values[k] * left[k * m + i] * right[k * n + j];
  return update;
}

const inner = (a: ArrayLike<number>, b: ArrayLike<number>) => Array.from(a).reduce((sum, value, i) => sum + value * b[i], 0);

describe('components of a gradient', () => {
  it('add up to the step against it, strongest first, with directions of length 1', async () => {
    const gradient = draw(M * N);
    const { components, norm } = await gradientComponents(blas, matrix(gradient), 10);
    expect(components.count).toBe(N);
    const update = updateOf(components, [0, 1, 2, 3, 4]);
    for (const [i, value] of gradient.entries()) expect(update[i] + value).toBeCloseTo(0, 5);
    expect(norm).toBeCloseTo(Math.sqrt(inner(gradient, gradient)), 5);
    for (let k = 0; k < N; k++) {
      const u = components.left.subarray(k * M, (k + 1) * M);
      expect(inner(u, u)).toBeCloseTo(1, 5);
      if (k > 0) expect(components.values[k]).toBeLessThanOrEqual(components.values[k - 1]);
    }
    // Along a singular direction the loss falls by the square of its value.
    const { gains, core } = await componentGradient(blas, components, matrix(gradient));
    for (let k = 0; k < N; k++) expect(gains[k]).toBeCloseTo(components.values[k] ** 2, 4);
    expect(core[1]).toBeCloseTo(0, 5);
  });

  it('come apart again as factors of those that are kept', async () => {
    const { components } = await gradientComponents(blas, matrix(draw(M * N)), 4);
    const { loraA, loraB } = factorsOf(components, [1, 3], { inFeatures: N, outFeatures: M }, 3);
    const expected = updateOf(components, [1, 3]);
    for (let i = 0; i < M; i++)
      for (let j = 0; j < N; j++) {
        const sum = loraB[i * 2] * loraA[j] + loraB[i * 2 + 1] * loraA[N + j];
        expect(sum).toBeCloseTo(3 * expected[i * N + j], 5);
      }
  });
});

/** A layer with two components that are not the gradient's, as those of an error are. */
function candidate(name: string, m = M, n = N): CandidateLayer {
  const components = componentsOf(2, draw(2 * n), draw(m * 2), 1);
  return { name, outFeatures: m, inFeatures: n, components, mean: { core: new Float64Array(4), gains: new Float64Array(2) } };
}

async function observed(surrogate: Surrogate, layers: readonly CandidateLayer[], windows: readonly Float32Array[][]) {
  for (const [i, layer] of layers.entries()) {
    for (const gradients of windows) await surrogate.observe?.(layer, gradients[i], blas);
    surrogate.finish?.(layer);
  }
  return surrogate.choose(layers);
}

/** `|w dL/dw|` of one entry of what a layer is made of, dL/dw by a central difference of `L = <G, update>`. */
function sensitivity(
  components: FrozenComponents,
  part: 'values' | 'left' | 'right',
  at: number,
  gradient: Float32Array,
): number {
  const step = 1e-2;
  const loss = (shift: number) => {
    const moved = { ...components, [part]: Float64Array.from(components[part]) } as never as FrozenComponents;
    (moved[part] as Float64Array)[at] += shift;
    return inner(updateOf(moved, [0, 1]), gradient);
  };
  return Math.abs((components[part][at] * (loss(step) - loss(-step))) / (2 * step));
}

describe('adalora without training', () => {
  const layers = [candidate('a'), candidate('b')];
  const windows = Array.from({ length: 10 }, () => layers.map(() => draw(M * N)));
  const budget = spendable({ kind: 'r', amount: 1 }, layers);

  /** Score of a component from the sensitivity of every entry in every window, by a rule that makes one number of these. */
  const scored = (layer: number, k: number, seen: number, rule: (series: readonly number[]) => number) => {
    const { components } = layers[layer];
    const of = (part: 'values' | 'left' | 'right', at: number) =>
      rule(windows.slice(0, seen).map((gradients) => sensitivity(components, part, at, gradients[layer])));
    const mean = (part: 'left' | 'right', size: number) =>
      Array.from({ length: size }, (_, i) => of(part, k * size + i)).reduce((sum, value) => sum + value, 0) / size;
    return of('values', k) + mean('right', N) + mean('left', M);
  };

  it('best scores by the mean sensitivity and how far windows are from it', async () => {
    const { scores, kept } = await observed(adalora({ budget, preset: 'best' }, layers), layers, windows);
    const rule = (series: readonly number[]) => {
      const mean = series.reduce((sum, value) => sum + value, 0) / series.length;
      return (mean * series.reduce((sum, value) => sum + Math.abs(value - mean), 0)) / series.length;
    };
    const all: [string, number, number][] = [];
    for (const [i, { name }] of layers.entries())
      for (let k = 0; k < 2; k++) {
        const expected = scored(i, k, windows.length, rule);
        expect(Math.abs(scores.get(name)![k] - expected)).toBeLessThan(1e-4 * expected);
        all.push([name, k, expected]);
      }
    const best = all.toSorted((a, b) => b[2] - a[2]).slice(0, 2);
    for (const [name, k] of best) expect(kept.get(name)).toContain(k);
    expect([...kept.values()].flat()).toHaveLength(2);
  });

  it('paper scores by moving averages, and cuts by the cubic law with windows for steps', async () => {
    const { scores, kept, trace } = await observed(adalora({ budget, preset: 'paper' }, layers), layers, windows);
    const rule = (series: readonly number[]) => {
      let [mean, deviation] = [0, 0];
      for (const value of series) {
        mean = 0.85 * mean + 0.15 * value;
        deviation = 0.85 * deviation + 0.15 * Math.abs(value - mean);
      }
      return mean * deviation;
    };
    for (const [i, { name }] of layers.entries())
      for (let k = 0; k < 2; k++) {
        const expected = scored(i, k, windows.length, rule);
        expect(Math.abs(scores.get(name)![k] - expected)).toBeLessThan(1e-4 * expected);
      }
    // What stays was chosen when the last cut came, after 6 of 10 windows.
    const at6 = layers.flatMap(({ name }, i) => [0, 1].map((k) => ({ name, k, value: scored(i, k, 6, rule) })));
    for (const { name, k } of at6.toSorted((a, b) => b.value - a.value).slice(0, 2)) expect(kept.get(name)).toContain(k);
    expect(trace.at(-1)!.totalRank).toBe(2);
    expect(trace.every(({ step }) => step > 1 && step <= 6)).toBe(true);
  });

  it('finds the layers that a noisy target is in', async () => {
    const [m, n] = [24, 32];
    const ranks = [0, 1, 2, 3, 4, 6];
    const shapes = ranks.map((rank) => ({ name: `rank ${rank}`, outFeatures: m, inFeatures: n }));
    const targets = ranks.map((rank) => {
      const target = new Float64Array(m * n);
      for (let k = 0; k < rank; k++) {
        const [u, v] = [draw(m), draw(n)];
        const size = 2 / Math.sqrt(inner(u, u) * inner(v, v));
        for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) target[i * n + j] += size * u[i] * v[j];
      }
      return target;
    });
    const gradients = Array.from({ length: 16 }, () =>
      targets.map((target) => Float32Array.from(target, (value) => -value + 0.3 * (2 * random.nextFloat() - 1))),
    );
    const planted = spendable({ kind: 'params', amount: 16 * (m + n) }, shapes);
    const surrogate = adalora({ budget: planted, preset: 'best' }, shapes);
    const candidates: CandidateLayer[] = [];
    for (const [i, shape] of shapes.entries()) {
      const mean = new Float32Array(m * n);
      for (const own of gradients) for (let at = 0; at < mean.length; at++) mean[at] += own[i][at] / gradients.length;
      const { components } = await gradientComponents(blas, matrix(mean, m, n), surrogate.mostOf(shape));
      candidates.push({ ...shape, components, mean: await componentGradient(blas, components, matrix(mean, m, n)) });
    }
    const { kept } = await observed(surrogate, candidates, gradients);
    expect([...kept.values()].map(({ length }) => length)).toEqual(ranks);
    for (const make of [increlora, triadaptlora]) {
      const grown = make({ budget: planted, preset: 'best' }, shapes).choose(candidates);
      // One rank at a time by the gain of the next: the largest gains of all.
      expect([...grown.kept.values()].reduce((sum, { length }) => sum + length, 0)).toBe(16);
      expect(grown.kept.get('rank 0')).toEqual([]);
      expect(grown.kept.get('rank 6')!.length).toBeGreaterThanOrEqual(4);
      expect(grown.trace.at(-1)!.totalRank).toBe(16);
    }
  });
});

describe('growth without training', () => {
  const layers = [candidate('a'), candidate('b', 6, 4), candidate('c')].map((layer, i) => ({
    ...layer,
    mean: { core: Float64Array.of(3 + i, 1, 2, 5), gains: Float64Array.of(4 - i, 1 + i) },
  }));

  it('paper, increlora: by what the loss depends on in what a layer has, ties and all', async () => {
    const windows = Array.from({ length: 5 }, () => layers.map(({ outFeatures, inFeatures }) => draw(outFeatures * inFeatures)));
    const budget = spendable({ kind: 'r', amount: 4 / 3 }, layers);
    const { kept, scores } = await observed(increlora({ budget, preset: 'paper' }, layers), layers, windows);
    const expected = layers.map(({ components, outFeatures: m, inFeatures: n }, layer) => {
      const series = windows.map((own) =>
        inner(
          updateOf(components, [0], m, n).map((value, i) => Math.abs(value * own[layer][i])),
          new Float64Array(m * n).fill(1 / Math.sqrt(m * n)),
        ),
      );
      const mean = series.reduce((sum, value) => sum + value, 0) / series.length;
      return (mean * series.reduce((sum, value) => sum + Math.abs(value - mean), 0)) / series.length;
    });
    for (const [i, { name }] of layers.entries())
      expect(Math.abs(scores.get(name)![0] - expected[i])).toBeLessThan(1e-4 * expected[i]);
    const best = expected.indexOf(Math.max(...expected));
    // From rank 1 each, one layer in six at a time: the best gets the fourth rank.
    expect([...kept.values()].map(({ length }) => length)).toEqual([0, 1, 2].map((i) => (i === best ? 2 : 1)));
  });

  it('paper, increlora: no more layers at once than there are ranks left, and full layers do not end it', async () => {
    // Seven layers of different scores: two of them grow at a time, and one where one rank is left.
    const seven = Array.from({ length: 7 }, (_, i) => candidate(`layer ${i}`));
    const windows = Array.from({ length: 5 }, () => seven.map(({ outFeatures, inFeatures }) => draw(outFeatures * inFeatures)));
    const ranks = async (total: number) => {
      const budget = spendable({ kind: 'r', amount: total / 7 }, seven);
      const { kept } = await observed(increlora({ budget, preset: 'paper' }, seven), seven, windows);
      return [...kept.values()].reduce((sum, { length }) => sum + length, 0);
    };
    expect(await ranks(8)).toBe(8);
    // Two components each are all there are: the best two are full after the first round.
    expect(await ranks(13)).toBe(13);
  });

  it('start with no more than the budget, and cut from no less', () => {
    const budget = spendable({ kind: 'r', amount: 4 }, layers);
    expect(() => adalora({ budget, preset: 'paper', startRank: 2 }, layers)).toThrow(/adalora starts with 2, which it only cuts/);
    for (const [make, name] of [
      [increlora, 'increlora'],
      [triadaptlora, 'triadaptlora'],
    ] as const)
      for (const preset of ['best', 'paper'] as const)
        expect(() => make({ budget, preset, startRank: 16 }, layers)).toThrow(
          `--budget: allows 4.00 ranks a layer, and ${name} starts with 16, to which it only adds`,
        );
  });

  it('paper, triadaptlora: by the norm of the core over its blocks', () => {
    const budget = spendable({ kind: 'r', amount: 4 / 3 }, layers);
    const { kept, scores } = triadaptlora({ budget, preset: 'paper' }, layers).choose(layers);
    expect(Array.from(scores.get('a')!)).toEqual([3, Math.sqrt(9 + 1 + 4 + 25) / 2]);
    expect(kept.get('c')).toEqual([0, 1]);
    expect(kept.get('a')).toEqual([0]);
  });

  it('best: the next component that changes most for its cost, never more than the budget, never above the largest rank', () => {
    const budget = spendable({ kind: 'params', amount: 35 }, layers);
    for (const make of [increlora, triadaptlora]) {
      const { kept } = make({ budget, preset: 'best', most: 1 }, layers).choose(layers);
      expect([...kept.values()].map(({ length }) => length)).toEqual([1, 1, 1]);
      const whole = make({ budget, preset: 'best' }, layers).choose(layers);
      const spent = layers.reduce((sum, layer) => sum + whole.kept.get(layer.name)!.length * budget.cost(layer), 0);
      expect(spent).toBeLessThanOrEqual(35);
    }
  });
});

describe('components against each other', () => {
  it('are kept by value over cost; one that does not fit is passed over; ties go by name', () => {
    const [a, b] = [{ name: 'a' }, { name: 'b' }];
    const all = [
      { layer: b, k: 0, cost: 2, value: 4 },
      { layer: a, k: 1, cost: 1, value: 2 },
      { layer: a, k: 0, cost: 1, value: 1 },
      { layer: b, k: 1, cost: 2, value: 3 },
    ];
    expect([...keepBest(all, 4)]).toEqual([
      ['b', [0]],
      ['a', [0, 1]],
    ]);
    expect(keepBest(all, 1).get('a')).toEqual([1]);
  });

  it('are concentrated as their Gini coefficient says', () => {
    expect(gini([1, 1, 1, 1])).toBe(0);
    expect(gini([0, 0, 0, 4])).toBe(0.75);
    expect(gini([3, 1])).toBe(0.25);
    expect(gini([0, 0])).toBe(0);
  });
});
