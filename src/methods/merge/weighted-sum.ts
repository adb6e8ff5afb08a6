/** Linear combinations of one block's inputs, summed in float64 and rounded once. */

// Sums of a chunk stay in the first-level cache while one input after the other is added.
const CHUNK = 2048;
const sums = new Float64Array(CHUNK);

/** `base + sum c_k vectors_k`, without `base` when it is absent. */
export function weightedSum(
  vectors: readonly Float32Array[],
  coefficients: readonly number[],
  base: Float32Array | undefined,
): Float32Array {
  const length = (base ?? vectors[0]).length;
  const result = new Float32Array(length);
  for (let from = 0; from < length; from += CHUNK) {
    const count = Math.min(CHUNK, length - from);
    if (base) for (let i = 0; i < count; i++) sums[i] = base[from + i];
    else sums.fill(0, 0, count);
    for (let k = 0; k < vectors.length; k++) addScaled(vectors[k], coefficients[k], from, count);
    for (let i = 0; i < count; i++) result[from + i] = sums[i];
  }
  return result;
}

/** `base + sum c_k (experts_k - base)`, the differences exact in float64. */
export function baseAndTaskVectors(
  base: Float32Array,
  experts: readonly Float32Array[],
  coefficients: readonly number[],
): Float32Array {
  const length = base.length;
  const result = new Float32Array(length);
  for (let from = 0; from < length; from += CHUNK) {
    const count = Math.min(CHUNK, length - from);
    for (let i = 0; i < count; i++) sums[i] = base[from + i];
    for (let k = 0; k < experts.length; k++) addScaledDifference(experts[k], base, coefficients[k], from, count);
    for (let i = 0; i < count; i++) result[from + i] = sums[i];
  }
  return result;
}

function addScaled(x: Float32Array, c: number, from: number, count: number): void {
  for (let i = 0; i < count; i++) sums[i] += c * x[from + i];
}

function addScaledDifference(x: Float32Array, base: Float32Array, c: number, from: number, count: number): void {
  for (let i = 0; i < count; i++) sums[i] += c * (x[from + i] - base[from + i]);
}
