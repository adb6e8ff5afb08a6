/** The election of signs (merging.md, section 4), four elements at a time: everything about an element stays in registers. */
import { lower, rounded, upper, vectorAt } from './combine';

const ZERO: v128 = f64x2.splat(0);

/** What the agreeing sum is divided by. */
const NOTHING: i32 = 0;
const POSITIVE_WEIGHTS: i32 = 1;

/** The mean of what agrees, for two elements: N and Z, the divisor guarded against zero. */
// @ts-ignore: decorator
@inline
function divided(sum: v128, weight: v128, mean: i32, least: v128): v128 {
  if (mean == NOTHING) return sum;
  // Nobody agrees: 0 / least is the 0 that 0 / 1 is.
  if (mean == POSITIVE_WEIGHTS) return f64x2.div(sum, f64x2.max(weight, least));
  return f64x2.div(sum, v128.bitselect(f64x2.splat(1), weight, f64x2.lt(f64x2.abs(weight), least)));
}

/**
 * `out = base + scale N` or `base + scale N / Z`, with the sums over the experts that agree with the sign of all: of `factors_k x_k` in N,
 * of `weights_k` in Z. Divisors below `least` count as 1. Writes whole vectors of four.
 */
export function electSigns(
  baseAt: usize,
  vectorsAt: usize,
  factorsAt: usize,
  weightsAt: usize,
  count: i32,
  scale: f64,
  mean: i32,
  least: f64,
  outAt: usize,
  n: i32,
): void {
  const factor = f64x2.splat(scale);
  const smallest = f64x2.splat(least);
  for (let i: usize = 0; i < <usize>n << 2; i += 16) {
    let positive0 = ZERO;
    let positive1 = ZERO;
    let negative0 = ZERO;
    let negative1 = ZERO;
    let above0 = ZERO;
    let above1 = ZERO;
    let below0 = ZERO;
    let below1 = ZERO;
    for (let k = 0; k < count; k++) {
      const x = v128.load(vectorAt(vectorsAt, k) + i);
      const f = v128.load64_splat(factorsAt + (<usize>k << 3));
      const w = v128.load64_splat(weightsAt + (<usize>k << 3));
      const x0 = f64x2.mul(f, lower(x));
      const x1 = f64x2.mul(f, upper(x));
      const minus0 = f64x2.lt(x0, ZERO);
      const minus1 = f64x2.lt(x1, ZERO);
      negative0 = f64x2.add(negative0, v128.and(x0, minus0));
      negative1 = f64x2.add(negative1, v128.and(x1, minus1));
      positive0 = f64x2.add(positive0, v128.andnot(x0, minus0));
      positive1 = f64x2.add(positive1, v128.andnot(x1, minus1));
      if (mean != NOTHING) {
        // A zero agrees with neither sign.
        below0 = f64x2.add(below0, v128.and(w, minus0));
        below1 = f64x2.add(below1, v128.and(w, minus1));
        above0 = f64x2.add(above0, v128.and(w, f64x2.gt(x0, ZERO)));
        above1 = f64x2.add(above1, v128.and(w, f64x2.gt(x1, ZERO)));
      }
    }
    // A total of 0 counts as positive.
    const minus0 = f64x2.lt(f64x2.add(positive0, negative0), ZERO);
    const minus1 = f64x2.lt(f64x2.add(positive1, negative1), ZERO);
    const sum0 = f64x2.mul(factor, v128.bitselect(negative0, positive0, minus0));
    const sum1 = f64x2.mul(factor, v128.bitselect(negative1, positive1, minus1));
    const weight0 = v128.bitselect(below0, above0, minus0);
    const weight1 = v128.bitselect(below1, above1, minus1);
    const base = v128.load(baseAt + i);
    const low = f64x2.add(lower(base), divided(sum0, weight0, mean, smallest));
    const high = f64x2.add(upper(base), divided(sum1, weight1, mean, smallest));
    v128.store(outAt + i, rounded(low, high));
  }
}
