/** Grids fitted to weighted squared errors over scale and zero point (slim-llm 5.4). */

const VECTOR: usize = 16;
const ONE: v128 = f32x4.splat(1);
const ZERO: v128 = f32x4.splat(0);

/** Normal range of F16: values outside it are stored as float32. */
const F16_LEAST: f32 = 0.00006103515625;
const F16_MOST: f32 = 65504;

/** Rounds of the two-level search. */
const ROUNDS: i32 = 8;
/** Times each finalist's scale is fitted to its codes and its codes to the scale. */
const REFITS: i32 = 3;

/** Positive floats with 10 bits after the leading one, half to even: the F16 value where it is a normal one. */
// @ts-ignore: decorator
@inline
function roundTo10Bits(x: v128): v128 {
  const odd = v128.and(i32x4.shr_u(x, 13), i32x4.splat(1));
  return v128.and(i32x4.add(i32x4.add(x, odd), i32x4.splat(0xfff)), i32x4.splat(~0x1fff));
}

/** Positive scales as artifacts store them. */
// @ts-ignore: decorator
@inline
function storedScale(s: v128): v128 {
  const normal = v128.and(f32x4.ge(s, f32x4.splat(F16_LEAST)), f32x4.le(s, f32x4.splat(F16_MOST)));
  return v128.bitselect(roundTo10Bits(s), s, normal);
}

/** Offsets of either sign as artifacts store them; below F16's normal range its values are 2^-24 apart. */
// @ts-ignore: decorator
@inline
function storedOffset(o: v128): v128 {
  const size = f32x4.abs(o);
  const small = f32x4.sub(f32x4.add(size, f32x4.splat(0.5)), f32x4.splat(0.5));
  const rounded = v128.bitselect(small, roundTo10Bits(size), f32x4.lt(size, f32x4.splat(F16_LEAST)));
  const sign = v128.and(o, i32x4.splat(0x80000000));
  return v128.bitselect(v128.or(rounded, sign), o, f32x4.le(size, f32x4.splat(F16_MOST)));
}

// @ts-ignore: decorator
@inline
function clamp(x: v128, least: v128, most: v128): v128 {
  return f32x4.pmin(f32x4.pmax(x, least), most);
}

// A candidate's sums, and the two best candidates of four rows. Globals, because functions return one value; each is written once a
// pass over the columns, so that they cost nothing.
let bestScore: v128 = ZERO;
let bestScale: v128 = ZERO;
let bestZero: v128 = ZERO;
let nextScore: v128 = ZERO;
let nextScale: v128 = ZERO;
let nextZero: v128 = ZERO;

/** Keeps the candidate if it is among the two best, which differ in their scores. */
// @ts-ignore: decorator
@inline
function consider(score: v128, scale: v128, z: v128): void {
  const wins = f32x4.lt(score, bestScore);
  const places = v128.and(f32x4.lt(score, nextScore), f32x4.gt(score, bestScore));
  nextScore = v128.bitselect(bestScore, v128.bitselect(score, nextScore, places), wins);
  nextScale = v128.bitselect(bestScale, v128.bitselect(scale, nextScale, places), wins);
  nextZero = v128.bitselect(bestZero, v128.bitselect(z, nextZero, places), wins);
  bestScore = v128.bitselect(score, bestScore, wins);
  bestScale = v128.bitselect(scale, bestScale, wins);
  bestZero = v128.bitselect(z, bestZero, wins);
}

/**
 * Tries the zeros z1 - 1, z1, z1 + 1 with the scale s. A candidate is judged by what its codes cost once the scale is refitted to them,
 * `sum d w^2 - (sum d c w)^2 / sum d c^2`, of which the first term is the same for all: only narrow grids, where the second is not
 * almost as large, can be judged so in float32.
 */
