/** Uniform random numbers of a tensor's elements, and what they drop (merging.md 2.4). */
import { lower, rounded, upper } from './combine';

// Philox4x32-10; src/compute/random.ts says where it is from.
const MULTIPLIER_0: u32 = 0xd2511f53;
const MULTIPLIER_1: u32 = 0xcd9e8d57;
const WEYL_0: u32 = 0x9e3779b9;
const WEYL_1: u32 = 0xbb67ae85;
const ROUNDS = 10;

/** Low halves of four 64-bit products in two vectors. */
// @ts-ignore: decorator
@inline
function lows(even: v128, odd: v128): v128 {
  return v128.shuffle<i32>(even, odd, 0, 2, 4, 6);
}

// @ts-ignore: decorator
@inline
function highs(even: v128, odd: v128): v128 {
  return v128.shuffle<i32>(even, odd, 1, 3, 5, 7);
}

/**
 * Uniform numbers 0 .. 2^24 - 1 of the elements `4 quad .. 4 (quad + quads)`, four quads at a time: `quads` is rounded up, and room there must be.
 * Quads are numbered below 2^32.
 */
export function fillUniform(outAt: usize, quad: u32, quads: i32, key0: u32, key1: u32): void {
  const m0 = i32x4.splat(MULTIPLIER_0);
  const m1 = i32x4.splat(MULTIPLIER_1);
  for (let i = 0; i < quads; i += 4) {
    let c0 = i32x4.add(i32x4.splat(quad + <u32>i), i32x4(0, 1, 2, 3));
    let c1 = i32x4.splat(0);
    let c2 = i32x4.splat(0);
    let c3 = i32x4.splat(0);
    let k0 = key0;
    let k1 = key1;
    for (let round = 0; round < ROUNDS; round++) {
      const a = i64x2.extmul_low_i32x4_u(c0, m0);
      const b = i64x2.extmul_high_i32x4_u(c0, m0);
      const c = i64x2.extmul_low_i32x4_u(c2, m1);
      const d = i64x2.extmul_high_i32x4_u(c2, m1);
      c0 = v128.xor(v128.xor(highs(c, d), c1), i32x4.splat(k0));
      c1 = lows(c, d);
      c2 = v128.xor(v128.xor(highs(a, b), c3), i32x4.splat(k1));
      c3 = lows(a, b);
      k0 += WEYL_0;
      k1 += WEYL_1;
    }
    // Lanes are quads; elements of a quad lie side by side.
    const low01 = v128.shuffle<i32>(c0, c1, 0, 4, 1, 5);
    const low23 = v128.shuffle<i32>(c2, c3, 0, 4, 1, 5);
    const high01 = v128.shuffle<i32>(c0, c1, 2, 6, 3, 7);
    const high23 = v128.shuffle<i32>(c2, c3, 2, 6, 3, 7);
    const at = outAt + (<usize>i << 4);
    v128.store(at, i32x4.shr_u(v128.shuffle<i64>(low01, low23, 0, 2), 8));
    v128.store(at, i32x4.shr_u(v128.shuffle<i64>(low01, low23, 1, 3), 8), 16);
    v128.store(at, i32x4.shr_u(v128.shuffle<i64>(high01, high23, 0, 2), 8), 32);
    v128.store(at, i32x4.shr_u(v128.shuffle<i64>(high01, high23, 1, 3), 8), 48);
  }
}

/** `out = x` where the element's uniform number is below `limit`, else 0; whole vectors of four. */
export function keepBelow(xAt: usize, uniformAt: usize, limit: i32, outAt: usize, n: i32): void {
  const most = i32x4.splat(limit);
  for (let i: usize = 0; i < <usize>n << 2; i += 16) {
    v128.store(outAt + i, v128.and(v128.load(xAt + i), i32x4.lt_s(v128.load(uniformAt + i), most)));
  }
}

/** `x /= divisor` in float64, rounded once; whole vectors of four. */
export function divide(xAt: usize, divisor: f64, n: i32): void {
  const by = f64x2.splat(divisor);
  for (let i: usize = 0; i < <usize>n << 2; i += 16) {
    const x = v128.load(xAt + i);
    v128.store(xAt + i, rounded(f64x2.div(lower(x), by), f64x2.div(upper(x), by)));
  }
}
