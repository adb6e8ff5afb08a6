/** Task vectors trimmed to their largest entries, as TIES trims them (merging.md 4): `floor(density n)` of each tensor's, at least one. */
import { vectors } from '../../compute/kernels/vectors.ts';
import { keepRanks } from './largest.ts';
import type { MergeBlock, Scan } from './merger.ts';

export interface Trimming {
  /** Run first. */
  readonly scans: readonly Scan[];
  /** Expert k's task vector in this block, trimmed, newly allocated; blocks come in order. */
  trimmed(k: number, block: MergeBlock): Float32Array;
}

/** @param length elements of the tensor */
export function trimming(length: number, experts: number, density: number): Trimming {
  const band = { drop: 0, keep: Math.min(length, Math.max(1, Math.floor(density * length))) };
  const sparsifier = keepRanks(length, new Array(experts).fill(band));
  // Sparsifiers look at the difference of an expert and the base: the task vectors themselves, on a base of zeros.
  const alone = (block: MergeBlock): MergeBlock => ({
    ...block,
    base: new Float32Array(block.length),
    experts: block.taskVectors,
  });
  return {
    scans: sparsifier.scans.map((scan) => ({ ...scan, look: (block) => scan.look(alone(block)) })),
    trimmed(k, block) {
      const values = block.taskVectors[k].slice();
      sparsifier.sparsify(k, { values, bits: new Int32Array(values.buffer) }, values.length, block.start);
      return values;
    },
  };
}

/** A whole task vector, trimmed. */
export function trimWhole(taskVector: Float32Array, density: number): Float32Array {
  using _ = vectors().open();
  const { length } = taskVector;
  const output = new Float32Array(length);
  const block: MergeBlock = { start: 0, length, base: undefined, experts: [], taskVectors: [taskVector], output };
  const { scans, trimmed } = trimming(length, 1, density);
  for (const scan of scans) if (scan.needed?.() ?? true) scan.look(block);
  return trimmed(0, block);
}
