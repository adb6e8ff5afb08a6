/** Thin singular value decomposition, and the orthogonal factor of a matrix, in float64, by the eigenvectors of the smaller Gram matrix. */
import { eigh } from './eigh.ts';
import { gramOfColumns, gramOfRows, multiply, transposed } from './products.ts';

export interface Svd {
  /** Singular values kept, r of them, descending. */
  readonly values: Float64Array;
  /** Row j is the left vector of `values[j]`; (r, m). */
  readonly left: Float64Array;
  /** Row j is the right vector; (r, n). */
  readonly right: Float64Array;
}

/**
 * Singular values at or below this part of the largest are dropped with their vectors, which would be arbitrary (merging.md, section 5). Squared
 * by the Gram matrix they stand at 1e-12, three digits above what float64 cannot tell from zero.
 */
export const RANK_GUARD = 1e-6;

/**
 * `A = sum_j values[j] left_j right_j^T` up to the rank guard; `a` is (m, n). A matrix of zeros has no values.
 * @param most directions that are wanted, the strongest; all
 */
export function svd(a: Float64Array, m: number, n: number, most = Number.POSITIVE_INFINITY): Svd {
  if (m > n) {
    const { values, left, right } = svd(transposed(a, m, n), n, m, most);
    return { values, left: right, right: left };
  }
  const kept = (squares: Float64Array) => Math.min(rankOf(squares), most);
  const { values: squares, vectors: left } = eigh(gramOfRows(a, m, n), m, kept);
  const rank = kept(squares);
  const values = squares.slice(0, rank).map(Math.sqrt);
  const right = multiply(left, a, rank, m, n);
  for (let j = 0; j < rank; j++) for (let k = 0; k < n; k++) right[j * n + k] /= values[j];
  return { values, left, right };
}

/** The orthogonal factor of a matrix, and its singular values above the rank guard, descending. */
export interface Polar {
  /** `sum_j left_j right_j^T` over the values, (m, n): the nearest matrix whose singular values are all 1 (or dropped). */
  readonly factor: Float64Array;
  readonly values: Float64Array;
}

export function polar(a: Float64Array, m: number, n: number): Polar {
  if (m > n) {
    const { factor, values } = polar(transposed(a, m, n), n, m);
    return { factor: transposed(factor, n, m), values };
  }
  const { values: squares, vectors } = eigh(gramOfRows(a, m, n), m, rankOf);
  const rank = rankOf(squares);
  // (A A^T)^(-1/2) A on the directions that are kept; half of the power is on either side of a Gram matrix.
  for (let j = 0; j < rank; j++) {
    const root = squares[j] ** -0.25;
    for (let i = 0; i < m; i++) vectors[j * m + i] *= root;
  }
  return { factor: multiply(gramOfColumns(vectors, rank, m), a, m, m, n), values: squares.slice(0, rank).map(Math.sqrt) };
}

function rankOf(squares: Float64Array): number {
  const least = squares[0] * RANK_GUARD ** 2;
  let rank = 0;
  while (rank < squares.length && squares[rank] > least) rank++;
  return rank;
}
