/** Eigenvectors against Jacobi's method, which turns one pair of rows at a time, on the matrices that divide and conquer finds hard. */
import { describe, expect, it } from 'vitest';
import { eigh } from '../../../src/compute/linalg/eigh.ts';
import { gramOfRows, multiply } from '../../../src/compute/linalg/products.ts';
import { rankOneUpdate } from '../../../src/compute/linalg/secular.ts';
import { randomSource, randomValues } from '../../support/random.ts';

/** Of the largest eigenvalue; of a length of 1. Roundings of float64, of hundreds of turns in Jacobi's values. */
const TOLERANCE = 1e-13;

const random = (count: number, seed: number) => Float64Array.from(randomValues(randomSource(seed), count, 1));
const symmetric = (n: number, element: (i: number, j: number) => number) =>
  Float64Array.from({ length: n * n }, (_, at) => {
    const [i, j] = [Math.floor(at / n), at % n];
    return element(Math.max(i, j), Math.min(i, j));
  });

/** Eigenvalues, descending. */
function jacobi(matrix: Float64Array, n: number): number[] {
  const a = matrix.slice();
  const scale = matrix.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  for (let sweep = 0; sweep < 30; sweep++) {
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        if (Math.abs(a[p * n + q]) <= 1e-18 * scale) continue;
        const theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
        const t = (theta >= 0 ? 1 : -1) / (Math.abs(theta) + Math.hypot(theta, 1));
        const c = 1 / Math.hypot(t, 1);
        const s = t * c;
        for (let k = 0; k < n; k++) {
          const [x, y] = [a[k * n + p], a[k * n + q]];
          a[k * n + p] = c * x - s * y;
          a[k * n + q] = s * x + c * y;
        }
        for (let k = 0; k < n; k++) {
          const [x, y] = [a[p * n + k], a[q * n + k]];
          a[p * n + k] = c * x - s * y;
          a[q * n + k] = s * x + c * y;
        }
      }
    }
  }
  return Array.from({ length: n }, (_, i) => a[i * n + i]).sort((x, y) => y - x);
}

const noise = random(200 * 200, 5);
const MATRICES: readonly [string, number, Float64Array][] = [
  ['random numbers', 100, symmetric(100, (i, j) => noise[i * 100 + j])],
  ['one more than a small part', 33, symmetric(33, (i, j) => noise[i * 33 + j])],
  ['all ones: one eigenvalue that is not 0', 100, symmetric(100, () => 1)],
  ['zeros', 70, symmetric(70, () => 0)],
  ['a diagonal with equal values', 90, symmetric(90, (i, j) => (i === j ? i % 7 : 0))],
  [
    'pairs of nearly equal eigenvalues (Wilkinson)',
    101,
    symmetric(101, (i, j) => (i === j ? Math.abs(i - 50) : i - j === 1 ? 1 : 0)),
  ],
  ['a second difference', 130, symmetric(130, (i, j) => (i === j ? 2 : i - j === 1 ? -1 : 0))],
  ['rank 20', 120, gramOfRows(random(120 * 20, 3), 120, 20)],
  [
    'rows over twelve orders of magnitude',
    100,
    gramOfRows(
      random(100 * 100, 4).map((x, i) => x * 10 ** (-0.06 * (i % 100))),
      100,
      100,
    ),
  ],
  ['numbers whose squares are none', 80, symmetric(80, (i, j) => 1e-200 * noise[i * 80 + j])],
  ['numbers whose squares are infinite', 80, symmetric(80, (i, j) => 1e200 * noise[i * 80 + j])],
  ['glued blocks', 128, symmetric(128, (i, j) => (i === j ? (i % 32) / 8 : i - j === 1 ? (i % 32 === 0 ? 1e-9 : 1) : 0))],
];

describe.each(MATRICES)('of %s', (_, n, matrix) => {
  it("has Jacobi's values, and vectors that are orthogonal and stay what they are", () => {
    const { values, vectors } = eigh(matrix, n);
    const expected = jacobi(matrix, n);
    const scale = Math.max(Math.abs(expected[0]), Math.abs(expected[n - 1])) || 1;
    const gram = gramOfRows(vectors, n, n);
    const images = multiply(
      vectors,
      matrix.map((value) => value / scale),
      n,
      n,
      n,
    );
    let [value, angle, residual] = [0, 0, 0];
    for (let i = 0; i < n; i++) {
      value = Math.max(value, Math.abs(values[i] - expected[i]) / scale);
      for (let j = 0; j < n; j++) {
        angle = Math.max(angle, Math.abs(gram[i * n + j] - (i === j ? 1 : 0)));
        residual = Math.max(residual, Math.abs(images[i * n + j] - (values[i] / scale) * vectors[i * n + j]));
      }
    }
    for (const error of [value, angle, residual]) expect(error).toBeLessThan(TOLERANCE);
  });
});

it('as many vectors as are asked for, by what the values are', () => {
  const n = 60;
  const matrix = symmetric(n, (i, j) => noise[i * n + j]);
  const all = eigh(matrix, n);
  const some = eigh(matrix, n, (values) => values.filter((value) => value > 0).length);
  expect(some.values).toEqual(all.values);
  const count = some.vectors.length / n;
  expect(all.values[count - 1]).toBeGreaterThan(0);
  expect(all.values[count]).toBeLessThanOrEqual(0);
  for (let i = 0; i < some.vectors.length; i++) expect(Math.abs(some.vectors[i] - all.vectors[i])).toBeLessThan(TOLERANCE);
});

it('a diagonal plus rank one, with values as near as numbers get, has orthogonal vectors', () => {
  const k = 40;
  const d = Float64Array.from({ length: k }, (_, i) => Math.floor(i / 4) + (i % 4) * 4e-15);
  const z = random(k, 9).map((value) => value + Math.sign(value) * 0.1);
  const { values, vectors } = rankOneUpdate(d, z, 0.5);
  for (let i = 0; i < k; i++) {
    expect(values[i]).toBeGreaterThanOrEqual(d[i]);
    if (i + 1 < k) expect(values[i]).toBeLessThanOrEqual(d[i + 1]);
  }
  const gram = gramOfRows(vectors, k, k);
  for (let i = 0; i < k; i++)
    for (let j = 0; j < k; j++) expect(Math.abs(gram[i * k + j] - (i === j ? 1 : 0))).toBeLessThan(TOLERANCE);
});
