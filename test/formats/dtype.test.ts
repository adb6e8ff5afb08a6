import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  bitsPerElement,
  byteLengthOf,
  DTYPES,
  elementCount,
  type FloatDType,
  fromFloat32,
  roundToF16,
  toFloat32,
} from '../../formats/dtype.ts';

interface Format {
  readonly exponentBits: number;
  readonly mantissaBits: number;
  /** E4M3fn: the top exponent holds numbers, and only the all-ones code is NaN. */
  readonly finite?: boolean;
}

const F16: Format = { exponentBits: 5, mantissaBits: 10 };
const BF16: Format = { exponentBits: 8, mantissaBits: 7 };
const E4M3: Format = { exponentBits: 4, mantissaBits: 3, finite: true };
const E5M2: Format = { exponentBits: 5, mantissaBits: 2 };

/** The textbook's reading of a code, in doubles. */
function decode({ exponentBits, mantissaBits, finite = false }: Format, code: number): number {
  const sign = code >= 2 ** (exponentBits + mantissaBits) ? -1 : 1;
  const exponent = Math.floor(code / 2 ** mantissaBits) % 2 ** exponentBits;
  const mantissa = code % 2 ** mantissaBits;
  const bias = 2 ** (exponentBits - 1) - 1;
  const top = exponent === 2 ** exponentBits - 1;
  if (top && finite && mantissa === 2 ** mantissaBits - 1) return Number.NaN;
  if (top && !finite) return mantissa === 0 ? sign * Infinity : Number.NaN;
  if (exponent === 0) return sign * mantissa * 2 ** (1 - bias - mantissaBits);
  return sign * (1 + mantissa / 2 ** mantissaBits) * 2 ** (exponent - bias);
}

/** Non-negative finite values of a 16-bit format in order of their codes, then the value infinity would have. */
function ladder(format: Format): number[] {
  const infinity = (2 ** format.exponentBits - 1) * 2 ** format.mantissaBits;
  const values = Array.from({ length: infinity }, (_, code) => decode(format, code));
  return [...values, 2 ** (2 ** (format.exponentBits - 1))];
}

/** Slow and obvious: the nearest rung of the ladder, and of two equally near the one with the even code. */
function nearestCode(rungs: readonly number[], x: number): number {
  const size = Math.abs(x);
  if (size >= rungs[rungs.length - 1]) return rungs.length - 1;
  let low = 0;
  let high = rungs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (rungs[middle] <= size) low = middle;
    else high = middle;
  }
  const [down, up] = [size - rungs[low], rungs[high] - size];
  if (down !== up) return down < up ? low : high;
  return low % 2 === 0 ? low : high;
}

const ladders = { F16: ladder(F16), BF16: ladder(BF16) };

function storedCodes(dtype: FloatDType, values: readonly number[]): number[] {
  const bytes = fromFloat32(dtype, Float32Array.from(values));
  return [...new Uint16Array(bytes.buffer, bytes.byteOffset, values.length)];
}

const allCodes = Uint16Array.from({ length: 65536 }, (_, code) => code);

describe('widths', () => {
  it('gives every dtype the bytes of its elements', () => {
    const bytesOf100 = Object.fromEntries(DTYPES.map((dtype) => [dtype, byteLengthOf(dtype, [10, 10])]));
    expect(bytesOf100).toEqual({
      ...{ F64: 800, F32: 400, F16: 200, BF16: 200, F8_E4M3: 100, F8_E5M2: 100, I64: 800, I32: 400, I16: 200, I8: 100 },
      ...{ U64: 800, U32: 400, U16: 200, U8: 100, BOOL: 100, U4: 50, I4: 50, U2: 25, I2: 25 },
    });
    expect(bitsPerElement('I2')).toBe(2);
  });

  it('rounds the bytes of packed types up, across the whole tensor', () => {
    expect(byteLengthOf('U4', [3, 3])).toBe(5);
    expect(byteLengthOf('I2', [5])).toBe(2);
    expect(byteLengthOf('U2', [0])).toBe(0);
  });

  it('counts one element in a scalar and none in an empty tensor', () => {
    expect(elementCount([])).toBe(1);
    expect(elementCount([4, 0, 3])).toBe(0);
    expect(byteLengthOf('F32', [])).toBe(4);
  });

  it('stays exact where bits would leave the safe integers', () => {
    expect(byteLengthOf('I8', [2 ** 52 + 1])).toBe(2 ** 52 + 1);
  });
});

