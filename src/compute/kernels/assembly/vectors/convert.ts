/** 16-bit floats to float32 and back: exact widening, rounding to nearest even. Eight at a time; the last few go through a padded copy. */
import { lower, upper } from './combine';

const ZERO: v128 = i32x4.splat(0);
const EXPONENT: v128 = i32x4.splat(0x7f800000);
const MAGNITUDE: v128 = i32x4.splat(0x7fffffff);
const HALF_EXPONENT: v128 = i32x4.splat(0x7c00);

/** Where the last few elements are worked on. */
const tailCodes = memory.data(16, 16);
const tailValues = memory.data(32, 16);
const tailBase = memory.data(32, 16);

/** All ones where a float32 is NaN or infinite. */
// @ts-ignore: decorator
@inline
function nonfinite(bits: v128): v128 {
  return i32x4.eq(v128.and(bits, EXPONENT), EXPONENT);
}

/** Four float32 from F16 codes, one in each 32-bit lane. */
// @ts-ignore: decorator
@inline
function fromHalf(codes: v128): v128 {
  const sign = i32x4.shl(v128.and(codes, i32x4.splat(0x8000)), 16);
  const shifted = i32x4.shl(v128.and(codes, i32x4.splat(0x7fff)), 13);
  const exponent = v128.and(codes, HALF_EXPONENT);
  const biased = i32x4.add(shifted, i32x4.splat(112 << 23));
  // Infinities and NaN: the exponent of all ones moves up once more.
  const top = v128.and(i32x4.eq(exponent, HALF_EXPONENT), i32x4.splat(112 << 23));
  // Below 2^-14: the mantissa after 2^-14's own bit, which is then taken away.
  const small = f32x4.sub(i32x4.add(shifted, i32x4.splat(113 << 23)), i32x4.splat(113 << 23));
  const size = v128.bitselect(small, i32x4.add(biased, top), i32x4.eq(exponent, ZERO));
  return v128.or(sign, size);
}

/** F16 codes of four finite float32, one in each 32-bit lane; 65520 and more becomes infinite. */
// @ts-ignore: decorator
@inline
function toHalf(bits: v128): v128 {
  const sign = v128.and(i32x4.shr_u(bits, 16), i32x4.splat(0x8000));
  const size = v128.and(bits, MAGNITUDE);
  const odd = v128.and(i32x4.shr_u(size, 13), i32x4.splat(1));
  const normal = i32x4.shr_u(i32x4.add(i32x4.add(size, i32x4.splat(0xfff - 0x38000000)), odd), 13);
  // A float32 near 0.5 counts in units of 2^-24, as F16 does below 2^-14, and the addition rounds to them.
  const small = i32x4.sub(f32x4.add(size, i32x4.splat(0x3f000000)), i32x4.splat(0x3f000000));
  const code = v128.bitselect(small, normal, i32x4.lt_s(size, i32x4.splat(0x38800000)));
  return v128.or(sign, v128.bitselect(i32x4.splat(0x7c00), code, i32x4.ge_s(size, i32x4.splat(0x47800000))));
}

/** BF16 codes of four finite float32, one in each 32-bit lane. */
// @ts-ignore: decorator
@inline
function toBrain(bits: v128): v128 {
  const odd = v128.and(i32x4.shr_u(bits, 16), i32x4.splat(1));
  return i32x4.shr_u(i32x4.add(i32x4.add(bits, i32x4.splat(0x7fff)), odd), 16);
}

/** Widens eight codes; returns where they are not finite. */
// @ts-ignore: decorator
@inline
function widenEight(brain: bool, codesAt: usize, outAt: usize): v128 {
  const codes = v128.load(codesAt);
  const low = brain ? v128.shuffle<i16>(ZERO, codes, 0, 8, 0, 9, 0, 10, 0, 11) : fromHalf(i32x4.extend_low_i16x8_u(codes));
  const high = brain ? v128.shuffle<i16>(ZERO, codes, 4, 12, 5, 13, 6, 14, 7, 15) : fromHalf(i32x4.extend_high_i16x8_u(codes));
  v128.store(outAt, low);
  v128.store(outAt, high, 16);
  return v128.or(nonfinite(low), nonfinite(high));
}

// @ts-ignore: decorator
@inline
function widen(brain: bool, codesAt: usize, outAt: usize, n: i32): bool {
  let bad = ZERO;
  let i = 0;
  for (; i + 8 <= n; i += 8) bad = v128.or(bad, widenEight(brain, codesAt + (<usize>i << 1), outAt + (<usize>i << 2)));
  if (i < n) {
    const rest = <usize>(n - i);
    memory.fill(tailCodes, 0, 16);
    memory.copy(tailCodes, codesAt + (<usize>i << 1), rest << 1);
    bad = v128.or(bad, widenEight(brain, tailCodes, tailValues));
    memory.copy(outAt + (<usize>i << 2), tailValues, rest << 2);
  }
  return !v128.any_true(bad);
}