// @ts-ignore: decorator
@inline
function tryNarrow(rowAt: usize, columns: i32, weightsAt: usize, s: v128, z1: v128, levels: v128): void {
  const inverse = f32x4.div(ONE, s);
  const z0 = f32x4.sub(z1, ONE);
  const z2 = f32x4.add(z1, ONE);
  const least0 = f32x4.neg(z0);
  const least1 = f32x4.neg(z1);
  const least2 = f32x4.neg(z2);
  const most0 = f32x4.sub(levels, z0);
  const most1 = f32x4.sub(levels, z1);
  const most2 = f32x4.sub(levels, z2);
  let cw0 = ZERO;
  let cw1 = ZERO;
  let cw2 = ZERO;
  let cc0 = ZERO;
  let cc1 = ZERO;
  let cc2 = ZERO;
  for (let j = 0; j < columns; j++) {
    const w = v128.load(rowAt);
    const d = v128.load32_splat(weightsAt);
    const r = f32x4.nearest(f32x4.mul(w, inverse));
    const c0 = clamp(r, least0, most0);
    const c1 = clamp(r, least1, most1);
    const c2 = clamp(r, least2, most2);
    const dc0 = f32x4.mul(d, c0);
    const dc1 = f32x4.mul(d, c1);
    const dc2 = f32x4.mul(d, c2);
    cw0 = f32x4.add(cw0, f32x4.mul(dc0, w));
    cw1 = f32x4.add(cw1, f32x4.mul(dc1, w));
    cw2 = f32x4.add(cw2, f32x4.mul(dc2, w));
    cc0 = f32x4.add(cc0, f32x4.mul(dc0, c0));
    cc1 = f32x4.add(cc1, f32x4.mul(dc1, c1));
    cc2 = f32x4.add(cc2, f32x4.mul(dc2, c2));
    rowAt += VECTOR;
    weightsAt += 4;
  }
  // The middle zero first: it is the likeliest, and of equals the first is kept.
  const s1 = f32x4.div(cw1, cc1);
  consider(f32x4.neg(f32x4.mul(s1, cw1)), s1, z1);
  const s0 = f32x4.div(cw0, cc0);
  consider(f32x4.neg(f32x4.mul(s0, cw0)), s0, z0);
  const s2 = f32x4.div(cw2, cc2);
  consider(f32x4.neg(f32x4.mul(s2, cw2)), s2, z2);
}

/** The same for wide grids: `sum d e^2 - (sum d c e)^2 / sum d c^2` with `e = w - s c`, which loses no digits. */
// @ts-ignore: decorator
@inline
function tryWide(rowAt: usize, columns: i32, weightsAt: usize, s: v128, z: v128, levels: v128): void {
  const inverse = f32x4.div(ONE, s);
  const least = f32x4.neg(z);
  const most = f32x4.sub(levels, z);
  let ee = ZERO;
  let ce = ZERO;
  let cc = ZERO;
  for (let j = 0; j < columns; j++) {
    const w = v128.load(rowAt);
    const d = v128.load32_splat(weightsAt);
    const c = clamp(f32x4.nearest(f32x4.mul(w, inverse)), least, most);
    const e = f32x4.sub(w, f32x4.mul(s, c));
    const de = f32x4.mul(d, e);
    ee = f32x4.add(ee, f32x4.mul(de, e));
    ce = f32x4.add(ce, f32x4.mul(de, c));
    cc = f32x4.add(cc, f32x4.mul(f32x4.mul(d, c), c));
    rowAt += VECTOR;
    weightsAt += 4;
  }
  const shift = f32x4.div(ce, cc);
  consider(f32x4.sub(ee, f32x4.mul(shift, ce)), f32x4.add(s, shift), z);
}

/** Tries the scale s with three zeros around z. */
// @ts-ignore: decorator
@inline
function tryZeros(narrow: bool, rowAt: usize, columns: i32, weightsAt: usize, s: v128, z: v128, levels: v128): void {
  const middle = clamp(z, ONE, f32x4.sub(levels, ONE));
  if (narrow) {
    tryNarrow(rowAt, columns, weightsAt, s, middle, levels);
  } else {
    tryWide(rowAt, columns, weightsAt, s, middle, levels);
    tryWide(rowAt, columns, weightsAt, s, f32x4.sub(middle, ONE), levels);
    tryWide(rowAt, columns, weightsAt, s, f32x4.add(middle, ONE), levels);
  }
}

let finalLoss: v128 = ZERO;
let finalScale: v128 = ZERO;
let finalZero: v128 = ZERO;

