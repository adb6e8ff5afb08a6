/** Cholesky factorization in fp64: small blocks in plain loops, the cubic part as products on an engine. */
import { NotPositiveDefiniteError } from '../blas.ts';
import type { BlockColumns, Product64 } from './block-columns.ts';
import { invertLower } from './triangular.ts';

/**
 * Replaces the lower triangle of a symmetric (n, n) matrix, row-major, by L with `L L^T` equal to it, and its strict upper triangle by zeros.
 * Throws NotPositiveDefiniteError; `firstPivot` is the number of its first pivot in messages.
 */
export function choleskyLower(matrix: Float64Array, n: number, firstPivot = 0): void {
  for (let i = 0; i < n; i++) {
    const rowI = i * n;
    for (let j = 0; j < i; j++) {
      const rowJ = j * n;
      const sum = matrix[rowI + j] - dot(matrix, rowI, rowJ, j);
      matrix[rowI + j] = sum / matrix[rowJ + j];
    }
    const pivot = matrix[rowI + i] - dot(matrix, rowI, rowI, i);
    // Written so that NaN fails too.
    if (!(pivot > 0)) throw new NotPositiveDefiniteError(firstPivot + i, pivot);
    matrix[rowI + i] = Math.sqrt(pivot);
    matrix.fill(0, rowI + i + 1, rowI + n);
  }
}

/** Four sums at once: one addition waits for the previous one otherwise. */
function dot(matrix: Float64Array, a: number, b: number, length: number): number {
  let s0 = 0;
  let s1 = 0;
  let s2 = 0;
  let s3 = 0;
  let k = 0;
  for (; k + 3 < length; k += 4) {
    s0 += matrix[a + k] * matrix[b + k];
    s1 += matrix[a + k + 1] * matrix[b + k + 1];
    s2 += matrix[a + k + 2] * matrix[b + k + 2];
    s3 += matrix[a + k + 3] * matrix[b + k + 3];
  }
  for (; k < length; k++) s0 += matrix[a + k] * matrix[b + k];
  return s0 + s1 + (s2 + s3);
}

/**
 * The same for a matrix in block columns, in place, left-looking. Returns the inverses of the diagonal blocks of L, which the
 * triangular inverse needs again. Beyond the matrix it takes one block column of memory.
 */
export async function choleskyBlocked(matrix: BlockColumns, product: Product64): Promise<Float64Array[]> {
  const inverses: Float64Array[] = [];
  let scratch: Float64Array | undefined;
  for (let j = 0; j < matrix.count; j++) {
    const columns = matrix.width(j);
    for (let k = 0; k < j; k++) {
      const [a, b] = [matrix.from(k, j), matrix.tile(k, j)];
      const c = matrix.columns[j];
      await product({ a, b, c, rows: matrix.height(j), inner: matrix.width(k), columns, transposeB: true, subtract: true });
    }
    const diagonal = matrix.tile(j, j);
    choleskyLower(diagonal, columns, matrix.start(j));
    const inverse = invertLower(diagonal, columns);
    inverses.push(inverse);
    if (j + 1 === matrix.count) break;
    // L21 = A21 L11^-T: a product with the inverse of a small, well scaled block instead of a substitution row by row.
    const below = matrix.from(j, j + 1);
    scratch ??= new Float64Array(below.length);
    const solved = scratch.subarray(0, below.length);
    const rows = matrix.height(j + 1);
    await product({ a: below, b: inverse, c: solved, rows, inner: columns, columns, transposeB: true });
    below.set(solved);
  }
  return inverses;
}
