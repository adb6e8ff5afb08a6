/** The leading part of a QR factorization. */
import type { Matrix } from '../blas.ts';

/** Q, (rows, rank) with orthonormal columns, and R, (rank, columns). */
export interface QrFactors {
  readonly q: Float32Array;
  readonly r: Float32Array;
}

/** Columns shorter than this, in parts of what they were before the others were taken out, count as dependent. */
const DEPENDENT = 1e-6;

/**
 * The first `rank` columns of Q and rows of R of the thin factorization of a matrix: Q spans its first columns, R = Q^T M. Gram and Schmidt, twice over, in
 * fp64. A column that depends on those before it leaves a zero column in Q.
 */
export function leadingQr({ rows, columns, data }: Matrix, rank: number): QrFactors {
  const basis: Float64Array[] = [];
  for (let k = 0; k < rank; k++) {
    const column = Float64Array.from({ length: rows }, (_, i) => (k < columns ? data[i * columns + k] : 0));
    const whole = Math.hypot(...column);
    for (let pass = 0; pass < 2; pass++) {
      for (const other of basis) {
        let along = 0;
        for (let i = 0; i < rows; i++) along += column[i] * other[i];
        for (let i = 0; i < rows; i++) column[i] -= along * other[i];
      }
    }
    const length = Math.hypot(...column);
    for (let i = 0; i < rows; i++) column[i] = length > DEPENDENT * whole ? column[i] / length : 0;
    basis.push(column);
  }
  const q = new Float32Array(rows * rank);
  const r = new Float32Array(rank * columns);
  const row = new Float64Array(columns);
  for (const [k, vector] of basis.entries()) {
    row.fill(0);
    for (let i = 0; i < rows; i++) {
      q[i * rank + k] = vector[i];
      for (let j = 0; j < columns; j++) row[j] += vector[i] * data[i * columns + j];
    }
    r.set(row, k * columns);
  }
  return { q, r };
}
