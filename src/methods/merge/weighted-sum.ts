/** Linear combinations of one block's inputs, summed in float64 and rounded once. */

// Sums of a chunk stay in the first-level cache while more inputs are added.
const CHUNK = 2048;
const sums = new Float64Array(CHUNK);

/** `sum c_k vectors_k`. */
export function weightedSum(vectors: readonly Float32Array[], coefficients: readonly number[]): Float32Array {
  const length = vectors[0].length;
  const result = new Float32Array(length);
  for (let from = 0; from < length; from += CHUNK) {
    const count = Math.min(CHUNK, length - from);
    sums.fill(0, 0, count);
    // Two at a time: a sum is loaded and stored half as often. The additions are the same, in the same order.
    let k = 0;
    for (; k + 1 < vectors.length; k += 2) {
      addScaledPair(vectors[k], coefficients[k], vectors[k + 1], coefficients[k + 1], from, count);
    }
    if (k < vectors.length) addScaled(vectors[k], coefficients[k], from, count);
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
    let k = 0;
    for (; k + 1 < experts.length; k += 2) {
      addScaledDifferences(base, experts[k], coefficients[k], experts[k + 1], coefficients[k + 1], from, count);
    }
    if (k < experts.length) addScaledDifference(experts[k], base, coefficients[k], from, count);
    for (let i = 0; i < count; i++) result[from + i] = sums[i];
  }
  return result;
}

function addScaled(x: Float32Array, c: number, from: number, count: number): void {
  for (let i = 0; i < count; i++) sums[i] += c * x[from + i];
}

function addScaledPair(x: Float32Array, c: number, y: Float32Array, d: number, from: number, count: number): void {
  for (let i = 0; i < count; i++) sums[i] = sums[i] + c * x[from + i] + d * y[from + i];
}

function addScaledDifference(x: Float32Array, base: Float32Array, c: number, from: number, count: number): void {
  for (let i = 0; i < count; i++) sums[i] += c * (x[from + i] - base[from + i]);
}

function addScaledDifferences(
  base: Float32Array,
  x: Float32Array,
  c: number,
  y: Float32Array,
  d: number,
  from: number,
  count: number,
): void {
  for (let i = 0; i < count; i++) {
    const b = base[from + i];
    sums[i] = sums[i] + c * (x[from + i] - b) + d * (y[from + i] - b);
  }
}
