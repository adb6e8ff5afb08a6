/** The closed form against the specification's vectors and a slow twin: the best of many random branches is never better. */
import { describe, expect, it } from 'vitest';
import type { Matrix } from '../../../src/compute/blas.ts';
import { svd } from '../../../src/compute/linalg/svd.ts';
import { createEngine } from '../../../src/compute/ort.ts';
import { createBlas } from '../../../src/compute/ort-blas.ts';
import { type Compensation, compensate, errorSpectrum, refit } from '../../../src/methods/rank/compensation.ts';
import { uniform } from '../../artifacts/random-linear.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const blas = naiveBlas();
const matrix = (rows: number, columns: number, values: ArrayLike<number>): Matrix => ({
  rows,
  columns,
  data: Float32Array.from(values),
});

/** Section 12, vector 4. */
const E = matrix(3, 4, [3, 1, 0, -2, -2, -4, -4, -4, -3, 3, 1, 4]);
const X = [
  [0, 1, 3, 2],
  [1, 0, 0, 3],
  [-2, 2, 1, -3],
  [-1, 3, 0, -3],
  [2, 2, 2, -2],
  [-3, 3, -3, 0],
  [-3, -1, 0, -1],
  [-1, -3, -3, -3],
];

function moments(tokens: readonly (readonly number[])[], count = tokens.length): Float64Array {
  const n = tokens[0].length;
  return Float64Array.from({ length: n * n }, (_, i) => {
    return tokens.reduce((sum, x) => sum + x[Math.floor(i / n)] * x[i % n], 0) / count;
  });
}

/** `tr((E - B A) R (E - B A)^T)`, one sum at a time. */
function lossOf(error: Matrix, gram: Float64Array, branch?: Pick<Compensation, 'rank' | 'loraA' | 'loraB'>): number {
  const { rows: m, columns: n } = error;
  const left = Float64Array.from(error.data);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      for (let k = 0; k < (branch?.rank ?? 0); k++)
        left[i * n + j] -= branch!.loraB[i * branch!.rank + k] * branch!.loraA[k * n + j];
    }
  }
  let loss = 0;
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) for (let k = 0; k < n; k++) loss += left[i * n + j] * gram[j * n + k] * left[i * n + k];
  }
  return loss;
}

/** A matrix with entries within -1..1, and moments of tokens with loud and quiet channels. */
function randomCase(m: number, n: number, seed: number) {
  const random = uniform(seed);
  const error = matrix(
    m,
    n,
    Array.from({ length: m * n }, () => 2 * random() - 1),
  );
  const tokens = Array.from({ length: 2 * n }, () => {
    const shared = random();
    return Array.from({ length: n }, (_, j) => (2 * random() - 1 + shared) * (j % 5 === 0 ? 6 : 1));
  });
  return { error, gram: moments(tokens), random };
}