describe('toFloat32', () => {
  it.each([
    ['F16', F16],
    ['BF16', BF16],
  ] as const)('reads every %s code as the textbook does', (dtype, format) => {
    const values = toFloat32(dtype, new Uint8Array(allCodes.buffer));
    const wrong = [...allCodes].filter((code) => !Object.is(values[code], decode(format, code)));
    expect(wrong).toEqual([]);
  });

  it.each([
    ['F8_E4M3', E4M3],
    ['F8_E5M2', E5M2],
  ] as const)('reads every %s code as the textbook does', (dtype, format) => {
    const codes = Uint8Array.from({ length: 256 }, (_, code) => code);
    const values = toFloat32(dtype, codes);
    expect([...values]).toEqual([...codes].map((code) => decode(format, code)));
  });

  it('reads the extremes of the 8-bit floats', () => {
    expect([...toFloat32('F8_E4M3', Uint8Array.of(0x7e, 0xfe, 0x01, 0x80))]).toEqual([448, -448, 2 ** -9, -0]);
    expect([...toFloat32('F8_E5M2', Uint8Array.of(0x7b, 0x7c, 0xfc, 0x01))]).toEqual([57344, Infinity, -Infinity, 2 ** -16]);
  });

  it.each([
    ['I8', Int8Array.of(-128, -1, 0, 127)],
    ['U8', Uint8Array.of(0, 1, 128, 255)],
    ['I16', Int16Array.of(-32768, -1, 0, 32767)],
    ['U16', Uint16Array.of(0, 1, 40000, 65535)],
    ['I32', Int32Array.of(-(2 ** 31), -1, 16777217, 2 ** 31 - 1)],
    ['U32', Uint32Array.of(0, 1, 16777219, 2 ** 32 - 1)],
    ['F32', Float32Array.of(0.1, -0, Infinity, 2 ** -149)],
    ['F64', Float64Array.of(0.1, -1e300, 2 ** -150, 1 + 2 ** -24)],
  ] as const)('reads %s as the nearest float32', (dtype, array) => {
    expect([...toFloat32(dtype, new Uint8Array(array.buffer))]).toEqual([...array].map(Math.fround));
  });

  it('reads any BOOL byte but 0 as 1', () => {
    expect([...toFloat32('BOOL', Uint8Array.of(0, 1, 255))]).toEqual([0, 1, 1]);
  });

  it('unpacks sub-byte codes low bits first, and leaves padding out', () => {
    expect([...toFloat32('U4', Uint8Array.of(0x21, 0x0f), 3)]).toEqual([1, 2, 15]);
    expect([...toFloat32('I4', Uint8Array.of(0x87, 0x0f), 3)]).toEqual([7, -8, -1]);
    expect([...toFloat32('U2', Uint8Array.of(0b11_10_01_00))]).toEqual([0, 1, 2, 3]);
    expect([...toFloat32('I2', Uint8Array.of(0b11_10_01_00, 0b01), 5)]).toEqual([0, 1, -2, -1, 1]);
  });

  it('rounds 64-bit integers once, also where a double would round first', () => {
    // 2^60 + 2^36 is a tie of float32; the last 1 breaks it upwards, and a double drops that 1.
    const brokenTie = 2n ** 60n + 2n ** 36n + 1n;
    const signed = toFloat32('I64', new Uint8Array(BigInt64Array.of(brokenTie, -brokenTie, brokenTie - 1n, -1n).buffer));
    expect([...signed]).toEqual([2 ** 60 + 2 ** 37, -(2 ** 60) - 2 ** 37, 2 ** 60, -1]);
    const unsigned = toFloat32('U64', new Uint8Array(BigUint64Array.of(brokenTie * 8n, 2n ** 64n - 1n, 5n).buffer));
    expect([...unsigned]).toEqual([8 * (2 ** 60 + 2 ** 37), 2 ** 64, 5]);
  });

  it('rounds any 64-bit integer to the nearest float32, ties to even', () => {
    const nearest = (value: bigint): number => {
      const size = value < 0n ? -value : value;
      const drop = BigInt(Math.max(0, size.toString(2).length - 24));
      const floor = size >> drop;
      const rest = (size - (floor << drop)) * 2n;
      const unit = 1n << drop;
      const up = rest > unit || (rest === unit && floor % 2n === 1n);
      return Number((up ? floor + 1n : floor) << drop) * (value < 0n ? -1 : 1);
    };
    const nearTies = fc
      .tuple(
        fc.integer({ min: 24, max: 62 }),
        fc.bigInt({ min: 0n, max: 2n ** 62n - 1n }),
        fc.bigInt({ min: -2n, max: 2n }),
        fc.boolean(),
      )
      .map(([bits, raw, off, negative]) => {
        const value = ((raw >> BigInt(62 - bits)) & ~((1n << BigInt(bits - 24)) - 1n)) + ((1n << BigInt(bits - 24)) >> 1n) + off;
        return negative ? -value : value;
      });
    fc.assert(
      fc.property(fc.oneof(nearTies, fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n })), (value) => {
        const [read] = toFloat32('I64', new Uint8Array(BigInt64Array.of(value).buffer));
        expect(read).toBe(nearest(value) + 0);
      }),
      { numRuns: 2000 },
    );
  });

  it('reads bytes at any offset, and Buffers, without keeping their memory', () => {
    const values = Float32Array.of(1.5, -2.25, 3);
    const expected = { F32: values, F16: values, BF16: values, F64: values } as const;
    for (const dtype of ['F32', 'F16', 'BF16', 'F64'] as const) {
      const bytes = dtype === 'F64' ? new Uint8Array(Float64Array.from(values).buffer) : fromFloat32(dtype, values);
      for (let offset = 0; offset < 9; offset++) {
        const shifted = Buffer.alloc(64).subarray(offset, offset + bytes.byteLength);
        shifted.set(bytes);
        const read = toFloat32(dtype, shifted);
        shifted.fill(0xff);
        expect(read).toEqual(expected[dtype]);
      }
    }
  });

  it('refuses bytes that are not whole elements', () => {
    expect(() => toFloat32('F32', new Uint8Array(6))).toThrow(RangeError);
    expect(() => toFloat32('U4', new Uint8Array(2), 5)).toThrow(RangeError);
    expect(() => toFloat32('U4', new Uint8Array(2), 2)).toThrow(RangeError);
  });

  it('reads no elements from no bytes', () => {
    for (const dtype of DTYPES) expect(toFloat32(dtype, new Uint8Array(0))).toHaveLength(0);
  });
});

