/** Ranks of magnitudes: float32 bit patterns with the sign cleared order like the magnitudes. */

const MAGNITUDE: v128 = i32x4.splat(0x7fffffff);

// @ts-ignore: decorator
@inline
function count(countsAt: usize, bin: u32): void {
  const at = countsAt + (<usize>bin << 2);
  store<u32>(at, load<u32>(at) + 1);
}

/**
 * Counts the high halves of `n` magnitudes, those at even places in 2^15 counters and those at odd places in as many behind them: neighbours
 * are often alike, and a counter that was just written has to be waited for.
 */
export function countHigh(valuesAt: usize, n: i32, countsAt: usize): void {
  const oddAt = countsAt + (0x8000 << 2);
  let i = 0;
  for (; i + 2 <= n; i += 2) {
    const pair = load<u64>(valuesAt + (<usize>i << 2));
    count(countsAt, (<u32>pair & 0x7fffffff) >>> 16);
    count(oddAt, <u32>(pair >>> 48) & 0x7fff);
  }
  if (i < n) count(countsAt, (load<u32>(valuesAt + (<usize>i << 2)) & 0x7fffffff) >>> 16);
}

/** Counts each magnitude in `[first, first + length)`, in `length` counters. Few are: they are looked for four at a time. */
export function countWithin(valuesAt: usize, n: i32, first: u32, length: u32, countsAt: usize): void {
  const least = i32x4.splat(first);
  const most = i32x4.splat(length);
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    const at = valuesAt + (<usize>i << 2);
    const found = i32x4.lt_u(i32x4.sub(v128.and(v128.load(at), MAGNITUDE), least), most);
    if (!v128.any_true(found)) continue;
    for (let lane: usize = 0; lane < 16; lane += 4) {
      const place = (load<u32>(at + lane) & 0x7fffffff) - first;
      if (place < length) count(countsAt, place);
    }
  }
  for (; i < n; i++) {
    const place = (load<u32>(valuesAt + (<usize>i << 2)) & 0x7fffffff) - first;
    if (place < length) count(countsAt, place);
  }
}

/** How many of `n` magnitudes are equal to `bits`. */
export function countEqual(valuesAt: usize, n: i32, bits: i32): i32 {
  const wanted = i32x4.splat(bits);
  let counts = i32x4.splat(0);
  let i = 0;
  for (; i + 4 <= n; i += 4) {
    counts = i32x4.sub(counts, i32x4.eq(v128.and(v128.load(valuesAt + (<usize>i << 2)), MAGNITUDE), wanted));
  }
  let total = i32x4.extract_lane(counts, 0) + i32x4.extract_lane(counts, 1) + i32x4.extract_lane(counts, 2) + i32x4.extract_lane(counts, 3);
  for (; i < n; i++) if ((load<i32>(valuesAt + (<usize>i << 2)) & 0x7fffffff) == bits) total++;
  return total;
}

/** Zeros what is not of a magnitude in `(above, below)`; whole vectors of four. */
export function keepBetween(valuesAt: usize, n: i32, above: i32, below: i32): void {
  const least = i32x4.splat(above);
  const most = i32x4.splat(below);
  for (let i: usize = 0; i < <usize>n << 2; i += 16) {
    const bits = v128.load(valuesAt + i);
    const magnitude = v128.and(bits, MAGNITUDE);
    const kept = v128.and(i32x4.gt_s(magnitude, least), i32x4.lt_s(magnitude, most));
    v128.store(valuesAt + i, v128.and(bits, kept));
  }
}
