/**
 * Eigenvalues and eigenvectors of a symmetric matrix in float64: reflections to tridiagonal form, divide and conquer, and back. All but the first third is
 * products of matrices.
 */
import { diagonalize } from './divide.ts';
import { tridiagonalize, turnBack } from './tridiagonal.ts';

export interface Eigh {
  /** Descending, (n). */
  readonly values: Float64Array;
  /** Row i is the eigenvector of `values[i]`, of length 1; (wanted, n). */
  readonly vectors: Float64Array;
}

/**
 * `matrix` (n, n) symmetric, not modified. Exact to about 1e-15 of the largest eigenvalue; deterministic. About 5 n^3 flops on one thread.
 * @param wanted how many eigenvectors are wanted, of the largest values; all
 * Throws Error when it does not converge, which no finite matrix is known to do.
 */
export function eigh(matrix: Float64Array, n: number, wanted: (values: Float64Array) => number = () => n): Eigh {
  // Squares of what is very small or large must not leave the numbers there are; a power of two changes no digit.
  let largest = 0;
  for (const value of matrix) largest = Math.max(largest, Math.abs(value));
  const scale = largest > 0 && Number.isFinite(largest) ? 2 ** Math.floor(Math.log2(largest)) : 1;
  const tridiagonal = tridiagonalize(matrix, n, scale);
  const { values: ascending, vectors: rows } = diagonalize(tridiagonal.diagonal, tridiagonal.beside);
  const values = Float64Array.from(ascending, (_, i) => scale * ascending[n - 1 - i]);
  const count = wanted(values);
  const vectors = new Float64Array(count * n);
  for (let i = 0; i < count; i++) vectors.set(rows.subarray((n - 1 - i) * n, (n - i) * n), i * n);
  turnBack(tridiagonal, vectors, count);
  return { values, vectors };
}
