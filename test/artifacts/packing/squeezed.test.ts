import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { CODE_MASKS, placesOf, squeeze } from '../../../src/artifacts/packing/squeezed.ts';

describe('operands at the true width of their codes', () => {
  it('fold from two 3-bit codes a byte into three quarters, and unfold by shifts, xor and a mask', () => {
    const blocks = fc.array(fc.uint8Array({ minLength: 16, maxLength: 16 }), { minLength: 1, maxLength: 5 });
    fc.assert(
      fc.property(blocks, (random) => {
        const operand = Uint8Array.from(
          random.flatMap((block) => [...block]),
          (byte) => byte & 0x77,
        );
        const [a, b, c] = squeeze(operand, 3, 4, 16);
        expect(a.length + b.length + c.length).toBe((operand.length * 3) / 4);
        const back = random.flatMap((_, block) => {
          const at = [0, 1, 2, 3].map((i) => 4 * block + i);
          const fourth = (i: number) => ((a[i] >> 3) ^ (b[i] >> 2) ^ (c[i] >> 1)) & 0x77;
          return [a, b, c].flatMap((piece) => at.map((i) => piece[i] & 0x77)).concat(at.map(fourth));
        });
        expect(Uint8Array.from(back)).toEqual(operand);
      }),
    );
  });

  it.each([
    [1, 2],
    [1, 4],
    [2, 4],
  ] as const)(
    'fold from codes of %i bits in %i into equal parts over each other, and unfold by a shift and a mask',
    (codeBits, bits) => {
      const mask = CODE_MASKS[bits][codeBits];
      const blocks = fc.array(fc.uint8Array({ minLength: 16, maxLength: 16 }), { minLength: 1, maxLength: 5 });
      fc.assert(
        fc.property(blocks, (random) => {
          const operand = Uint8Array.from(
            random.flatMap((block) => [...block]),
            (byte) => byte & mask,
          );
          const [stored] = squeeze(operand, codeBits, bits, 16);
          expect(stored.length).toBe((operand.length * codeBits) / bits);
          const size = (16 * codeBits) / bits;
          const back = random.flatMap((_, block) =>
            placesOf(codeBits, bits).flatMap((place) =>
              [...stored.subarray(block * size, (block + 1) * size)].map((byte) => (byte >> place) & mask),
            ),
          );
          expect(Uint8Array.from(back)).toEqual(operand);
        }),
      );
    },
  );

  it('store the second half of a block of 1-bit codes one bit up', () => {
    const operand = Uint8Array.of(0x01, 0x44, 0x55, 0x10);
    expect([...squeeze(operand, 1, 2, 4)[0]]).toEqual([0x01 | (0x55 << 1), 0x44 | (0x10 << 1)]);
    expect([...squeeze(operand, 1, 2, 2)[0]]).toEqual([0x01 | (0x44 << 1), 0x55 | (0x10 << 1)]);
  });
});
