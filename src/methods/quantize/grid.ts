/** Grids of a group: how they are fitted, stored and decoded. */
import { roundToF16 } from '../../../formats/dtype.ts';
import type { AsyncKernels, Grid, Group } from '../../compute/kernels/kernels.ts';

/** Normal range of F16. A module with a scale outside it stores its scales as F32. */
const F16_LEAST = 2 ** -14;
const F16_MOST = 65504;

/** Plain min-max grid; two levels around the mean for 1 bit, the all-zero grid for 0 bits (slim-llm 4.3). */
export async function fitMinMax(kernels: AsyncKernels, group: Group, bits: number, symmetric: boolean): Promise<Grid> {
  if (bits === 0) return { scale: new Float32Array(group.rows).fill(1), shift: new Float32Array(group.rows) };
  if (bits === 1) return kernels.twoLevelGrid(group, symmetric);
  return kernels.minMaxGrid(group, bits, symmetric);
}

/**
 * The min-max grid with its scale searched within 10 % (SQC, slim-llm 4.3). `weights` of the elements' losses are laid out as the group.
 * Widths below 2 bits have nothing to search.
 */
export async function fitSearched(kernels: AsyncKernels, group: Group, bits: number, weights?: Float32Array): Promise<Grid> {
  const grid = await fitMinMax(kernels, group, bits, false);
  if (bits < 2) return grid;
  return { scale: await kernels.searchScales(group, bits, grid, weights), shift: grid.shift };
}

/**
 * The grid as artifacts store it: scales and 1-bit offsets rounded to F16, each value outside F16's range kept as F32.
 * Codes are chosen on the result, so that every artifact decodes to the same weights.
 */
export function storedGrid(grid: Grid, bits: number): { readonly grid: Grid; readonly fitsF16: boolean } {
  let fitsF16 = true;
  const scale = grid.scale.map((s) => {
    if (s >= F16_LEAST && s <= F16_MOST) return roundToF16(s);
    fitsF16 = false;
    return s;
  });
  if (bits !== 1) return { grid: { scale, shift: grid.shift }, fitsF16 };
  const shift = grid.shift.map((o) => {
    if (Math.abs(o) <= F16_MOST) return roundToF16(o);
    fitsF16 = false;
    return o;
  });
  return { grid: { scale, shift }, fitsF16 };
}

/** Weights that codes (columns, rows) decode to, float32, one rounding a value. */
export function decodeGroup(codes: Uint8Array, bits: number, grid: Grid): Float32Array {
  const { scale, shift } = grid;
  const rows = scale.length;
  const values = new Float32Array(codes.length);
  for (let at = 0; at < codes.length; at += rows) {
    for (let row = 0; row < rows; row++) {
      const code = codes[at + row];
      values[at + row] = bits === 1 ? shift[row] + Math.fround(scale[row] * code) : scale[row] * (code - shift[row]);
    }
  }
  return values;
}
