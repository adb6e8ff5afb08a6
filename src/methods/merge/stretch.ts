/** Task vectors a stretch at a time: short enough to stay in the nearest caches while it is made, thinned out and added up. */
import { vectors } from '../../compute/kernels/vectors.ts';
import type { MergeBlock } from './merger.ts';

/** Elements a stretch has, where the method does not ask for whole rows. */
const LENGTH = 4096;

/** Part of one expert's task vector. A method may overwrite it. */
export interface Stretch {
  readonly values: Float32Array;
  /** The same memory: float32 bit patterns, whose lower 31 bits order like the magnitudes. */
  readonly bits: Int32Array;
}

export function allocateStretch(length: number): Stretch {
  const values = vectors().floats(length);
  return { values, bits: new Int32Array(values.buffer, values.byteOffset, length) };
}

/** Elements per stretch: whole rows of `rowLength` where that is given. */
export function stretchLength(rowLength: number | undefined): number {
  return rowLength ? rowLength * Math.max(1, Math.floor(LENGTH / rowLength)) : LENGTH;
}

/** Writes `expert - base` for the elements `from .. from + count`. */
export function readTaskVector(expert: Float32Array, base: Float32Array, from: number, count: number, out: Float32Array): void {
  vectors().subtract(expert.subarray(from, from + count), base.subarray(from, from + count), out);
}

/**
 * A scan that looks at the task vectors of the experts in `which`, stretch by stretch.
 * @param look gets expert `k`'s stretch, its length, and the flat index of its first element
 */
export function scanTaskVectors(
  which: readonly number[],
  rowLength: number | undefined,
  look: (k: number, stretch: Stretch, count: number, at: number) => void,
): (block: MergeBlock) => void {
  const length = stretchLength(rowLength);
  let stretch: Stretch | undefined;
  return (block) => {
    stretch ??= allocateStretch(length);
    for (const k of which) {
      for (let from = 0; from < block.length; from += length) {
        const count = Math.min(length, block.length - from);
        readTaskVector(block.experts[k], block.base!, from, count, stretch.values);
        look(k, stretch, count, block.start + from);
      }
    }
  };
}
