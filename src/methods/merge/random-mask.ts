/**
 * Random numbers of merges (merging.md 2.4): a pure function of seed, output tensor, expert and flat index, so a mask depends neither
 * on blocks, threads and interruptions nor on which other experts take part.
 */
import { createHash } from 'node:crypto';
import { vectors } from '../../compute/kernels/vectors.ts';

/** Resolution of the uniform numbers. */
export const UNIFORM_STEPS = 2 ** 24;

/** Two words that belong to a seed, a tensor and an expert. */
export function randomKey(seed: number, tensor: string, expert: string): Uint32Array {
  const hash = createHash('sha256').update(['pcomp-merge', seed, tensor, expert].join('\0')).digest();
  return Uint32Array.of(hash.readUInt32LE(0), hash.readUInt32LE(4));
}

/** Writes uniform whole numbers in 0 .. 2^24 - 1, those of the elements with flat indices `at .. at + out.length`. */
export function fillUniform(key: Uint32Array, at: number, out: Uint32Array): void {
  vectors().fillUniform(key, at, out);
}
