/** Components that a layer could get, as they are before any training: what calibration surrogates of training-time methods choose from (adapters.md 5.5). */
import type { Blas, Matrix } from '../../../compute/blas.ts';
import { compensate } from '../compensation.ts';

/** The update of a layer is the sum of `values[k] u_k a_k`, over those that are chosen. */
export interface FrozenComponents {
  readonly count: number;
  /** Descending, none negative. */
  readonly values: Float64Array;
  /** Row k is u_k, of length 1; (count, outFeatures). */
  readonly left: Float32Array;
  /** Row k is a_k, of length 1; (count, inFeatures). */
  readonly right: Float32Array;
}

/** What a mean gradient says of a layer's components. */
export interface ComponentGradient {
  /** `u_i^T G a_j`, (count, count): the square core's gradient. */
  readonly core: Float64Array;
  /** `|values[k] u_k^T G a_k|`: what adding component k changes, to first order. */
  readonly gains: Float64Array;
}

/** Components of `loraB loraA`, times `sign`. @param loraA (count, n) @param loraB (m, count) */
export function componentsOf(count: number, loraA: Float32Array, loraB: Float32Array, sign: 1 | -1): FrozenComponents {
  const [n, m] = count === 0 ? [0, 0] : [loraA.length / count, loraB.length / count];
  const [right, left] = [loraA.slice(), new Float32Array(count * m)];
  const values = new Float64Array(count);
  for (let k = 0; k < count; k++) {
    for (let i = 0; i < m; i++) left[k * m + i] = sign * loraB[i * count + k];
    values[k] = unit(right.subarray(k * n, (k + 1) * n)) * unit(left.subarray(k * m, (k + 1) * m));
  }
  return { count, values, left, right };
}

/** The principal components of the step against a gradient (m, n), and the gradient's own norm. */
export async function gradientComponents(
  blas: Blas,
  gradient: Matrix,
  most: number,
): Promise<{ readonly components: FrozenComponents; readonly norm: number }> {
  const { rows: m, columns: n } = gradient;
  const { rank, loraA, loraB, total } = await compensate(blas, gradient, undefined, Math.min(most, m, n));
  return { components: componentsOf(rank, loraA, loraB, -1), norm: Math.sqrt(total) };
}

/** @param gradient the mean of dL/dW, (m, n) */
export async function componentGradient(
  blas: Blas,
  { count, values, left, right }: FrozenComponents,
  gradient: Matrix,
): Promise<ComponentGradient> {
  if (count === 0) return { core: new Float64Array(), gains: new Float64Array() };
  const inner = await blas.gemm({ rows: count, columns: gradient.rows, data: left }, gradient);
  const outer = { rows: count, columns: gradient.columns, data: right };
  const core = Float64Array.from((await blas.gemm(inner, outer, { transposeB: true })).data);
  return { core, gains: values.map((value, k) => Math.abs(value * core[k * count + k])) };
}

/** Factors of the components `kept`, and nothing for the rest of `rank`, times `scale`: A (rank, n), B (m, rank). */
export function factorsOf(
  { values, left, right }: FrozenComponents,
  kept: readonly number[],
  { inFeatures: n, outFeatures: m }: { readonly inFeatures: number; readonly outFeatures: number },
  scale: number,
): { readonly loraA: Float32Array; readonly loraB: Float32Array } {
  const rank = kept.length;
  const [loraA, loraB] = [new Float32Array(rank * n), new Float32Array(m * rank)];
  kept.forEach((k, to) => {
    // Both factors hold the root, as everywhere.
    const root = Math.sqrt(values[k]);
    for (let j = 0; j < n; j++) loraA[to * n + j] = root * right[k * n + j];
    for (let i = 0; i < m; i++) loraB[i * rank + to] = scale * root * left[k * m + i];
  });
  return { loraA, loraB };
}

/** Makes a vector one of length 1, in place; returns its length, 0 for one that is nothing. */
function unit(vector: Float32Array): number {
  const norm = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
  if (norm > 0) for (let i = 0; i < vector.length; i++) vector[i] /= norm;
  return norm;
}