/** Evaluates a finalist with its scale as stored, refits, and again; what is best so far stays on equality. */
// @ts-ignore: decorator
@inline
function settle(rowAt: usize, columns: i32, weightsAt: usize, scale: v128, z: v128, levels: v128, unit: v128, perUnit: v128): void {
  const least = f32x4.neg(z);
  const most = f32x4.sub(levels, z);
  let s = f32x4.mul(storedScale(f32x4.mul(scale, unit)), perUnit);
  for (let round = 0; round < REFITS; round++) {
    const inverse = f32x4.div(ONE, s);
    let ee = ZERO;
    let ce = ZERO;
    let cc = ZERO;
    let w = rowAt;
    let weights = weightsAt;
    for (let j = 0; j < columns; j++) {
      const x = v128.load(w);
      const d = v128.load32_splat(weights);
      const c = clamp(f32x4.nearest(f32x4.mul(x, inverse)), least, most);
      const e = f32x4.sub(x, f32x4.mul(s, c));
      const de = f32x4.mul(d, e);
      ee = f32x4.add(ee, f32x4.mul(de, e));
      ce = f32x4.add(ce, f32x4.mul(de, c));
      cc = f32x4.add(cc, f32x4.mul(f32x4.mul(d, c), c));
      w += VECTOR;
      weights += 4;
    }
    const better = f32x4.lt(ee, finalLoss);
    finalLoss = v128.bitselect(ee, finalLoss, better);
    finalScale = v128.bitselect(s, finalScale, better);
    finalZero = v128.bitselect(z, finalZero, better);
    const refit = f32x4.mul(storedScale(f32x4.mul(f32x4.add(s, f32x4.div(ce, cc)), unit)), perUnit);
    const moved = v128.and(f32x4.gt(refit, ZERO), f32x4.ne(refit, s));
    if (!v128.any_true(moved)) return;
    s = v128.bitselect(refit, s, moved);
  }
}

/** Multiples of the min-max scale that are tried: `count` of them, equidistant from 1 down to `last`. */
// @ts-ignore: decorator
@inline
function start(levels: f32, i: i32): f32 {
  // Fewer levels clip more: the best scale of 2 bits lies anywhere from a fifth of the min-max scale up.
  if (levels == 3) return i == 0 ? 1 : 0.95 - 0.75 * (<f32>(i - 1) / 7);
  if (levels <= 15) return 1 - 0.7 * (<f32>i / 11);
  return 1 - 0.1 * (<f32>i / 3);
}

// @ts-ignore: decorator
@inline
function startCount(levels: f32): i32 {
  return levels == 3 ? 9 : levels <= 15 ? 12 : 4;
}

/**
 * Scale, zero and `sum d (w - wq)^2` of every row, at least 2 bits: section 5.4 with fewer candidates, because the zeros worth trying lie
 * around the one that cuts off as much below as above, and one pass tells what a candidate costs after its refit. The two best are refitted
 * and evaluated as stored. A row of zeros gets s = 1, z = 0; a row that is not finite a scale that is not.
 * `weightsAt` has one float a column; `scratchAt` has room for `columns` vectors.
 */
export function fitWeighted(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  levels: f32,
  weightsAt: usize,
  scaleAt: usize,
  zeroAt: usize,
  lossAt: usize,
  scratchAt: usize,
): void {
  const step = <usize>stride * 4;
  const end = <usize>rows * 4;
  const top = f32x4.splat(levels);
  const narrow = levels <= 15;
  const starts = startCount(levels);
  for (let row: usize = 0; row < end; row += VECTOR) {
    let lo = ZERO;
    let hi = ZERO;
    let at = groupAt + row;
    for (let j = 0; j < columns; j++) {
      const w = v128.load(at);
      lo = f32x4.min(lo, w);
      hi = f32x4.max(hi, w);
      at += step;
    }
    const minMax = f32x4.div(f32x4.sub(hi, lo), top);
    const empty = f32x4.eq(minMax, ZERO);
    // Weights in units of the power of two below s: exact, and nothing squared can leave float32.
    const unit = i32x4.max_s(v128.and(minMax, i32x4.splat(0x7f800000)), i32x4.splat(1 << 23));
    const perUnit = i32x4.sub(i32x4.splat(254 << 23), unit);
    at = groupAt + row;
    for (let j = 0; j < columns; j++) {
      v128.store(scratchAt + <usize>j * VECTOR, f32x4.mul(v128.load(at), perUnit));
      at += step;
    }
    lo = f32x4.mul(lo, perUnit);
    hi = f32x4.mul(hi, perUnit);
    const s0 = f32x4.mul(minMax, perUnit);
    bestScore = nextScore = f32x4.splat(Infinity);
    bestScale = nextScale = s0;
    bestZero = nextZero = clamp(f32x4.nearest(f32x4.div(f32x4.neg(lo), s0)), ZERO, top);
    for (let i = 0; i < starts; i++) {
      const s = f32x4.mul(storedScale(f32x4.mul(f32x4.mul(s0, f32x4.splat(start(levels, i))), unit)), perUnit);
      // lo / s cut off nothing below, levels - hi / s nothing above; between them, what is lost is shared.
      const below = f32x4.div(f32x4.neg(lo), s);
      const above = f32x4.sub(top, f32x4.div(hi, s));
      const z = f32x4.nearest(f32x4.mul(f32x4.add(below, above), f32x4.splat(0.5)));
      tryZeros(narrow, scratchAt, columns, weightsAt, s, z, top);
    }
    // A row with one far outlier may want a zero that is not in the middle: the winner's neighbours, twice. Two bits have no more zeros.
    for (let i = 0; i < 2 && levels > 3; i++) {
      const s = f32x4.mul(storedScale(f32x4.mul(bestScale, unit)), perUnit);
      tryZeros(narrow, scratchAt, columns, weightsAt, s, bestZero, top);
    }
    finalLoss = f32x4.splat(Infinity);
    finalScale = bestScale;
    finalZero = bestZero;
    settle(scratchAt, columns, weightsAt, bestScale, bestZero, top, unit, perUnit);
    settle(scratchAt, columns, weightsAt, nextScale, nextZero, top, unit, perUnit);
    const broken = v128.not(f32x4.lt(minMax, f32x4.splat(Infinity)));
    const scale = v128.bitselect(minMax, f32x4.mul(finalScale, unit), broken);
    v128.store(scaleAt + row, v128.bitselect(ONE, scale, empty));
    v128.store(zeroAt + row, v128.bitselect(ZERO, finalZero, v128.or(empty, broken)));
    const loss = f32x4.mul(f32x4.mul(finalLoss, unit), unit);
    v128.store(lossAt + row, v128.bitselect(ZERO, v128.bitselect(minMax, loss, broken), empty));
  }
}

