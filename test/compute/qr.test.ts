/** The leading part of a QR factorization against what defines it. */
import { expect, it } from 'vitest';
import { leadingQr } from '../../src/compute/linalg/qr.ts';
import { normal } from '../../src/methods/rank/training/initial.ts';

it.each([
  [6, 4],
  [4, 6],
])('of a %i x %i matrix: all of it is the matrix, and Q has orthonormal columns', (rows, columns) => {
  const data = normal(rows * columns, 1, 1, 'matrix');
  const rank = Math.min(rows, columns);
  const { q, r } = leadingQr({ rows, columns, data }, rank);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      let sum = 0;
      for (let k = 0; k < rank; k++) sum += q[i * rank + k] * r[k * columns + j];
      expect(Math.abs(sum - data[i * columns + j])).toBeLessThan(1e-5);
    }
  }
  for (let k = 0; k < rank; k++) {
    for (let l = 0; l <= k; l++) {
      let sum = 0;
      for (let i = 0; i < rows; i++) sum += q[i * rank + k] * q[i * rank + l];
      expect(Math.abs(sum - (k === l ? 1 : 0))).toBeLessThan(1e-6);
    }
    // R is upper triangular.
    for (let j = 0; j < k; j++) expect(Math.abs(r[k * columns + j])).toBeLessThan(1e-5);
  }
  const leading = leadingQr({ rows, columns, data }, 2);
  for (let i = 0; i < rows; i++) for (let k = 0; k < 2; k++) expect(leading.q[i * 2 + k]).toBe(q[i * rank + k]);
  expect(leading.r).toEqual(r.slice(0, 2 * columns));
});

it('of columns that depend on one another leaves zeros, and no noise', () => {
  const { q, r } = leadingQr({ rows: 3, columns: 2, data: Float32Array.of(1, 2, 1, 2, 0, 0) }, 2);
  expect([...q].filter((_, i) => i % 2 === 1)).toEqual([0, 0, 0]);
  expect([...r.slice(2)]).toEqual([0, 0]);
});
