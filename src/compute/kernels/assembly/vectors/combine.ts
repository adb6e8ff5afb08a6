/**
 * Sums of several vectors, in float64 and rounded once. `vectorsAt` holds their addresses, four bytes each, coefficients are float64.
 * Results are written in whole vectors of four: the room behind `out` is the caller's.
 */

const ZERO: v128 = f64x2.splat(0);

// @ts-ignore: decorator
@inline
export function lower(values: v128): v128 {
  return f64x2.promote_low_f32x4(values);
}

// @ts-ignore: decorator
@inline
export function upper(values: v128): v128 {
  return f64x2.promote_low_f32x4(v128.shuffle<i64>(values, values, 1, 1));
}

/** Four float32 from two pairs of float64. */
// @ts-ignore: decorator
@inline
export function rounded(low: v128, high: v128): v128 {
  return v128.shuffle<i64>(f32x4.demote_f64x2_zero(low), f32x4.demote_f64x2_zero(high), 0, 2);
}

// @ts-ignore: decorator
@inline
export function vectorAt(vectorsAt: usize, k: i32): usize {
  return <usize>load<u32>(vectorsAt + (<usize>k << 2));
}

/** `out = sum c_k x_k`. */
export function weightedSum(vectorsAt: usize, coefficientsAt: usize, count: i32, outAt: usize, n: i32): void {
  for (let i: usize = 0; i < <usize>n << 2; i += 32) {
    let sum0 = ZERO;
    let sum1 = ZERO;
    let sum2 = ZERO;
    let sum3 = ZERO;
    for (let k = 0; k < count; k++) {
      const at = vectorAt(vectorsAt, k) + i;
      const c = v128.load64_splat(coefficientsAt + (<usize>k << 3));
      const x = v128.load(at);
      const y = v128.load(at, 16);
      sum0 = f64x2.add(sum0, f64x2.mul(c, lower(x)));
      sum1 = f64x2.add(sum1, f64x2.mul(c, upper(x)));
      sum2 = f64x2.add(sum2, f64x2.mul(c, lower(y)));
      sum3 = f64x2.add(sum3, f64x2.mul(c, upper(y)));
    }
    v128.store(outAt + i, rounded(sum0, sum1));
    v128.store(outAt + i, rounded(sum2, sum3), 16);
  }
}

/** `out = base + sum c_k (x_k - base)`, the differences exact. */
export function addTaskVectors(baseAt: usize, vectorsAt: usize, coefficientsAt: usize, count: i32, outAt: usize, n: i32): void {
  for (let i: usize = 0; i < <usize>n << 2; i += 32) {
    const base = v128.load(baseAt + i);
    const next = v128.load(baseAt + i, 16);
    const base0 = lower(base);
    const base1 = upper(base);
    const base2 = lower(next);
    const base3 = upper(next);
    let sum0 = base0;
    let sum1 = base1;
    let sum2 = base2;
    let sum3 = base3;
    for (let k = 0; k < count; k++) {
      const at = vectorAt(vectorsAt, k) + i;
      const c = v128.load64_splat(coefficientsAt + (<usize>k << 3));
      const x = v128.load(at);
      const y = v128.load(at, 16);
      sum0 = f64x2.add(sum0, f64x2.mul(c, f64x2.sub(lower(x), base0)));
      sum1 = f64x2.add(sum1, f64x2.mul(c, f64x2.sub(upper(x), base1)));
      sum2 = f64x2.add(sum2, f64x2.mul(c, f64x2.sub(lower(y), base2)));
      sum3 = f64x2.add(sum3, f64x2.mul(c, f64x2.sub(upper(y), base3)));
    }
    v128.store(outAt + i, rounded(sum0, sum1));
    v128.store(outAt + i, rounded(sum2, sum3), 16);
  }
}

/** `out = base + scale sum c_k x_k`. */
export function addScaled(
  baseAt: usize,
  vectorsAt: usize,
  coefficientsAt: usize,
  count: i32,
  scale: f64,
  outAt: usize,
  n: i32,
): void {
  const factor = f64x2.splat(scale);
  for (let i: usize = 0; i < <usize>n << 2; i += 16) {
    let sum0 = ZERO;
    let sum1 = ZERO;
    for (let k = 0; k < count; k++) {
      const x = v128.load(vectorAt(vectorsAt, k) + i);
      const c = v128.load64_splat(coefficientsAt + (<usize>k << 3));
      sum0 = f64x2.add(sum0, f64x2.mul(c, lower(x)));
      sum1 = f64x2.add(sum1, f64x2.mul(c, upper(x)));
    }
    const base = v128.load(baseAt + i);
    const low = f64x2.add(lower(base), f64x2.mul(factor, sum0));
    const high = f64x2.add(upper(base), f64x2.mul(factor, sum1));
    v128.store(outAt + i, rounded(low, high));
  }
}

/** `out = x - y`, float32. */
export function subtract(xAt: usize, yAt: usize, outAt: usize, n: i32): void {
  for (let i: usize = 0; i < <usize>n << 2; i += 16) {
    v128.store(outAt + i, f32x4.sub(v128.load(xAt + i), v128.load(yAt + i)));
  }
}