describe('fromFloat32', () => {
  it.each(['F16', 'BF16'] as const)('gives back every %s code bit by bit, NaN payloads included', (dtype) => {
    const bytes = new Uint8Array(allCodes.buffer);
    expect(Buffer.compare(fromFloat32(dtype, toFloat32(dtype, bytes)), bytes)).toBe(0);
  });

  it('gives back F32 bits, NaN payloads included', () => {
    const bytes = new Uint8Array(Uint32Array.of(0x7fa12345, 0xff800000, 0x80000000, 1).buffer);
    expect(fromFloat32('F32', toFloat32('F32', bytes))).toEqual(bytes);
  });

  it.each(['F16', 'BF16'] as const)('rounds to the nearest %s, ties to even, at and around every boundary', (dtype) => {
    const rungs = ladders[dtype];
    const words = new Uint32Array(1);
    const float = new Float32Array(words.buffer);
    const values: number[] = [];
    for (let i = 0; i + 1 < rungs.length; i++) {
      // Halfway between neighbours is a float32, and so are the floats just below and above it.
      float[0] = (rungs[i] + rungs[i + 1]) / 2;
      values.push(rungs[i], float[0]);
      words[0] -= 1;
      values.push(float[0]);
      words[0] += 2;
      values.push(float[0]);
    }
    const sign = 0x8000;
    const wanted = values.map((value) => nearestCode(rungs, value));
    expect(storedCodes(dtype, values)).toEqual(wanted);
    expect(
      storedCodes(
        dtype,
        values.map((value) => -value),
      ),
    ).toEqual(wanted.map((code) => code | sign));
  });

  it.each(['F16', 'BF16'] as const)('rounds any float32 to the nearest %s', (dtype) => {
    fc.assert(
      fc.property(fc.array(fc.float({ noNaN: true }), { maxLength: 64 }), (values) => {
        const wanted = values.map(
          (value) => nearestCode(ladders[dtype], value) | (Object.is(Math.sign(value), -0) || value < 0 ? 0x8000 : 0),
        );
        expect(storedCodes(dtype, values)).toEqual(wanted);
      }),
      { numRuns: 500 },
    );
  });

  it('keeps NaN a NaN when its payload does not fit', () => {
    const nan = toFloat32('F32', new Uint8Array(Uint32Array.of(0x7f800001, 0xff800001).buffer));
    for (const dtype of ['F16', 'BF16'] as const)
      expect([...toFloat32(dtype, fromFloat32(dtype, nan))]).toEqual([Number.NaN, Number.NaN]);
  });

  it('overflows to infinity and underflows to zero of the same sign', () => {
    expect(storedCodes('F16', [65519, 65520, -1e9, 2 ** -25, -(2 ** -26)])).toEqual([0x7bff, 0x7c00, 0xfc00, 0, 0x8000]);
    expect(storedCodes('BF16', [3.4e38, -Infinity, -0])).toEqual([0x7f80, 0xff80, 0x8000]);
  });

  it('reads a view that starts inside its buffer', () => {
    expect(storedCodes('F16', [1, 2])).toEqual([0x3c00, 0x4000]);
    expect(fromFloat32('BF16', Float32Array.of(0, 1, 2).subarray(1))).toEqual(Uint8Array.of(0x80, 0x3f, 0x00, 0x40));
  });
});

