/** Output energy of weights by a Hessian: `tr(V H V^T)`. */
import type { Blas } from '../../../compute/blas.ts';

/** Output rows that are looked at: evenly spaced, enough for two digits. */
const SAMPLED_ROWS = 256;
const STRIP = 512;

/** `tr(V H V^T)` of each V^T (features, rows), on at most 256 rows scaled to all. */
export async function sampledEnergy(
  blas: Blas,
  hessian: Float64Array,
  matrices: readonly Float32Array[],
  features: number,
): Promise<number[]> {
  const rows = matrices[0].length / features;
  const count = Math.min(rows, SAMPLED_ROWS);
  const width = count * matrices.length;
  const data = new Float32Array(features * width);
  for (const [k, matrix] of matrices.entries()) {
    for (let j = 0; j < features; j++) {
      for (let i = 0; i < count; i++) data[j * width + k * count + i] = matrix[j * rows + Math.floor((i * rows) / count)];
    }
  }
  const energies = matrices.map(() => 0);
  const all = { rows: features, columns: width, data };
  const memory = new Float32Array(Math.min(STRIP, features) * features);
  for (let start = 0; start < features; start += STRIP) {
    const end = Math.min(start + STRIP, features);
    const strip = memory.subarray(0, (end - start) * features);
    strip.set(hessian.subarray(start * features, end * features));
    const product = (await blas.gemm({ rows: end - start, columns: features, data: strip }, all)).data;
    for (const k of energies.keys()) energies[k] += dotOfPart(product, data.subarray(start * width), width, k * count, count);
  }
  return energies.map((energy) => (Math.max(0, energy) * rows) / count);
}

/** Sum of products over columns [first, first + count) of two matrices with rows of `width`; `a` says how many rows. */
function dotOfPart(a: Float32Array, b: Float32Array, width: number, first: number, count: number): number {
  let sum = 0;
  for (let row = first; row < a.length; row += width) for (let i = row; i < row + count; i++) sum += a[i] * b[i];
  return sum;
}
