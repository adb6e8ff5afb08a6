/** Codes of 1..8 bits as bit planes in 32-bit words: the packing of the `planes` layout (docs/formats.md). */

/** The planes of a width, low plane first: every width is a sum of 1, 2, 4 and 8, whose values never cross a word. */
const PLANES: readonly (readonly number[])[] = [[], [1], [2], [2, 1], [4], [4, 1], [4, 2], [4, 2, 1], [8]];

/** Plane widths of a code of `bits` bits (0..8), low plane first. */
export function planesOf(bits: number): readonly number[] {
  return PLANES[bits];
}

/** Words that `rows` rows of `columns` codes of `bits` bits take: each row of each plane is padded to whole words. */
export function planeWordCount(rows: number, columns: number, bits: number): number {
  let words = 0;
  for (const plane of PLANES[bits]) words += Math.ceil((columns * plane) / 32);
  return words * rows;
}

/** A rectangle of a row-major byte matrix: `rows` rows of `columns` values, the first at `offset`, rows `stride` apart. */
export interface CodeWindow {
  readonly codes: Uint8Array;
  readonly offset: number;
  readonly stride: number;
  readonly rows: number;
  readonly columns: number;
}

/**
 * Packs a window of codes of `bits` bits into `words` from `start`: plane by plane, row by row, value j of a row in word
 * `floor(j p / 32)` at bit `(j p) mod 32`. The target must be zeroed. Returns the position after the last word.
 */
export function packPlanes(window: CodeWindow, bits: number, words: Uint32Array, start: number): number {
  const { codes, offset, stride, rows, columns } = window;
  let position = start;
  let shift = 0;
  for (const plane of PLANES[bits]) {
    const mask = (1 << plane) - 1;
    for (let row = 0; row < rows; row++) {
      const first = offset + row * stride;
      let word = 0;
      let bit = 0;
      for (let i = first; i < first + columns; i++) {
        word |= ((codes[i] >>> shift) & mask) << bit;
        bit += plane;
        if (bit === 32) {
          words[position++] = word;
          word = 0;
          bit = 0;
        }
      }
      if (bit > 0) words[position++] = word;
    }
    shift += plane;
  }
  return position;
}

/** Reverse of `packPlanes`: fills the window, whose codes must be zeroed. Padding bits are ignored. */
export function unpackPlanes(window: CodeWindow, bits: number, words: Uint32Array, start: number): number {
  const { codes, offset, stride, rows, columns } = window;
  let position = start;
  let shift = 0;
  for (const plane of PLANES[bits]) {
    const mask = (1 << plane) - 1;
    for (let row = 0; row < rows; row++) {
      const first = offset + row * stride;
      let word = 0;
      let bit = 32;
      for (let i = first; i < first + columns; i++) {
        if (bit === 32) {
          word = words[position++];
          bit = 0;
        }
        codes[i] |= ((word >>> bit) & mask) << shift;
        bit += plane;
      }
    }
    shift += plane;
  }
  return position;
}