describe('low-rank compensation', () => {
  it('has the spectrum, the first row and the losses of the specification', async () => {
    const gram = moments(X);
    const { values, total } = await errorSpectrum(blas, E, gram, 3);
    expect(total).toBeCloseTo(487.25, 3);
    [392.454791, 84.877699, 9.91751].forEach((value, k) => {
      expect(values[k]).toBeCloseTo(value, 3);
    });
    const branch = await compensate(blas, E, gram, 1);
    const row = Array.from(branch.loraA, (a) => a * branch.loraB[0]);
    [0.005909, 0.057926, 0.047388, 0.062711].forEach((value, j) => {
      expect(row[j]).toBeCloseTo(value, 5);
    });
    expect(lossOf(E, gram, branch)).toBeCloseTo(94.795209, 3);
    expect(lossOf(E, gram, await compensate(blas, E, gram, 1, 'zeroquant'))).toBeCloseTo(111.635004, 3);
    expect(lossOf(E, gram, await compensate(blas, E, gram, 1, 'qera-approx'))).toBeCloseTo(116.914337, 3);
  });

  it('needs no more tokens than there are: singular moments leave nothing beyond their rank', async () => {
    const gram = moments(X.slice(0, 2), 2);
    const { values } = await errorSpectrum(blas, E, gram, 3);
    expect(values[0]).toBeCloseTo(532.78442, 3);
    expect(values[1]).toBeCloseTo(0.71558, 4);
    const branch = await compensate(blas, E, gram, 2);
    expect(lossOf(E, gram, branch)).toBeCloseTo(0, 3);
    expect([...branch.loraA, ...branch.loraB].every(Number.isFinite)).toBe(true);
  });

  it.each([
    [12, 20],
    [20, 12],
    [9, 9],
  ])('of a %i x %i error takes exactly its share off the loss, and no random branch does better', async (m, n) => {
    const { error, gram, random } = randomCase(m, n, m);
    const whole = await errorSpectrum(blas, error, gram, Math.min(m, n));
    expect(whole.values.reduce((sum, value) => sum + value, 0)).toBeCloseTo(whole.total, 2);
    for (const rank of [1, 3]) {
      const branch = await compensate(blas, error, gram, rank);
      const left = whole.total - whole.values.slice(0, rank).reduce((sum, value) => sum + value, 0);
      const loss = lossOf(error, gram, branch);
      expect(loss / left).toBeCloseTo(1, 4);
      for (let trial = 0; trial < 20; trial++) {
        const nudged = (values: Float32Array) => values.map((value) => value + 0.05 * (random() - 0.5));
        expect(lossOf(error, gram, { rank, loraA: nudged(branch.loraA), loraB: nudged(branch.loraB) })).toBeGreaterThan(loss);
      }
    }
  });

  it.each([
    [8, 14],
    [14, 8],
  ])('with inputs all alike is the plain singular value decomposition, %i x %i', async (m, n) => {
    const { error, gram } = randomCase(m, n, 5);
    const { values, left, right } = svd(Float64Array.from(error.data), m, n);
    const squares = values.map((value) => value ** 2);
    for (const branch of [await compensate(blas, error, gram, 2, 'zeroquant'), await compensate(blas, error, undefined, 2)]) {
      for (let i = 0; i < m; i++) {
        for (let j = 0; j < n; j++) {
          const expected = [0, 1].reduce((sum, k) => sum + values[k] * left[k * m + i] * right[k * n + j], 0);
          const made = [0, 1].reduce((sum, k) => sum + branch.loraB[i * 2 + k] * branch.loraA[k * n + j], 0);
          expect(made).toBeCloseTo(expected, 4);
        }
      }
      for (const k of [0, 1]) expect(branch.values[k]).toBeCloseTo(squares[k], 3);
      expect(branch.total).toBeCloseTo(
        squares.reduce((sum, value) => sum + value, 0),
        3,
      );
    }
  });

  it('of fewer ranks is a part of more, with components as large in one factor as in the other', async () => {
    const { error, gram } = randomCase(10, 15, 9);
    const [two, four] = [await compensate(blas, error, gram, 2), await compensate(blas, error, gram, 4)];
    expect(four.loraA.slice(0, 2 * 15)).toEqual(two.loraA);
    const norm = (values: Iterable<number>) => Math.sqrt([...values].reduce((sum, value) => sum + value * value, 0));
    for (let k = 0; k < 4; k++) {
      const column = Array.from({ length: 10 }, (_, i) => four.loraB[i * 4 + k]);
      expect(norm(four.loraA.subarray(k * 15, (k + 1) * 15)) / norm(column)).toBeCloseTo(1, 4);
    }
  });

  it('of a large error comes within a thousandth of what is possible', async () => {
    const [m, n] = [1030, 1040];
    const random = uniform(3);
    // Twenty strong directions over noise.
    const data = new Float32Array(m * n).map(() => 0.02 * (random() - 0.5));
    for (let k = 0; k < 20; k++) {
      const [u, v] = [m, n].map((size) => Float32Array.from({ length: size }, () => (2 * random() - 1) / Math.sqrt(size)));
      for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) data[i * n + j] += (20 - k) * u[i] * v[j];
    }
    const gram = new Float64Array(n * n);
    for (let j = 0; j < n; j++) gram[j * n + j] = 1 + (j % 3);
    const error = { rows: m, columns: n, data };
    await using engine = await createEngine({ threads: 1 });
    const fast = createBlas(engine);
    const { values, total } = await errorSpectrum(fast, error, gram, 20);
    // A larger subspace contains the best one of the smaller.
    const more = await errorSpectrum(fast, error, gram, 60);
    const sum = (list: Float64Array) => list.slice(0, 20).reduce((a, b) => a + b, 0);
    expect(sum(values) / sum(more.values)).toBeGreaterThan(0.999);
    expect(sum(values)).toBeLessThanOrEqual(total);
  }, 60_000);

  it('is made the best of again when one factor has been rounded', async () => {
    const gram = moments(X);
    const loraA = Float32Array.of(0, 3, 2, 3);
    const fitted = await refit(blas, E, gram, { rank: 1, loraA });
    expect(lossOf(E, gram, { rank: 1, loraA, loraB: fitted! })).toBeCloseTo(97.541181, 3);
    const random = randomCase(9, 14, 2);
    const a = Float32Array.from({ length: 3 * 14 }, () => random.random() - 0.5);
    const b = (await refit(blas, random.error, random.gram, { rank: 3, loraA: a }))!;
    const least = lossOf(random.error, random.gram, { rank: 3, loraA: a, loraB: b });
    for (let trial = 0; trial < 20; trial++) {
      const loraB = b.map((value) => value + 0.05 * (random.random() - 0.5));
      expect(lossOf(random.error, random.gram, { rank: 3, loraA: a, loraB })).toBeGreaterThan(least);
    }
  });

  it('does not need rows that are nothing or the same', async () => {
    const gram = moments(X);
    const fitted = await refit(blas, E, gram, { rank: 3, loraA: Float32Array.of(0, 3, 2, 3, 0, 0, 0, 0, 0, 3, 2, 3) });
    expect(fitted!.every(Number.isFinite)).toBe(true);
    const loraA = Float32Array.of(0, 3, 2, 3, 0, 0, 0, 0, 0, 3, 2, 3);
    expect(lossOf(E, gram, { rank: 3, loraA, loraB: fitted! })).toBeCloseTo(97.541181, 2);
  });

  it('of no error at all is no branch', async () => {
    const nothing = await compensate(blas, matrix(3, 4, new Array(12).fill(0)), moments(X), 2);
    expect([nothing.rank, nothing.total, nothing.loraA.length]).toEqual([0, 0, 0]);
  });
});
