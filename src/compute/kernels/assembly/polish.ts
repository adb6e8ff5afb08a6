/** Coordinate descent over a group whose grid stands (slim-llm 5.8). */
import { decode, quantize, storeCodes } from './codes';

const ZERO: v128 = f32x4.splat(0);

/** Moves four weights to the level nearest to where the gradient wants them; returns by how much. */
// @ts-ignore: decorator
@inline
function move(decodedAt: usize, gradientAt: usize, diagonal: v128, levels: f32, s: v128, shift: v128, codesAt: usize, changesAt: usize): v128 {
  const wq = v128.load(decodedAt);
  const target = f32x4.sub(wq, f32x4.div(v128.load(gradientAt), diagonal));
  const q = quantize(target, levels, s, shift);
  storeCodes(codesAt, q);
  const value = decode(q, levels, s, shift);
  v128.store(decodedAt, value);
  const delta = f32x4.sub(value, wq);
  v128.store(changesAt, delta);
  return delta;
}

/**
 * One sweep: for each column j in turn `wq_j <- quantize(wq_j - D_j / H_jj)`, then `D_k += delta H_jk` for all k.
 * `decodedAt` (wq) and `gradientAt` (D) are laid out as a group and replaced; `hessianAt` is (columns, columns); codes have `stride` bytes,
 * changes `stride` floats from column to column.
 */
export function polish(
  decodedAt: usize,
  gradientAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  hessianAt: usize,
  levels: f32,
  scaleAt: usize,
  shiftAt: usize,
  codesAt: usize,
  changesAt: usize,
): void {
  const step = <usize>stride * 4;
  for (let row = 0; row < rows; row += 16) {
    const lane = <usize>row << 2;
    const s0 = v128.load(scaleAt + lane);
    const s1 = v128.load(scaleAt + lane, 16);
    const s2 = v128.load(scaleAt + lane, 32);
    const s3 = v128.load(scaleAt + lane, 48);
    const z0 = v128.load(shiftAt + lane);
    const z1 = v128.load(shiftAt + lane, 16);
    const z2 = v128.load(shiftAt + lane, 32);
    const z3 = v128.load(shiftAt + lane, 48);
    for (let j = 0; j < columns; j++) {
      const at = <usize>j * step + lane;
      const codes = codesAt + <usize>(j * stride + row);
      let h = hessianAt + ((<usize>j * <usize>columns) << 2);
      const diagonal = v128.load32_splat(h + (<usize>j << 2));
      const delta0 = move(decodedAt + at, gradientAt + at, diagonal, levels, s0, z0, codes, changesAt + at);
      const delta1 = move(decodedAt + at + 16, gradientAt + at + 16, diagonal, levels, s1, z1, codes + 4, changesAt + at + 16);
      const delta2 = move(decodedAt + at + 32, gradientAt + at + 32, diagonal, levels, s2, z2, codes + 8, changesAt + at + 32);
      const delta3 = move(decodedAt + at + 48, gradientAt + at + 48, diagonal, levels, s3, z3, codes + 12, changesAt + at + 48);
      const moved = v128.or(
        v128.or(f32x4.ne(delta0, ZERO), f32x4.ne(delta1, ZERO)),
        v128.or(f32x4.ne(delta2, ZERO), f32x4.ne(delta3, ZERO)),
      );
      // Most weights are where they should be, more so with every sweep.
      if (!v128.any_true(moved)) continue;
      let d = gradientAt + lane;
      for (let k = 0; k < columns; k++) {
        const factor = v128.load32_splat(h);
        v128.store(d, f32x4.add(v128.load(d), f32x4.mul(delta0, factor)));
        v128.store(d, f32x4.add(v128.load(d, 16), f32x4.mul(delta1, factor)), 16);
        v128.store(d, f32x4.add(v128.load(d, 32), f32x4.mul(delta2, factor)), 32);
        v128.store(d, f32x4.add(v128.load(d, 48), f32x4.mul(delta3, factor)), 48);
        d += step;
        h += 4;
      }
    }
  }
}
