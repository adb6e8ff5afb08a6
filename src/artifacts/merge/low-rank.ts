/** The product of two thin matrices, a few rows at a time: what a LoRA adds to a weight, without ever holding it whole. */

/** A product `left right`, (rows, rank) by (rank, columns), row-major. */
export interface LowRank {
  readonly rank: number;
  readonly columns: number;
  readonly left: Float32Array;
  readonly right: Float32Array;
}

/**
 * `scale * B diag(e) A` as a product whose rows are those of the stored tensor.
 * @param a (rank, inFeatures), @param b (outFeatures, rank), @param e (rank), @param transposed the tensor is stored (in, out)
 */
export function lowRank(
  a: Float32Array,
  b: Float32Array,
  { rank, scale, e, transposed }: { rank: number; scale: number; e?: Float32Array; transposed: boolean },
): LowRank {
  const inFeatures = a.length / rank;
  const outFeatures = b.length / rank;
  const factor = (r: number) => scale * (e ? e[r] : 1);
  if (!transposed) {
    const right = new Float32Array(a.length);
    for (let r = 0; r < rank; r++) {
      for (let i = 0; i < inFeatures; i++) right[r * inFeatures + i] = factor(r) * a[r * inFeatures + i];
    }
    return { rank, columns: inFeatures, left: b, right };
  }
  const left = new Float32Array(a.length);
  const right = new Float32Array(b.length);
  for (let r = 0; r < rank; r++) {
    for (let i = 0; i < inFeatures; i++) left[i * rank + r] = factor(r) * a[r * inFeatures + i];
    for (let o = 0; o < outFeatures; o++) right[r * outFeatures + o] = b[o * rank + r];
  }
  return { rank, columns: outFeatures, left, right };
}

/** Rows `[start, end)` of the product; sums in float64, so that the result does not depend on where blocks end. */
export function lowRankRows({ rank, columns, left, right }: LowRank, start: number, end: number): Float32Array {
  const result = new Float32Array((end - start) * columns);
  const row = new Float64Array(columns);
  for (let i = start; i < end; i++) {
    row.fill(0);
    for (let r = 0; r < rank; r++) {
      const factor = left[i * rank + r];
      const offset = r * columns;
      for (let j = 0; j < columns; j++) row[j] += factor * right[offset + j];
    }
    result.set(row, (i - start) * columns);
  }
  return result;
}
