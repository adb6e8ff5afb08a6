/**
 * What is done to a linear layer's input so that its weights quantize better (slim-llm 5.3). Sites that read one input share it, so it
 * costs a runtime one operation per input.
 */

/** `x -> H x[order]`: a permutation of the columns, then a Hadamard matrix over every whole run of `hadamard` of them. */
export interface InputTransform {
  /** Stored column k reads input `order[k]`; (inFeatures). */
  readonly order: Uint32Array;
  /** 0 for none; else a power of two. A last run that is shorter stays as it is. */
  readonly hadamard: number;
}

/** Length of the runs that `perm-had` rotates: a group, where that is a power of two and the input has one; else 0. */
export function rotatedRun(groupSize: number, features: number): number {
  return groupSize > 1 && groupSize <= features && Number.isInteger(Math.log2(groupSize)) ? groupSize : 0;
}

/** Entries of the Sylvester-Hadamard matrix of order `size` are +-`hadamardScale` for activations: a power of two, so that scaling is exact. */
export function hadamardScale(size: number): number {
  return 2 ** -Math.floor(Math.log2(size) / 2);
}

/** The same for weights; the product of the two matrices is the identity. */
export function hadamardWeightScale(size: number): number {
  return 2 ** -Math.ceil(Math.log2(size) / 2);
}

/** W (rows, columns) in natural order -> stored order. Sums of a rotation are fp64, rounded once. */
export function transformColumns(transform: InputTransform, weight: Float32Array, rows: number, columns: number): Float32Array {
  const { order, hadamard } = transform;
  const stored = new Float32Array(rows * columns);
  const row = new Float64Array(columns);
  for (let r = 0; r < rows; r++) {
    const at = r * columns;
    for (let k = 0; k < columns; k++) row[k] = weight[at + order[k]];
    if (hadamard > 0) rotateRuns(row, hadamard, hadamardWeightScale(hadamard));
    stored.set(row, at);
  }
  return stored;
}

/** The reverse, for weights: `y = untransform(W) x` is what `W` makes of the transformed input. */
export function untransformColumns(transform: InputTransform, stored: Float32Array, rows: number, columns: number): Float32Array {
  const { order, hadamard } = transform;
  const weight = new Float32Array(rows * columns);
  const row = new Float64Array(columns);
  for (let r = 0; r < rows; r++) {
    const at = r * columns;
    for (let k = 0; k < columns; k++) row[k] = stored[at + k];
    if (hadamard > 0) rotateRuns(row, hadamard, hadamardScale(hadamard));
    for (let k = 0; k < columns; k++) weight[at + order[k]] = row[k];
  }
  return weight;
}

/** Multiplies every whole run of `size` values by the Sylvester-Hadamard matrix with entries +-`scale`, in place. */
export function rotateRuns(values: Float64Array, size: number, scale: number): void {
  for (let start = 0; start + size <= values.length; start += size) {
    for (let half = 1; half < size; half *= 2) {
      for (let i = start; i < start + size; i += 2 * half) {
        for (let j = i; j < i + half; j++) {
          const a = values[j];
          const b = values[j + half];
          values[j] = a + b;
          values[j + half] = a - b;
        }
      }
    }
    for (let i = start; i < start + size; i++) values[i] *= scale;
  }
}
