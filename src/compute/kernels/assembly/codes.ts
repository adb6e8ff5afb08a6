/** Codes of a group: by plain rounding, or column after column with GPTQ's compensation. */

const VECTOR: usize = 16;

/** Four codes, as floats. */
// @ts-ignore: decorator
@inline
export function quantize(w: v128, levels: f32, s: v128, shift: v128): v128 {
  if (levels == 1) {
    const border = f32x4.add(shift, f32x4.mul(s, f32x4.splat(0.5)));
    return v128.and(f32x4.ge(w, border), f32x4.splat(1));
  }
  const q = f32x4.add(f32x4.nearest(f32x4.div(w, s)), shift);
  return f32x4.pmin(f32x4.pmax(q, f32x4.splat(0)), f32x4.splat(levels));
}

/** The values four codes decode to. */
// @ts-ignore: decorator
@inline
export function decode(q: v128, levels: f32, s: v128, shift: v128): v128 {
  return levels == 1 ? f32x4.add(shift, f32x4.mul(s, q)) : f32x4.mul(s, f32x4.sub(q, shift));
}

/** Four floats 0..255 to four bytes. */
// @ts-ignore: decorator
@inline
export function storeCodes(at: usize, q: v128): void {
  const words = i32x4.trunc_sat_f32x4_u(q);
  const halves = i16x8.narrow_i32x4_u(words, words);
  v128.store32_lane(at, i8x16.narrow_i16x8_u(halves, halves), 0);
}

/** Rounds a group to a grid shared by its columns. Codes are (columns, rows) with `stride` bytes from column to column. */
export function roundCodes(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  levels: f32,
  scaleAt: usize,
  shiftAt: usize,
  codesAt: usize,
): void {
  for (let row = 0; row < rows; row += 4) {
    const s = v128.load(scaleAt + (<usize>row << 2));
    const shift = v128.load(shiftAt + (<usize>row << 2));
    for (let j = 0; j < columns; j++) {
      const at = <usize>(j * stride + row);
      storeCodes(codesAt + at, quantize(v128.load(groupAt + (at << 2)), levels, s, shift));
    }
  }
}

/** Quantizes four compensated weights: stores codes and `e = (w - wq) / u`. */
// @ts-ignore: decorator
@inline
function settle(w: v128, u: v128, levels: f32, scaleAt: usize, shiftAt: usize, codesAt: usize, errorsAt: usize): void {
  const s = v128.load(scaleAt);
  const shift = v128.load(shiftAt);
  const q = quantize(w, levels, s, shift);
  storeCodes(codesAt, q);
  v128.store(errorsAt, f32x4.div(f32x4.sub(w, decode(q, levels, s, shift)), u));
}

/**
 * GPTQ inside a group (slim-llm 3.4): for each column j in turn, `w_j -= sum_{k<j} e_k U_kj`, codes, `e_j = (w_j - wq_j) / U_jj`.
 * Looking left instead of pushing errors right does the same subtractions in the same order and never stores a weight.
 * `upperAt` holds U of the group transposed, (columns, columns): row j has U_0j .. U_jj. `levelsAt` has one float a column; column j
 * uses the grid at `j * gridStride` floats into scale and shift. Errors are laid out as the group is.
 */
export function compensate(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  upperAt: usize,
  levelsAt: usize,
  gridStride: i32,
  scaleAt: usize,
  shiftAt: usize,
  codesAt: usize,
  errorsAt: usize,
): void {
  const step = <usize>stride * 4;
  // Sixteen rows at a time: four independent chains of subtractions hide each other's latency.
  for (let row = 0; row < rows; row += 16) {
    const lane = <usize>row << 2;
    for (let j = 0; j < columns; j++) {
      const at = <usize>j * step + lane;
      const u = upperAt + ((<usize>j * <usize>columns) << 2);
      let w0 = v128.load(groupAt + at);
      let w1 = v128.load(groupAt + at, 16);
      let w2 = v128.load(groupAt + at, 32);
      let w3 = v128.load(groupAt + at, 48);
      let e = errorsAt + lane;
      for (let k = 0; k < j; k++) {
        const factor = v128.load32_splat(u + (<usize>k << 2));
        w0 = f32x4.sub(w0, f32x4.mul(v128.load(e), factor));
        w1 = f32x4.sub(w1, f32x4.mul(v128.load(e, 16), factor));
        w2 = f32x4.sub(w2, f32x4.mul(v128.load(e, 32), factor));
        w3 = f32x4.sub(w3, f32x4.mul(v128.load(e, 48), factor));
        e += step;
      }
      const diagonal = v128.load32_splat(u + (<usize>j << 2));
      const levels = load<f32>(levelsAt + (<usize>j << 2));
      const grid = ((<usize>j * <usize>gridStride) << 2) + lane;
      const codes = codesAt + <usize>(j * stride + row);
      settle(w0, diagonal, levels, scaleAt + grid, shiftAt + grid, codes, e);
      settle(w1, diagonal, levels, scaleAt + grid + 16, shiftAt + grid + 16, codes + 4, e + 16);
      settle(w2, diagonal, levels, scaleAt + grid + 32, shiftAt + grid + 32, codes + 8, e + 32);
      settle(w3, diagonal, levels, scaleAt + grid + 48, shiftAt + grid + 48, codes + 12, e + 48);
    }
  }
}