/**
 * Two levels `o`, `o + s` and `sum d (w - wq)^2` of every row: weighted Lloyd from the weighted mean. A side that gets no weight falls on the
 * other; one level left means s = 1.
 */
export function fitTwoLevels(
  groupAt: usize,
  columns: i32,
  stride: i32,
  rows: i32,
  weightsAt: usize,
  scaleAt: usize,
  offsetAt: usize,
  lossAt: usize,
): void {
  const step = <usize>stride * 4;
  const end = <usize>rows * 4;
  const half = f32x4.splat(0.5);
  for (let row: usize = 0; row < end; row += VECTOR) {
    let total = ZERO;
    let mean = ZERO;
    let at = groupAt + row;
    for (let j = 0; j < columns; j++) {
      const d = v128.load32_splat(weightsAt + (<usize>j << 2));
      total = f32x4.add(total, d);
      mean = f32x4.add(mean, f32x4.mul(d, v128.load(at)));
      at += step;
    }
    mean = v128.bitselect(f32x4.div(mean, total), ZERO, f32x4.gt(total, ZERO));
    let border = mean;
    let low = mean;
    let high = mean;
    for (let round = 0; round < ROUNDS; round++) {
      let lowSum = ZERO;
      let lowWeight = ZERO;
      let highSum = ZERO;
      let highWeight = ZERO;
      at = groupAt + row;
      for (let j = 0; j < columns; j++) {
        const w = v128.load(at);
        const d = v128.load32_splat(weightsAt + (<usize>j << 2));
        const up = f32x4.ge(w, border);
        const dw = f32x4.mul(d, w);
        highSum = f32x4.add(highSum, v128.and(dw, up));
        highWeight = f32x4.add(highWeight, v128.and(d, up));
        lowSum = f32x4.add(lowSum, v128.andnot(dw, up));
        lowWeight = f32x4.add(lowWeight, v128.andnot(d, up));
        at += step;
      }
      const hasHigh = f32x4.gt(highWeight, ZERO);
      high = v128.bitselect(f32x4.div(highSum, highWeight), mean, hasHigh);
      low = v128.bitselect(f32x4.div(lowSum, lowWeight), high, f32x4.gt(lowWeight, ZERO));
      high = v128.bitselect(high, low, hasHigh);
      const next = f32x4.mul(f32x4.add(low, high), half);
      if (i32x4.all_true(f32x4.eq(next, border))) break;
      border = next;
    }
    const o = storedOffset(low);
    let s = storedScale(f32x4.sub(high, low));
    // What is not a number stays what it is: the caller refuses it.
    s = v128.bitselect(ONE, s, f32x4.le(s, ZERO));
    const middle = f32x4.add(o, f32x4.mul(s, half));
    let loss = ZERO;
    at = groupAt + row;
    for (let j = 0; j < columns; j++) {
      const w = v128.load(at);
      const e = f32x4.sub(w, f32x4.add(o, v128.and(s, f32x4.ge(w, middle))));
      loss = f32x4.add(loss, f32x4.mul(f32x4.mul(v128.load32_splat(weightsAt + (<usize>j << 2)), e), e));
      at += step;
    }
    v128.store(scaleAt + row, s);
    v128.store(offsetAt + row, o);
    v128.store(lossAt + row, loss);
  }
}
