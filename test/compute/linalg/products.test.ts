/** Products of float64 matrices in blocks, against three plain loops, and what is solved with them. */
import { describe, expect, it, test } from 'vitest';
import { buildKernels } from '../../../scripts/build-kernels.mjs';
import { NotPositiveDefiniteError } from '../../../src/compute/blas.ts';
import { DENSE_WASM } from '../../../src/compute/kernels/dense.generated.ts';
import {
  addProduct,
  gramOfColumns,
  gramOfRows,
  multiply,
  multiplyTransposed,
  strided,
  transposed,
  turned,
} from '../../../src/compute/linalg/products.ts';
import { solveRows } from '../../../src/compute/linalg/solve.ts';
import { randomSource, randomValues } from '../../support/random.ts';

/** Sums of a few hundred products of numbers below 1, in another order. */
const TOLERANCE = 1e-12;

const random = (count: number, seed: number) => Float64Array.from(randomValues(randomSource(seed), count, 1));

function plain(a: Float64Array, b: Float64Array, m: number, k: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) for (let p = 0; p < k; p++) out[i * n + j] += a[i * k + p] * b[p * n + j];
  return out;
}

function expectClose(a: Float64Array, b: Float64Array): void {
  expect(a.length).toBe(b.length);
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i] - b[i]));
  expect(most).toBeLessThan(TOLERANCE);
}

/** Around the sizes of blocks and strips. */
describe.each([
  [1, 1, 1],
  [3, 5, 2],
  [17, 16, 16],
  [128, 256, 128],
  [129, 257, 130],
  [5, 600, 131],
  [260, 3, 5],
])('(%i, %i) times (.., %i)', (m, k, n) => {
  const [a, b] = [random(m * k, 1), random(k * n, 2)];
  const expected = plain(a, b, m, k, n);

  it('is what three loops make of it, whichever side is turned', () => {
    expectClose(multiply(a, b, m, k, n), expected);
    expectClose(multiplyTransposed(transposed(a, m, k), b, m, k, n), expected);
    const out = new Float64Array(m * n);
    addProduct(strided(a, k), turned(strided(transposed(b, k, n), k)), strided(out, n), m, k, n);
    expectClose(out, expected);
  });

  it('is added to a part of another matrix, or taken from it', () => {
    const whole = random((m + 2) * (n + 3), 3);
    const out = whole.slice();
    const part = { data: out, start: n + 3 + 1, down: n + 3, across: 1 };
    addProduct(strided(a, k), strided(b, n), part, m, k, n, { factor: -1 });
    const wanted = whole.slice();
    for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) wanted[(i + 1) * (n + 3) + j + 1] -= expected[i * n + j];
    expectClose(out, wanted);
  });

  it('and its Gram matrices are symmetric to the last bit', () => {
    for (const [gram, wanted, size] of [
      [gramOfRows(a, m, k), plain(a, transposed(a, m, k), m, k, m), m],
      [gramOfColumns(a, m, k), plain(transposed(a, m, k), a, k, m, k), k],
    ] as const) {
      expectClose(gram, wanted);
      expect(transposed(gram, size, size)).toEqual(gram);
    }
  });
});

test.each([1, 7, 256, 300, 520])('rows are divided by a positive matrix of size %i', async (n) => {
  const rows = 5;
  const root = random(n * n, n);
  const matrix = gramOfRows(root, n, n);
  for (let i = 0; i < n; i++) matrix[i * n + i] += n;
  const x = random(rows * n, n + 1);
  const b = multiply(x, matrix, rows, n, n);
  await solveRows(b, rows, matrix, n);
  expectClose(b, x);
});

test('a matrix that is not positive is refused', async () => {
  await expect(solveRows(new Float64Array(2), 1, Float64Array.of(1, 2, 2, 1), 2)).rejects.toThrow(NotPositiveDefiniteError);
});

test('the committed module is what its source builds to', async () => {
  expect(DENSE_WASM).toBe(Buffer.from(await buildKernels('dense')).toString('base64'));
});
