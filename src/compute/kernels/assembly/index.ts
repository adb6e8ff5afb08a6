/**
 * Inner loops of weight quantization. A group is (columns, rows) row-major with `stride` floats from one column of W to the next:
 * SIMD lanes are output rows, each with its own grid, so nothing ever crosses lanes. `rows` is a multiple of 16.
 * All arguments ending in `At` are byte offsets into memory that the caller manages.
 *
 * A grid of b >= 2 bits has `levels = 2^b - 1`, a scale s and an integer zero z: `q = clip(round(w / s) + z, 0, levels)`, `wq = s (q - z)`.
 * A grid of 1 bit has `levels = 1`, a scale s and an offset o (both in `shift`): `q = 1 iff w >= o + s / 2`, `wq = o + s q`.
 */
export { searchGrid, searchWeightedGrid } from './search';
export { minMaxGrid, twoLevelGrid } from './grid';
export { roundCodes, compensate } from './codes';
export { fitWeighted, fitTwoLevels } from './fit';
export { polish } from './polish';

/** First free byte of the memory. */
export function memoryStart(): usize {
  return __heap_base;
}
