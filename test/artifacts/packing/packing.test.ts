import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { packPlanes, planesOf, planeWordCount, unpackPlanes } from '../../../src/artifacts/packing/bit-planes.ts';
import { packByteRows, unpackByteRows } from '../../../src/artifacts/packing/byte-rows.ts';
import { packStream, unpackStream } from '../../../src/artifacts/packing/gptq-streams.ts';

const hex = (words: Uint32Array): string => [...words].map((word) => word.toString(16).toUpperCase().padStart(8, '0')).join(' ');

function planes(codes: number[], bits: number): string {
  const words = new Uint32Array(planeWordCount(1, codes.length, bits));
  packPlanes({ codes: Uint8Array.from(codes), offset: 0, stride: codes.length, rows: 1, columns: codes.length }, bits, words, 0);
  return hex(words);
}

/** Sets one bit of a little-endian bit stream at a time. */
function slowStream(codes: readonly number[], bits: number, byteLength: number): Uint8Array {
  const bytes = new Uint8Array(byteLength);
  codes.forEach((code, k) => {
    for (let b = 0; b < bits; b++) {
      const position = k * bits + b;
      if ((code >> b) & 1) bytes[position >> 3] |= 1 << (position & 7);
    }
  });
  return bytes;
}

const matrix = (bits: number) =>
  fc
    .record({
      rows: fc.integer({ min: 1, max: 7 }),
      columns: fc.integer({ min: 1, max: 75 }),
      before: fc.integer({ min: 0, max: 3 }),
      after: fc.integer({ min: 0, max: 3 }),
    })
    .chain((size) => {
      const stride = size.before + size.columns + size.after;
      return fc.record({
        ...mapConstants({ ...size, stride }),
        codes: fc.uint8Array({ minLength: size.rows * stride, maxLength: size.rows * stride, max: (1 << bits) - 1 }),
      });
    });

function mapConstants<T extends Record<string, number>>(values: T): { [K in keyof T]: fc.Arbitrary<number> } {
  return Object.fromEntries(Object.entries(values).map(([key, value]) => [key, fc.constant(value)])) as {
    [K in keyof T]: fc.Arbitrary<number>;
  };
}

describe('bit planes', () => {
  it('agree with the specification: 3-bit codes are a 2-bit and a 1-bit plane, 4-bit codes are nibbles', () => {
    expect(
      planes(
        Array.from({ length: 32 }, (_, j) => j % 8),
        3,
      ),
    ).toBe('E4E4E4E4 E4E4E4E4 F0F0F0F0');
    expect(
      planes(
        Array.from({ length: 16 }, (_, j) => j % 16),
        4,
      ),
    ).toBe('76543210 FEDCBA98');
  });

  it('make up every width', () => {
    for (let bits = 0; bits <= 8; bits++) expect(planesOf(bits).reduce((sum, plane) => sum + plane, 0)).toBe(bits);
  });

  it.each([1, 2, 3, 4, 5, 6, 7, 8])(
    'bring back every window of %i-bit codes, rows padded to words and nothing else touched',
    (bits) => {
      fc.assert(
        fc.property(matrix(bits), ({ rows, columns, before, stride, codes }) => {
          const count = planeWordCount(rows, columns, bits);
          const words = new Uint32Array(count + 2);
          expect(packPlanes({ codes, offset: before, stride, rows, columns }, bits, words, 1)).toBe(count + 1);
          expect([words[0], words[count + 1]]).toEqual([0, 0]);
          const back = codes.slice();
          for (let row = 0; row < rows; row++) back.fill(0, row * stride + before, row * stride + before + columns);
          expect(unpackPlanes({ codes: back, offset: before, stride, rows, columns }, bits, words, 1)).toBe(count + 1);
          expect(back).toEqual(codes);
        }),
        { numRuns: 40 },
      );
    },
  );

  it.each([1, 2, 4, 8])('store %i-bit codes as one little-endian bit stream a row', (bits) => {
    const codes = Array.from({ length: 61 }, (_, j) => (j * 37 + 11) & ((1 << bits) - 1));
    const words = new Uint32Array(planeWordCount(1, 61, bits));
    packPlanes({ codes: Uint8Array.from(codes), offset: 0, stride: 61, rows: 1, columns: 61 }, bits, words, 0);
    expect(new Uint8Array(words.buffer)).toEqual(slowStream(codes, bits, words.byteLength));
  });
});

describe('byte rows of MatMulNBits', () => {
  it('agree with the specification', () => {
    expect([...packByteRows(Uint8Array.of(3, 0, 1, 2), 1, 4, 2, 1)]).toEqual([0x93]);
    expect([...packByteRows(Uint8Array.of(1, 1, 1, 1), 1, 4, 2, 1)]).toEqual([0x55]);
    expect([...packByteRows(Uint8Array.of(0xa, 0x5), 1, 2, 4, 1)]).toEqual([0x5a]);
  });

  it.each([2, 4, 8] as const)('bring back %i-bit rows of any length, each padded to its own bytes', (bits) => {
    fc.assert(
      fc.property(matrix(bits), fc.integer({ min: 0, max: 5 }), ({ rows, columns, codes }, spare) => {
        const rowBytes = Math.ceil((columns * bits) / 8) + spare;
        const dense = codes.subarray(0, rows * columns);
        const packed = packByteRows(dense, rows, columns, bits, rowBytes);
        for (let row = 0; row < rows; row++) {
          const expected = slowStream([...dense.subarray(row * columns, (row + 1) * columns)], bits, rowBytes);
          expect(packed.subarray(row * rowBytes, (row + 1) * rowBytes)).toEqual(expected);
        }
        expect(unpackByteRows(packed, rows, columns, bits, rowBytes)).toEqual(dense);
      }),
      { numRuns: 40 },
    );
  });
});

describe('GPTQ streams', () => {
  it('agree with the specification: 3-bit codes straddle words', () => {
    const codes = Uint8Array.from({ length: 32 }, (_, j) => j % 8);
    const words = new Uint32Array(3);
    packStream(codes, 0, 1, 32, 3, words, 0, 1);
    expect(hex(words)).toBe('88FAC688 C688FAC6 FAC688FA');
  });

  it.each([2, 3, 4, 8] as const)('bring back %i-bit codes along either axis', (bits) => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 3 }),
        fc.integer({ min: 1, max: 4 }),
        fc.infiniteStream(fc.nat((1 << bits) - 1)),
        (chunks, step, stream) => {
          const count = 32 * chunks;
          const values = Uint8Array.from({ length: count * step }, () => stream.next().value);
          const wordCount = (count * bits) / 32;
          const words = new Uint32Array(wordCount * step);
          for (let lane = 0; lane < step; lane++) packStream(values, lane, step, count, bits, words, lane, step);
          const back = new Uint8Array(values.length);
          for (let lane = 0; lane < step; lane++) {
            const own = Uint32Array.from({ length: wordCount }, (_, w) => words[lane + w * step]);
            const codes = Array.from({ length: count }, (_, k) => values[lane + k * step]);
            expect(new Uint8Array(own.buffer)).toEqual(slowStream(codes, bits, own.byteLength));
            unpackStream(back, lane, step, count, bits, words, lane, step);
          }
          expect(back).toEqual(values);
        },
      ),
      { numRuns: 30 },
    );
  });
});
