/** Search of the scale around the min-max scale, by the 2.4-norm of the rounding error (slim-llm 4.3). The hot loop of slim-llm. */

const VECTOR: usize = 16;
/** Columns between two looks at whether a candidate can still win. */
const STRIP: i32 = 32;

/**
 * x^1.2 for x >= 0, relative error below 5e-6: y approximates x^-0.2 from the exponent bits (pmaddwd multiplies the upper 16 bits by
 * 0.2 * 2^16), `v = x y^5` is then in [0.85, 1.18], and x^1.2 = x * (x y^4) * v^-0.8 with a minimax polynomial for the last factor.
 */
// @ts-ignore: decorator
@inline
function pow12(x: v128): v128 {
  const y = i32x4.sub(i32x4.splat(1277923859), i32x4.dot_i16x8_s(x, i32x4.splat(13107 << 16)));
  const y2 = f32x4.mul(y, y);
  const a = f32x4.mul(x, f32x4.mul(y2, y2));
  const v = f32x4.mul(a, y);
  let p = f32x4.add(f32x4.mul(v, f32x4.splat(0.6222549499622502)), f32x4.splat(-3.1809165364789904));
  p = f32x4.add(f32x4.mul(p, v), f32x4.splat(6.52979283976647));
  p = f32x4.add(f32x4.mul(p, v), f32x4.splat(-6.8057262318889435));
  p = f32x4.add(f32x4.mul(p, v), f32x4.splat(3.834593455859088));
  return f32x4.mul(f32x4.mul(x, a), p);
}

// @ts-ignore: decorator
@inline
function search(
  weighted: bool,
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  levels: f32,
  scaleAt: usize,
  zeroAt: usize,
  weightsAt: usize,
  scratchAt: usize,
): void {
  const step = <usize>stride * 4;
  const end = <usize>rows * 4;
  const weightScratch = scratchAt + <usize>columns * VECTOR;
  for (let row: usize = 0; row < end; row += VECTOR) {
    const s0 = v128.load(scaleAt + row);
    const z = v128.load(zeroAt + row);
    const least = f32x4.neg(z);
    const most = f32x4.sub(f32x4.splat(levels), z);
    // Weights in units of s0: losses of one row compare the same, and tiny weights cannot underflow.
    let at = groupAt + row;
    let weightAt = weightsAt + row;
    for (let j = 0; j < columns; j++) {
      v128.store(scratchAt + <usize>j * VECTOR, f32x4.div(v128.load(at), s0));
      at += step;
      if (weighted) {
        v128.store(weightScratch + <usize>j * VECTOR, v128.load(weightAt));
        weightAt += step;
      }
    }
    let best = f32x4.splat(Infinity);
    let factor = f32x4.splat(1);
    for (let t = 0; t <= 100; t++) {
      const candidate = t <= 50 ? 1 + (0.1 * <f64>t) / 50 : 1 - (0.1 * <f64>(t - 50)) / 50;
      const p = f32x4.splat(<f32>candidate);
      const inverse = f32x4.splat(<f32>(1 / candidate));
      let loss = f32x4.splat(0);
      let j = 0;
      while (j < columns) {
        const stop = min(j + STRIP, columns);
        for (; j < stop; j++) {
          const u = v128.load(scratchAt + <usize>j * VECTOR);
          const c = f32x4.pmin(f32x4.pmax(f32x4.nearest(f32x4.mul(u, inverse)), least), most);
          const e = f32x4.sub(u, f32x4.mul(p, c));
          let term = pow12(f32x4.mul(e, e));
          if (weighted) term = f32x4.mul(term, v128.load(weightScratch + <usize>j * VECTOR));
          loss = f32x4.add(loss, term);
        }
        if (i32x4.all_true(f32x4.ge(loss, best))) break;
      }
      // The terms are not negative, so a partial sum that is not below the best never would have been.
      const better = f32x4.lt(loss, best);
      best = v128.bitselect(loss, best, better);
      factor = v128.bitselect(p, factor, better);
    }
    v128.store(scaleAt + row, f32x4.mul(factor, s0));
  }
}

/** Multiplies each row's scale by the best of 101 factors within 10 % of 1, on strict improvement, 1 first. The zero stays. */
export function searchGrid(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  levels: f32,
  scaleAt: usize,
  zeroAt: usize,
  scratchAt: usize,
): void {
  search(false, groupAt, columns, stride, rows, levels, scaleAt, zeroAt, 0, scratchAt);
}

/** The same with a weight for every element's loss, laid out as the group is. */
export function searchWeightedGrid(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  levels: f32,
  scaleAt: usize,
  zeroAt: usize,
  weightsAt: usize,
  scratchAt: usize,
): void {
  search(true, groupAt, columns, stride, rows, levels, scaleAt, zeroAt, weightsAt, scratchAt);
}