describe('roundToF16', () => {
  it('rounds doubles in one step, where float32 on the way would land on a tie', () => {
    // Just above the tie between 1 and 1 + 2^-10: as a float32 it is the tie, which goes down to even.
    expect(roundToF16(1 + 2 ** -11 + 2 ** -40)).toBe(1 + 2 ** -10);
    expect(roundToF16(1 + 2 ** -11)).toBe(1);
    expect(roundToF16(1 + 3 * 2 ** -11)).toBe(1 + 2 ** -9);
  });

  it('agrees with the ladder on any double', () => {
    const near = fc.tuple(fc.nat(0x7c00 - 1), fc.double({ min: 0, max: 1, noNaN: true })).map(([i, t]) => {
      const [low, high] = [ladders.F16[i], ladders.F16[i + 1]];
      return low + t * (high - low);
    });
    const ties = fc.nat(0x7c00 - 1).map((i) => (ladders.F16[i] + ladders.F16[i + 1]) / 2);
    fc.assert(
      fc.property(fc.oneof(near, ties, fc.double({ noNaN: true })), fc.boolean(), (size, negative) => {
        const code = nearestCode(ladders.F16, size);
        const rounded = (code === 0x7c00 ? Infinity : ladders.F16[code]) * (Object.is(Math.sign(size), -0) || size < 0 ? -1 : 1);
        expect(roundToF16(negative ? -size : size)).toBe(negative ? -rounded : rounded);
      }),
      { numRuns: 3000 },
    );
  });

  it('agrees with stored bytes on every F16 value, and keeps -0, infinities and NaN', () => {
    const values = toFloat32('F16', new Uint8Array(allCodes.buffer));
    expect([...values].filter((value) => !Object.is(roundToF16(value), value))).toEqual([]);
    expect([-0, Infinity, -Infinity, Number.NaN, 65519.99, -65520].map(roundToF16)).toEqual([
      -0,
      Infinity,
      -Infinity,
      Number.NaN,
      65504,
      -Infinity,
    ]);
  });
});
