/** A task vector as a product of two thin matrices: its strongest directions (merging.md, section 6b). */
import { svd } from '../../compute/linalg/svd.ts';

export interface LowRankFactors {
  readonly rank: number;
  /** sqrt(S) V^T, (rank, inFeatures). */
  readonly loraA: Float32Array;
  /** U sqrt(S), (outFeatures, rank). */
  readonly loraB: Float32Array;
  /** `|tau - B A| / |tau|`, Frobenius. */
  readonly residual: number;
}

export interface ExtractOptions {
  /** Most directions. */
  readonly rank: number;
  /** Enough of them for this part of the squared length of tau; 1: all that `rank` allows. */
  readonly energy: number;
}

/** `taskVector` is (outFeatures, inFeatures). A task vector of zeros has rank 0. */
export function extractLora(
  taskVector: Float32Array,
  outFeatures: number,
  inFeatures: number,
  options: ExtractOptions,
): LowRankFactors {
  const { values, left, right } = svd(Float64Array.from(taskVector), outFeatures, inFeatures, options.rank);
  // Of the matrix, not of the values that passed the guard: what those leave out is part of the residual.
  let total = 0;
  for (const value of taskVector) total += value * value;
  let [rank, kept] = [0, 0];
  while (rank < Math.min(options.rank, values.length) && !(options.energy < 1 && kept >= options.energy * total)) {
    kept += values[rank++] ** 2;
  }
  const loraA = new Float32Array(rank * inFeatures);
  const loraB = new Float32Array(outFeatures * rank);
  for (let j = 0; j < rank; j++) {
    const root = Math.sqrt(values[j]);
    for (let k = 0; k < inFeatures; k++) loraA[j * inFeatures + k] = root * right[j * inFeatures + k];
    for (let i = 0; i < outFeatures; i++) loraB[i * rank + j] = root * left[j * outFeatures + i];
  }
  return { rank, loraA, loraB, residual: total > 0 ? Math.sqrt(Math.max(0, total - kept) / total) : 0 };
}
