/** Factors of branches in codes: as near as codes can be, and back without a loss. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { roundToF16 } from '../../../formats/dtype.ts';
import { packFactor, unpackFactor } from '../../../src/artifacts/packing/factor-codes.ts';
import { branchCodes, branchOfCodes, componentBits, factorStorage, roundFactor } from '../../../src/methods/quantize/low-rank.ts';

const sizes = {
  rank: fc.integer({ min: 1, max: 5 }),
  length: fc.integer({ min: 1, max: 40 }),
  bits: fc.constantFrom(8 as const, 4 as const),
};
const numbers = (count: number) =>
  fc
    .array(fc.float({ noNaN: true, min: -8, max: 8 }), { minLength: count, maxLength: count })
    .map((all) => Float32Array.from(all));

describe('a factor in codes', () => {
  it('is whole multiples of a step a component, at most half a step of the largest value away at 8 bits', () => {
    fc.assert(
      fc.property(
        fc.record(sizes).chain((size) => fc.record({ size: fc.constant(size), values: numbers(size.rank * size.length) })),
        ({ size: { rank, length, bits }, values }) => {
          const rounded = roundFactor(values, rank, bits, { step: length, stride: 1 });
          if (!rounded) return;
          const most = bits === 8 ? 127 : 7;
          for (let k = 0; k < rank; k++) {
            const scale = rounded.scales[k];
            expect(roundToF16(scale)).toBe(scale);
            for (let i = 0; i < length; i++) {
              const value = rounded.values[k * length + i];
              if (scale === 0) {
                expect(values[k * length + i]).toBe(0);
                continue;
              }
              expect(value / scale).toBe(Math.round(value / scale));
              expect(Math.abs(value / scale)).toBeLessThanOrEqual(most);
              // The largest value is cut where its scale was rounded down: by 2^-11 of a float16, or 2^-25 of one below its normal range.
              const cut = most * Math.max(2 ** -11 * scale, 2 ** -25);
              if (bits === 8)
                expect(Math.abs(value - values[k * length + i])).toBeLessThanOrEqual(0.5 * scale + cut + 1e-6 * Math.abs(value));
            }
          }
        },
      ),
    );
  });

  it('of 4 bits cuts a few values where that loses less', () => {
    const values = Float32Array.from({ length: 64 }, (_, i) => (i === 0 ? 1.2 : Math.sin(i) * 0.9));
    const square = (rounded: Float32Array) => rounded.reduce((sum, value, i) => sum + (value - values[i]) ** 2, 0);
    const { values: made } = roundFactor(values, 1, 4, { step: 64, stride: 1 })!;
    const scale = 1.2 / 7;
    expect(square(made)).toBeLessThan(0.95 * square(values.map((value) => scale * Math.round(value / scale))));
    expect(made[0]).toBeLessThan(1.2);
  });

  it('is read by columns as it is by rows', () => {
    const rows = Float32Array.of(1, -2, 3, 4, 5, -7);
    const columns = Float32Array.of(1, 4, -2, 5, 3, -7);
    const [byRows, byColumns] = [
      roundFactor(rows, 2, 4, { step: 3, stride: 1 })!,
      roundFactor(columns, 2, 4, { step: 1, stride: 2 })!,
    ];
    expect(byColumns.scales).toEqual(byRows.scales);
    for (let k = 0; k < 2; k++) for (let i = 0; i < 3; i++) expect(byColumns.values[i * 2 + k]).toBe(byRows.values[k * 3 + i]);
  });

  it.each([1e9, 1e-9])('of values near %f is none: float16 has no step for it', (size) => {
    expect(roundFactor(Float32Array.of(size, -size), 1, 8, { step: 2, stride: 1 })).toBeUndefined();
  });

  it('goes to bytes and back', () => {
    fc.assert(
      fc.property(
        fc.record({ ...sizes, other: fc.integer({ min: 1, max: 9 }), seed: fc.nat() }),
        ({ rank, length, bits, other, seed }) => {
          const draw = (count: number, from: number) =>
            Float32Array.from({ length: count }, (_, i) => Math.sin(seed + from + 3 * i));
          const a = roundFactor(draw(rank * length, 0), rank, bits, { step: length, stride: 1 })!;
          const b = roundFactor(draw(rank * other, 7), rank, bits, { step: 1, stride: rank })!;
          const branch = {
            rank,
            dtype: factorStorage(bits),
            loraA: a.values,
            loraB: b.values,
            scales: { a: a.scales, b: b.scales },
          };
          const codes = branchCodes(branch);
          const [bytesOfA, bytesOfB] = [packFactor(codes.a, rank, bits), packFactor(codes.b, rank, bits)];
          const read = { a: unpackFactor(bytesOfA, rank, length, bits), b: unpackFactor(bytesOfB, rank, other, bits) };
          expect(read).toEqual(codes);
          const again = branchOfCodes(branch, read, branch.scales);
          for (const side of ['loraA', 'loraB'] as const)
            expect(again[side].every((value, i) => value === branch[side][i])).toBe(true);
          expect(8 * (bytesOfA.length + bytesOfB.length + 4 * rank)).toBe(
            rank * (componentBits(branch.dtype, length) + componentBits(branch.dtype, other)),
          );
        },
      ),
    );
  });
});
