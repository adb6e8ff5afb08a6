/** Inverses of lower triangular fp64 matrices: small blocks in plain loops, the cubic part as products on an engine. */
import type { BlockColumns, Product64 } from './block-columns.ts';

/** The inverse of a lower triangular (n, n) matrix with a non-zero diagonal, row-major; a new array. */
export function invertLower(lower: Float64Array, n: number): Float64Array {
  const inverse = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    const row = i * n;
    // Row i of L V = I, solved for row i of V: V_i = (e_i - sum_{k<i} L_ik V_k) / L_ii.
    for (let k = 0; k < i; k++) {
      const factor = lower[row + k];
      const other = k * n;
      for (let j = 0; j <= k; j++) inverse[row + j] -= factor * inverse[other + j];
    }
    inverse[row + i] = 1;
    const reciprocal = 1 / lower[row + i];
    for (let j = 0; j <= i; j++) inverse[row + j] *= reciprocal;
  }
  return inverse;
}

/**
 * Replaces L in block columns by its inverse. `inverses` are the inverses of its diagonal blocks. Beyond the matrix it takes one
 * block column of memory.
 */
export async function invertBlocked(lower: BlockColumns, inverses: readonly Float64Array[], product: Product64): Promise<void> {
  const tile = new Float64Array(lower.block * lower.block);
  let scratch: Float64Array = new Float64Array(lower.columns[0]?.length ?? 0);
  for (let j = 0; j < lower.count; j++) {
    // Forward substitution L V_j = I_j, a block row at a time. V_j may take the place of L_j: later columns need later L only.
    const columns = lower.width(j);
    const solved = scratch.subarray(0, lower.columns[j].length);
    const offset = (k: number): number => (lower.start(k) - lower.start(j)) * columns;
    solved.set(inverses[j]);
    for (let k = j; k < lower.count; k++) {
      const inner = lower.width(k);
      const here = solved.subarray(offset(k), offset(k) + inner * columns);
      if (k > j) {
        const c = tile.subarray(0, inner * columns);
        await product({ a: inverses[k], b: here, c, rows: inner, inner, columns });
        here.set(c);
      }
      if (k + 1 === lower.count) break;
      const c = solved.subarray(offset(k + 1));
      if (k === j) c.fill(0);
      await product({ a: lower.from(k, k + 1), b: here, c, rows: lower.height(k + 1), inner, columns, subtract: true });
    }
    [lower.columns[j], scratch] = [solved, lower.columns[j]];
  }
}
