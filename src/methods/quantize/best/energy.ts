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
  for (let start = 0; start < features; start += STRIP) {
    const end = Math.min(start + STRIP, features);
    const strip = Float32Array.from(hessian.subarray(start * features, end * features));
    const product = (await blas.gemm({ rows: end - start, columns: features, data: strip }, all)).data;
    for (let i = 0; i < product.length; i++) {
      energies[Math.floor((i % width) / count)] += product[i] * data[start * width + i];
    }
  }
  return energies.map((energy) => (Math.max(0, energy) * rows) / count);
}
