/** Eigenvectors, singular values and orthogonal factors: what they must satisfy, on matrices of every kind. */
import { describe, expect, it } from 'vitest';
import { eigh } from '../../../src/compute/linalg/eigh.ts';
import { gramOfRows, multiply, transposed } from '../../../src/compute/linalg/products.ts';
import { polar, svd } from '../../../src/compute/linalg/svd.ts';
import { randomSource, randomValues } from '../../support/random.ts';

/** Sums of a few hundred products in float64. */
const TOLERANCE = 1e-11;

const random = (count: number, seed: number) => Float64Array.from(randomValues(randomSource(seed), count, 1));
const worst = (a: ArrayLike<number>, b: ArrayLike<number>) => {
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i] - b[i]));
  return most;
};
const identity = (n: number) => Float64Array.from({ length: n * n }, (_, i) => (i % (n + 1) === 0 ? 1 : 0));

describe.each([1, 2, 3, 7, 40, 130])('a symmetric matrix of size %i', (n) => {
  const a = random(n * n, n);
  const matrix = a.map((value, i) => (value + a[(i % n) * n + Math.floor(i / n)]) / 2);

  it('is made of its eigenvectors again, which are orthogonal and in descending order', () => {
    const { values, vectors } = eigh(matrix, n);
    const scaled = vectors.map((value, i) => value * values[Math.floor(i / n)]);
    expect(worst(multiply(transposed(vectors, n, n), scaled, n, n, n), matrix)).toBeLessThan(TOLERANCE);
    expect(worst(gramOfRows(vectors, n, n), identity(n))).toBeLessThan(TOLERANCE);
    for (let i = 1; i < n; i++) expect(values[i]).toBeLessThanOrEqual(values[i - 1]);
  });
});

it('equal eigenvalues, zeros and a diagonal are no trouble', () => {
  expect([...eigh(identity(4), 4).values]).toEqual([1, 1, 1, 1]);
  expect([...eigh(new Float64Array(9), 3).values]).toEqual([0, 0, 0]);
  expect([...eigh(Float64Array.of(2, 0, 0, 0, -1, 0, 0, 0, 5), 3).values]).toEqual([5, 2, -1]);
});

describe.each([
  [1, 1],
  [5, 3],
  [3, 5],
  [40, 17],
  [17, 90],
])('a matrix of %i x %i', (m, n) => {
  const a = random(m * n, m * 100 + n);

  it('is the sum of its singular directions', () => {
    const { values, left, right } = svd(a, m, n);
    const rank = values.length;
    expect(rank).toBe(Math.min(m, n));
    const scaled = right.map((value, i) => value * values[Math.floor(i / n)]);
    expect(worst(multiply(transposed(left, rank, m), scaled, m, rank, n), a)).toBeLessThan(TOLERANCE);
    expect(worst(gramOfRows(left, rank, m), identity(rank))).toBeLessThan(TOLERANCE);
    expect(worst(gramOfRows(right, rank, n), identity(rank))).toBeLessThan(1e-9);
  });

  it('has an orthogonal factor with its singular vectors and values of 1', () => {
    const { values, left, right } = svd(a, m, n);
    const whole = polar(a, m, n);
    expect(worst(whole.factor, multiply(transposed(left, values.length, m), right, m, values.length, n))).toBeLessThan(1e-9);
    expect(worst(whole.values, values)).toBeLessThan(TOLERANCE);
  });
});

it('directions below the guard are dropped: a product of rank 2 has two, even beside a millionth of noise', () => {
  const [m, n] = [12, 9];
  const product = multiply(random(m * 2, 1), random(2 * n, 2), m, 2, n);
  expect(svd(product, m, n).values).toHaveLength(2);
  const noise = random(m * n, 3);
  expect(
    svd(
      product.map((value, i) => value + 1e-8 * noise[i]),
      m,
      n,
    ).values,
  ).toHaveLength(2);
  expect(svd(new Float64Array(m * n), m, n).values).toHaveLength(0);
});

it('small directions above the guard keep their vectors to a part in ten thousand', () => {
  const n = 20;
  const q = svd(random(n * n, 4), n, n);
  const values = Float64Array.from({ length: n }, (_, j) => 10 ** (-5 * (j / (n - 1))));
  const scaled = q.right.map((value, i) => value * values[Math.floor(i / n)]);
  const a = multiply(transposed(q.left, n, n), scaled, n, n, n);
  const found = svd(a, n, n);
  for (const [j, value] of values.entries()) expect(found.values[j] / value).toBeCloseTo(1, 4);
  expect(worst(gramOfRows(found.right, n, n), identity(n))).toBeLessThan(1e-4);
});
