/** W by input columns: a column of W is contiguous in W^T, which is how grids are fitted and errors are pushed on. */
import { UnsupportedError } from '../../errors.ts';
import type { LinearSite } from '../../model/model.ts';

/** Rows copied together, so that the cache lines of a column tile are written once. */
const TILE = 32;

/**
 * Columns `order[0..]` of `weight` (outFeatures, inFeatures) as (order.length, outFeatures); columns named in `dead` become zero.
 * Every layer passes here, so this is where a weight that is not finite is refused (UnsupportedError).
 */
export function takeColumns(site: LinearSite, weight: Float32Array, order: Uint32Array, dead: ReadonlySet<number>): Float32Array {
  const { outFeatures, inFeatures } = site;
  const columns = new Float32Array(order.length * outFeatures);
  for (let start = 0; start < outFeatures; start += TILE) {
    const end = Math.min(start + TILE, outFeatures);
    for (let j = 0; j < order.length; j++) {
      const column = order[j];
      let sum = 0;
      for (let row = start; row < end; row++) {
        const w = weight[row * inFeatures + column];
        columns[j * outFeatures + row] = w;
        sum += w * 0;
      }
      if (sum !== 0) refuse(site, weight, column);
    }
  }
  for (let j = 0; j < order.length; j++) {
    if (dead.has(order[j])) columns.fill(0, j * outFeatures, (j + 1) * outFeatures);
  }
  return columns;
}

function refuse(site: LinearSite, weight: Float32Array, column: number): never {
  let row = 0;
  while (Number.isFinite(weight[row * site.inFeatures + column])) row++;
  const value = weight[row * site.inFeatures + column];
  throw new UnsupportedError(
    `${site.name}.weight: row ${row}, column ${column} is ${value}; only finite weights can be quantized.`,
  );
}

/** `[start, end)` as column numbers. */
export function columnRange(start: number, end: number): Uint32Array {
  return Uint32Array.from({ length: end - start }, (_, i) => start + i);
}
