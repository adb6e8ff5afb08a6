/**
 * Inner loops over long vectors of float32, for merges. All arguments ending in `At` are byte offsets into memory that the caller manages, of
 * floats at multiples of 4. Where whole vectors of four are written, the room behind `n` elements is written too: up to 28 bytes.
 */
export { areFinite, narrowBf16, narrowF16, widenBf16, widenF16 } from './convert';
export { addScaled, addTaskVectors, subtract, weightedSum } from './combine';
export { electSigns } from './elect';
export { countEqual, countHigh, countWithin, keepBetween } from './select';
export { divide, fillUniform, keepBelow } from './random';
export { sumGram, sumMagnitudePairs, sumMagnitudes, sumProducts } from './sums';

/** First free byte of the memory. */
export function memoryStart(): usize {
  return __heap_base;
}