/** Returns whether all are finite. */
export function widenBf16(codesAt: usize, outAt: usize, n: i32): bool {
  return widen(true, codesAt, outAt, n);
}

/** Returns whether all are finite. */
export function widenF16(codesAt: usize, outAt: usize, n: i32): bool {
  return widen(false, codesAt, outAt, n);
}

/** Whether `n` float32 are all finite. */
export function areFinite(valuesAt: usize, n: i32): bool {
  let bad = ZERO;
  let i = 0;
  for (; i + 4 <= n; i += 4) bad = v128.or(bad, nonfinite(v128.load(valuesAt + (<usize>i << 2))));
  for (; i < n; i++) if ((load<u32>(valuesAt + (<usize>i << 2)) & 0x7f800000) == 0x7f800000) return false;
  return !v128.any_true(bad);
}

// @ts-ignore: decorator
@inline
function square(value: v128): v128 {
  return f64x2.mul(value, value);
}

// @ts-ignore: decorator
@inline
function difference(x: v128, y: v128): v128 {
  return f64x2.sub(lower(x), lower(y));
}

// @ts-ignore: decorator
@inline
function upperDifference(x: v128, y: v128): v128 {
  return f64x2.sub(upper(x), upper(y));
}

// @ts-ignore: decorator
@inline
function narrow(brain: bool, valuesAt: usize, baseAt: usize, codesAt: usize, n: i32, lossAt: usize): bool {
  let bad = ZERO;
  let error0 = ZERO;
  let error1 = ZERO;
  let change0 = ZERO;
  let change1 = ZERO;
  for (let i = 0; i < n; i += 8) {
    let from = valuesAt + (<usize>i << 2);
    let beside = baseAt + (<usize>i << 2);
    let to = codesAt + (<usize>i << 1);
    const last = i + 8 > n;
    if (last) {
      const rest = <usize>(n - i) << 2;
      memory.fill(tailValues, 0, 32);
      memory.copy(tailValues, from, rest);
      memory.fill(tailBase, 0, 32);
      if (baseAt != 0) memory.copy(tailBase, beside, rest);
      from = tailValues;
      beside = tailBase;
      to = tailCodes;
    }
    const low = v128.load(from);
    const high = v128.load(from, 16);
    const lowCodes = brain ? toBrain(low) : toHalf(low);
    const highCodes = brain ? toBrain(high) : toHalf(high);
    v128.store(to, i16x8.narrow_i32x4_u(lowCodes, highCodes));
    const storedLow = brain ? i32x4.shl(lowCodes, 16) : fromHalf(lowCodes);
    const storedHigh = brain ? i32x4.shl(highCodes, 16) : fromHalf(highCodes);
    bad = v128.or(bad, v128.or(nonfinite(storedLow), nonfinite(storedHigh)));
    bad = v128.or(bad, v128.or(nonfinite(low), nonfinite(high)));
    if (baseAt != 0) {
      const base = v128.load(beside);
      const next = v128.load(beside, 16);
      error0 = f64x2.add(error0, square(difference(storedLow, low)));
      error1 = f64x2.add(error1, square(upperDifference(storedLow, low)));
      change0 = f64x2.add(change0, square(difference(low, base)));
      change1 = f64x2.add(change1, square(upperDifference(low, base)));
      error0 = f64x2.add(error0, square(difference(storedHigh, high)));
      error1 = f64x2.add(error1, square(upperDifference(storedHigh, high)));
      change0 = f64x2.add(change0, square(difference(high, next)));
      change1 = f64x2.add(change1, square(upperDifference(high, next)));
    }
    if (last) memory.copy(codesAt + (<usize>i << 1), tailCodes, <usize>(n - i) << 1);
  }
  const error = f64x2.add(error0, error1);
  const change = f64x2.add(change0, change1);
  store<f64>(lossAt, f64x2.extract_lane(error, 0) + f64x2.extract_lane(error, 1));
  store<f64>(lossAt, f64x2.extract_lane(change, 0) + f64x2.extract_lane(change, 1), 8);
  return !v128.any_true(bad);
}

/**
 * Returns whether all values and all codes are finite; if not, the codes of the values that are not mean nothing. Two float64 at `lossAt` become
 * the sums of `(stored - value)^2` and `(value - base)^2`, or 0 without a base.
 */
export function narrowBf16(valuesAt: usize, baseAt: usize, codesAt: usize, n: i32, lossAt: usize): bool {
  return narrow(true, valuesAt, baseAt, codesAt, n, lossAt);
}

/** As `narrowBf16`. */
export function narrowF16(valuesAt: usize, baseAt: usize, codesAt: usize, n: i32, lossAt: usize): bool {
  return narrow(false, valuesAt, baseAt, codesAt, n, lossAt);
}
