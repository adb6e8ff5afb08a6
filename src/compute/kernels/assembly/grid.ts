/** Grids from the extremes or the mean of each row of a group. */

const ONE: v128 = f32x4.splat(1);

/** Bytes of one vector: four rows. */
const VECTOR: usize = 16;

/**
 * Min-max grid with zero in range (slim-llm 4.3): `lo = min(0, min w)`, `hi = max(0, max w)`, `s = (hi - lo) / levels`, `z = round(-lo / s)`.
 * Symmetric: `hi = -lo = max |w|`, `z = (levels + 1) / 2`. A row of zeros gets s = 1, z = 0 (section 9).
 */
export function minMaxGrid(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  levels: f32,
  symmetric: bool,
  scaleAt: usize,
  shiftAt: usize,
): void {
  const step = <usize>stride * 4;
  const top = f32x4.splat(levels);
  const middle = f32x4.splat((levels + 1) / 2);
  const zeros = f32x4.splat(0);
  const end = <usize>rows * 4;
  for (let row: usize = 0; row < end; row += VECTOR) {
    let lo = zeros;
    let hi = zeros;
    let at = groupAt + row;
    for (let j = 0; j < columns; j++) {
      const w = v128.load(at);
      // min and max, not pmin and pmax: a NaN must survive, so that the caller sees it.
      lo = f32x4.min(lo, w);
      hi = f32x4.max(hi, w);
      at += step;
    }
    if (symmetric) {
      hi = f32x4.max(f32x4.neg(lo), hi);
      lo = f32x4.neg(hi);
    }
    const s = f32x4.div(f32x4.sub(hi, lo), top);
    const empty = f32x4.eq(s, zeros);
    const z = symmetric ? middle : f32x4.nearest(f32x4.div(f32x4.neg(lo), s));
    v128.store(scaleAt + row, v128.bitselect(ONE, s, empty));
    v128.store(shiftAt + row, v128.bitselect(zeros, z, empty));
  }
}

/**
 * Two levels `mu -+ a`, `mu = mean w` (0 when symmetric), `a = mean |w|`, stored as `o = mu - a`, `s = 2 a` (slim-llm 4.3).
 * A constant row gets s = 1 and itself as the lower level, which makes it exact.
 */
export function twoLevelGrid(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  symmetric: bool,
  scaleAt: usize,
  shiftAt: usize,
): void {
  const step = <usize>stride * 4;
  const count = f32x4.splat(<f32>columns);
  const zeros = f32x4.splat(0);
  const end = <usize>rows * 4;
  for (let row: usize = 0; row < end; row += VECTOR) {
    const first = v128.load(groupAt + row);
    let constant = f32x4.eq(first, first);
    let mu = zeros;
    let a = zeros;
    let at = groupAt + row;
    for (let j = 0; j < columns; j++) {
      const w = v128.load(at);
      mu = f32x4.add(mu, w);
      a = f32x4.add(a, f32x4.abs(w));
      constant = v128.and(constant, f32x4.eq(w, first));
      at += step;
    }
    mu = f32x4.div(mu, count);
    if (symmetric) {
      mu = zeros;
      constant = zeros; // levels -a and +a hold any constant row
    }
    a = f32x4.div(a, count);
    const single = v128.or(constant, f32x4.eq(a, zeros));
    v128.store(scaleAt + row, v128.bitselect(ONE, f32x4.add(a, a), single));
    const lower = v128.bitselect(first, f32x4.sub(mu, a), constant);
    v128.store(shiftAt + row, lower);
  }
}
