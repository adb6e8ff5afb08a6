/** Codes as the GPTQ layout packs them: LSB-first bit streams in 32-bit words, in which a 3-bit code may straddle two words. */

/** Widths the layout holds. */
export type GptqBits = 2 | 3 | 4 | 8;

/**
 * Appends `count` values `values[first + k step]` to the stream whose words lie at `words[start + w wordStep]`; the words must be zeroed.
 * `count * bits` must be a multiple of 32, as the layout asks of every axis it packs.
 */
export function packStream(
  values: Uint8Array,
  first: number,
  step: number,
  count: number,
  bits: GptqBits,
  words: Uint32Array,
  start: number,
  wordStep: number,
): void {
  let target = start;
  let used = 0;
  for (let k = 0, i = first; k < count; k++, i += step) {
    const value = values[i];
    words[target] |= value << used;
    used += bits;
    if (used >= 32) {
      used -= 32;
      target += wordStep;
      if (used > 0) words[target] |= value >>> (bits - used);
    }
  }
}

/** Reverse of `packStream`: writes `values[first + k step]`. */
export function unpackStream(
  values: Uint8Array,
  first: number,
  step: number,
  count: number,
  bits: GptqBits,
  words: Uint32Array,
  start: number,
  wordStep: number,
): void {
  const mask = (1 << bits) - 1;
  let source = start;
  let used = 0;
  for (let k = 0, i = first; k < count; k++, i += step) {
    let value = words[source] >>> used;
    used += bits;
    if (used >= 32) {
      used -= 32;
      source += wordStep;
      if (used > 0) value |= words[source] << (bits - used);
    }
    values[i] = value & mask;
  }
}
