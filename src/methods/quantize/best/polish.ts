/** Coordinate descent on finished codes (slim-llm 5.8): every weight moves to the level that suits all others best; grids stay. Monotone. */
import type { Blas } from '../../../compute/blas.ts';
import type { AsyncKernels, Grid } from '../../../compute/kernels/kernels.ts';

/** One group as it stands. */
export interface PolishedGroup {
  /** Stored columns [start, end). */
  readonly start: number;
  readonly end: number;
  readonly bits: number;
  /** As stored. */
  readonly grid: Grid;
  /** (columns, rows). */
  codes: Uint8Array;
}

/**
 * Sweeps over the groups until nothing moves or `sweeps` are done. What the other columns ask of a group is one product with its rows of
 * H, made when its turn comes: no gradient of the whole layer is kept, and none drifts.
 * @param hessian H (features, features) @param target W*^T (features, rows) @param decoded Wq^T (features, rows); replaced
 * @returns `tr((Wq - W*) H (Wq - W*)^T)` before the last sweep's changes
 */
export async function polish(
  blas: Blas,
  kernels: AsyncKernels,
  hessian: Float64Array,
  target: Float32Array,
  decoded: Float32Array,
  groups: readonly PolishedGroup[],
  sweeps: number,
): Promise<void> {
  const n = Math.round(Math.sqrt(hessian.length));
  const rows = target.length / n;
  const errors = new Float32Array(target.length);
  for (let i = 0; i < errors.length; i++) errors[i] = decoded[i] - target[i];
  const all = { rows: n, columns: rows, data: errors };
  const widest = groups.reduce((most, { start, end }) => Math.max(most, end - start), 0);
  const stripMemory = new Float32Array(widest * n);
  const gradientMemory = new Float32Array(widest * rows);
  for (let sweep = 0; sweep < sweeps; sweep++) {
    let moved = false;
    for (const group of groups) {
      const { start, end, bits, grid } = group;
      if (bits === 0) continue;
      const width = end - start;
      const strip = stripMemory.subarray(0, width * n);
      strip.set(hessian.subarray(start * n, end * n));
      const gradient = gradientMemory.subarray(0, width * rows);
      await blas.gemm({ rows: width, columns: n, data: strip }, all, { out: { rows: width, columns: rows, data: gradient } });
      const own = new Float32Array(width * width);
      for (let j = 0; j < width; j++) own.set(strip.subarray(j * n + start, j * n + end), j * width);
      const values = decoded.slice(start * rows, end * rows);
      const { codes, changes } = await kernels.polish(values, gradient, own, bits, grid);
      group.codes = codes;
      const at = start * rows;
      if (takeChanges(changes, values, decoded.subarray(at), target.subarray(at), errors.subarray(at))) moved = true;
    }
    if (!moved) return;
  }
}

/** Puts what changed into `decoded` and `errors`, at the same places; returns whether anything did. */
function takeChanges(
  changes: Float32Array,
  values: Float32Array,
  decoded: Float32Array,
  target: Float32Array,
  errors: Float32Array,
): boolean {
  let moved = false;
  for (let i = 0; i < changes.length; i++) {
    if (changes[i] === 0) continue;
    moved = true;
    decoded[i] = values[i];
    errors[i] = values[i] - target[i];
  }
  return moved;
}
