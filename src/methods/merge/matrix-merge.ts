/** What methods on matrices have in common: they take a matrix whole, and leave every other tensor to the mean of the task vectors. */
import type { MergeBlock, MergeTensor, TensorMerge } from './merger.ts';
import { LAMBDA } from './task-vectors.ts';
import { baseAndTaskVectors } from './weighted-sum.ts';

/** Merged task vector of a matrix, (rows, columns), from those of the experts. */
export type MatrixMerge = (
  taskVectors: readonly Float64Array[],
  rows: number,
  columns: number,
  block: MergeBlock,
) => Float64Array | Promise<Float64Array>;

export const MATRIX_PARAMETERS = { lambda: LAMBDA } as const;

/** `theta_0 + lambda merge(task vectors)` for matrices, `theta_0 + lambda mean(task vectors)` for the rest. */
export function mergeMatrix(tensor: MergeTensor, lambda: number, merge: MatrixMerge): TensorMerge {
  const { role, shape } = tensor;
  const mean = (block: MergeBlock) => {
    const { base, experts, output } = block;
    return baseAndTaskVectors(
      base!,
      experts,
      experts.map(() => lambda / experts.length),
      output,
    );
  };
  if (role !== 'matrix' || shape.length !== 2) return { scans: [], merge: mean };
  const [rows, columns] = shape;
  return {
    scans: [],
    async merge(block) {
      const taskVectors = block.taskVectors.map((taskVector) => Float64Array.from(taskVector));
      const merged = await merge(taskVectors, rows, columns, block);
      const { base, output } = block;
      for (let i = 0; i < output.length; i++) output[i] = base![i] + lambda * merged[i];
      return output;
    },
  };
}

/** Sum of matrices of one size. */
export function sumOf(matrices: readonly Float64Array[]): Float64Array {
  const sum = new Float64Array(matrices[0].length);
  for (const matrix of matrices) for (let i = 0; i < sum.length; i++) sum[i] += matrix[i];
  return sum;
}

export function meanOf(values: Float64Array): number {
  return values.length === 0 ? 0 : values.reduce((sum, value) => sum + value, 0) / values.length;
}
