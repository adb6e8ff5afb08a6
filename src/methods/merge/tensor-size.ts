/** How many rows and columns a tensor of any rank has for methods that work by row. */
import type { MergeTensor } from './merger.ts';

export function elementCount(tensor: MergeTensor): number {
  return tensor.shape.reduce((product, size) => product * size, 1);
}

/** Length of the last axis: a 1-D tensor is one row, a stack of matrices has the rows of all of them, a scalar is one element. */
export function columnCount(tensor: MergeTensor): number {
  return tensor.shape.at(-1) ?? 1;
}
