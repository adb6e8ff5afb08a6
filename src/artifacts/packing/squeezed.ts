/**
 * Operands of MatMulNBits at the true width of their codes. Codes narrower than their places in an operand leave bits free, so each block of it folds
 * into fewer bytes, which bytewise operations unfold again: a runtime does that once, when it loads the model.
 */
import type { OperandBits } from './byte-rows.ts';

/** The bits of a byte that codes of 1, 2 and 3 bits use in operands of 2 and 4. */
export const CODE_MASKS = {
  2: { 1: 0x55, 2: 0xff, 3: 0, 4: 0, 8: 0 },
  4: { 1: 0x11, 2: 0x33, 3: 0x77, 4: 0xff, 8: 0 },
  8: { 1: 0, 2: 0, 3: 0, 4: 0, 8: 0xff },
} as const;

/** The fourth quarter of a block of 3-bit codes is the xor of the three stored ones, shifted right by so many bits. */
export const THREE_BIT_PLACES = [3, 2, 1] as const;

/** Codes of 1 or 2 bits: by how many bits a stored byte is to be shifted right to show each of the equal parts of its block, in order. */
export function placesOf(codeBits: number, operand: OperandBits): readonly number[] {
  return Array.from({ length: operand / codeBits }, (_, part) => part * codeBits);
}

/** An operand in blocks of `blockBytes` (a multiple of 4) -> the arrays that it is stored as. */
export function squeeze(operand: Uint8Array, codeBits: number, bits: OperandBits, blockBytes: number): readonly Uint8Array[] {
  if (codeBits === bits) return [operand];
  return codeBits === 3 ? squeezeThree(operand, blockBytes) : [overlay(operand, blockBytes, placesOf(codeBits, bits))];
}

/**
 * Folds 4-bit operands of 3-bit codes into three arrays of a quarter of the size. Of a block's quarters `q0..q3`, `s0, s1, s2` hold the first three;
 * their free bits are such that `(s0 >> 3 ^ s1 >> 2 ^ s2 >> 1) & 0x77` is the fourth.
 */
function squeezeThree(operand: Uint8Array, blockBytes: number): readonly [Uint8Array, Uint8Array, Uint8Array] {
  const quarter = blockBytes / 4;
  const size = operand.length / 4;
  const stored = [new Uint8Array(size), new Uint8Array(size), new Uint8Array(size)] as const;
  const [s0, s1, s2] = stored;
  const [p0, p1, p2] = THREE_BIT_PLACES;
  for (let target = 0, block = 0; block < operand.length; block += blockBytes) {
    for (let i = block; i < block + quarter; i++, target++) {
      const a = operand[i];
      const b = operand[i + quarter];
      const c = operand[i + 2 * quarter];
      const missing = ((a >> p0) ^ (b >> p1) ^ (c >> p2) ^ operand[i + 3 * quarter]) & CODE_MASKS[4][3];
      s0[target] = a ^ ((missing & 0x11) << p0);
      s1[target] = b ^ ((missing & 0x22) << p1);
      s2[target] = c ^ ((missing & 0x44) << p2);
    }
  }
  return stored;
}

/** Lays the equal parts of each block over each other, the next one some bits higher. */
function overlay(operand: Uint8Array, blockBytes: number, places: readonly number[]): Uint8Array {
  const size = blockBytes / places.length;
  const stored = new Uint8Array(operand.length / places.length);
  for (let target = 0, block = 0; block < operand.length; block += blockBytes) {
    for (let i = block; i < block + size; i++, target++) {
      for (let part = 0; part < places.length; part++) stored[target] |= operand[i + part * size] << places[part];
    }
  }
  return stored;
}
