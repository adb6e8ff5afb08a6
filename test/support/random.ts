/** Seeded numbers for tests. */

/** Uniform in [0, 1): mulberry32. */
export function randomSource(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** `count` values uniform in [center - spread, center + spread). */
export function randomValues(random: () => number, count: number, spread = 1, center = 0): Float32Array {
  return Float32Array.from({ length: count }, () => center + spread * (2 * random() - 1));
}
