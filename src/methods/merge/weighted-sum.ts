/** Linear combinations of one block's inputs, summed in float64 and rounded once. */
import { vectors } from '../../compute/kernels/vectors.ts';

/** `sum c_k xs_k`, into `out`, which is returned. */
export function weightedSum(
  xs: readonly Float32Array[],
  coefficients: readonly number[],
  out: Float32Array = new Float32Array(xs[0].length),
): Float32Array {
  vectors().weightedSum(xs, coefficients, out);
  return out;
}

/** `base + sum c_k (experts_k - base)`, the differences exact in float64, into `out`, which is returned. */
export function baseAndTaskVectors(
  base: Float32Array,
  experts: readonly Float32Array[],
  coefficients: readonly number[],
  out: Float32Array = new Float32Array(base.length),
): Float32Array {
  vectors().addTaskVectors(base, experts, coefficients, out);
  return out;
}
