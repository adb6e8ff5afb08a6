/**
 * Operands of MatMulNBits at the true width of their codes. A 3-bit code in a nibble leaves one bit free and a 1-bit code in two bits another, so
 * each block of an operand folds into fewer bytes, which bytewise operations unfold again: a runtime does that once, when it loads the model.
 */

/** The bits that 3-bit codes use of a byte of two nibbles, and 1-bit codes of a byte of four pairs. */
export const THREE_BIT_MASK = 0x77;
export const ONE_BIT_MASK = 0x55;

/**
 * Folds 4-bit operands of 3-bit codes, blocks of `blockBytes` (a multiple of 4), into three arrays of a quarter of the size. Of a block's quarters
 * `q0..q3`, `s0, s1, s2` hold the first three; their free bits are such that `(s0 >> 3 ^ s1 >> 2 ^ s2 >> 1) & 0x77` is the fourth.
 */
export function squeezeThree(operand: Uint8Array, blockBytes: number): readonly [Uint8Array, Uint8Array, Uint8Array] {
  const quarter = blockBytes / 4;
  const size = operand.length / 4;
  const stored = [new Uint8Array(size), new Uint8Array(size), new Uint8Array(size)] as const;
  const [s0, s1, s2] = stored;
  for (let target = 0, block = 0; block < operand.length; block += blockBytes) {
    for (let i = block; i < block + quarter; i++, target++) {
      const a = operand[i];
      const b = operand[i + quarter];
      const c = operand[i + 2 * quarter];
      const missing = ((a >> 3) ^ (b >> 2) ^ (c >> 1) ^ operand[i + 3 * quarter]) & THREE_BIT_MASK;
      s0[target] = a ^ ((missing & 0x11) << 3);
      s1[target] = b ^ ((missing & 0x22) << 2);
      s2[target] = c ^ ((missing & 0x44) << 1);
    }
  }
  return stored;
}

/** Folds 2-bit operands of 1-bit codes, blocks of `blockBytes` (a multiple of 2), into half the size: the second half of a block one bit up. */
export function squeezeOne(operand: Uint8Array, blockBytes: number): Uint8Array {
  const half = blockBytes / 2;
  const stored = new Uint8Array(operand.length / 2);
  for (let target = 0, block = 0; block < operand.length; block += blockBytes) {
    for (let i = block; i < block + half; i++) stored[target++] = operand[i] | (operand[i + half] << 1);
  }
  return stored;
}
