/** How wide each element type is, and how its bytes become float32 and back. Runs over whole checkpoints: hot loops are plain. */
import type { DType } from './tensor.ts';

/** Element types that float32 values can be stored as. */
export type FloatDType = 'F32' | 'F16' | 'BF16';

const BITS = {
  F64: 64,
  F32: 32,
  F16: 16,
  BF16: 16,
  F8_E4M3: 8,
  F8_E5M2: 8,
  I64: 64,
  I32: 32,
  I16: 16,
  I8: 8,
  U64: 64,
  U32: 32,
  U16: 16,
  U8: 8,
  BOOL: 8,
  U4: 4,
  I4: 4,
  U2: 2,
  I2: 2,
} as const satisfies Record<DType, number>;

/** Every element type. */
export const DTYPES = Object.keys(BITS) as readonly DType[];

// Typed arrays use the machine's byte order, tensors are little-endian: on a big-endian machine every number would be wrong.
if (new Uint8Array(Uint16Array.of(1).buffer)[0] !== 1) throw new Error('pcomp runs on little-endian machines only');

/** Bits of one element: 64 down to 2. */
export function bitsPerElement(dtype: DType): number {
  return BITS[dtype];
}

/** Number of elements of a shape; 1 for a scalar's `[]`. */
export function elementCount(shape: readonly number[]): number {
  let count = 1;
  for (const dim of shape) count *= dim;
  return count;
}

/** Bytes of a tensor. Sub-byte elements are packed across the whole tensor, low bits first; a last part byte counts whole. */
export function byteLengthOf(dtype: DType, shape: readonly number[]): number {
  const bits = BITS[dtype];
  // Not count * bits / 8: that product may leave the exact integers although the quotient does not.
  return bits >= 8 ? elementCount(shape) * (bits / 8) : Math.ceil(elementCount(shape) / (8 / bits));
}

/**
 * Elements as float32, in a fresh array (never a view of `bytes`, which may start at any offset of its buffer).
 * Exact where float32 can hold the value, NaN payloads included; F64 and wide integers round once, to nearest even.
 * @param count number of elements; needed only where the last byte of a sub-byte type is partly padding
 */
export function toFloat32(dtype: DType, bytes: Uint8Array, count?: number): Float32Array {
  const bits = BITS[dtype];
  const length = count ?? Math.floor((bytes.byteLength * 8) / bits);
  if (byteLengthOf(dtype, [length]) !== bytes.byteLength) {
    throw new RangeError(`${bytes.byteLength} bytes are not ${length} elements of ${dtype}`);
  }
  // Not bytes.slice(): a Buffer's slice shares memory.
  if (dtype === 'F32') return new Float32Array(new Uint8Array(bytes).buffer);
  // Views need an aligned start. Only tensors inside a larger buffer lack one, and they are small enough to copy.
  const { buffer, byteOffset } = bytes.byteOffset % Math.max(1, bits / 8) === 0 ? bytes : new Uint8Array(bytes);
  switch (dtype) {
    case 'F64':
      return new Float32Array(new Float64Array(buffer, byteOffset, length));
    case 'F16':
      return lookUp(new Uint16Array(buffer, byteOffset, length), f16Table());
    case 'BF16':
      return widened(new Uint16Array(buffer, byteOffset, length));
    case 'F8_E4M3':
      return lookUp(bytes, e4m3Table());
    case 'F8_E5M2':
      return lookUp(bytes, e5m2Table());
    case 'I64':
      return narrow64(new Uint32Array(buffer, byteOffset, length * 2), new Int32Array(buffer, byteOffset, length * 2));
    case 'U64': {
      const words = new Uint32Array(buffer, byteOffset, length * 2);
      return narrow64(words, words);
    }
    case 'I32':
      return new Float32Array(new Int32Array(buffer, byteOffset, length));
    case 'U32':
      return new Float32Array(new Uint32Array(buffer, byteOffset, length));
    case 'I16':
      return new Float32Array(new Int16Array(buffer, byteOffset, length));
    case 'U16':
      return new Float32Array(new Uint16Array(buffer, byteOffset, length));
    case 'I8':
      return new Float32Array(new Int8Array(buffer, byteOffset, length));
    case 'U8':
      return new Float32Array(bytes);
    case 'BOOL':
      return Float32Array.from(bytes, (byte) => (byte === 0 ? 0 : 1));
    case 'U4':
    case 'U2':
      return unpack(bytes, bits, length, 0);
    case 'I4':
    case 'I2':
      return unpack(bytes, bits, length, 1 << (bits - 1));
    default:
      return dtype satisfies never;
  }
}

/**
 * As `toFloat32` for the float types of checkpoints, into memory that is used again and again. Returns whether all values are finite.
 * @param bytes at a multiple of the element size in its buffer, @param out one value an element
 */
export function widenInto(dtype: FloatDType | 'F64', bytes: Uint8Array, out: Float32Array): boolean {
  const { buffer, byteOffset, byteLength } = bytes;
  if (byteLengthOf(dtype, [out.length]) !== byteLength) {
    throw new RangeError(`${byteLength} bytes are not ${out.length} elements of ${dtype}`);
  }
  const words = new Int32Array(out.buffer, out.byteOffset, out.length);
  switch (dtype) {
    case 'F64':
      out.set(new Float64Array(buffer, byteOffset, out.length));
      return areFinite(words);
    case 'F32':
      words.set(new Int32Array(buffer, byteOffset, out.length));
      return areFinite(words);
    case 'F16':
      lookUp(
        new Uint16Array(buffer, byteOffset, out.length),
        f16Table(),
        new Uint32Array(words.buffer, out.byteOffset, out.length),
      );
      return areFinite(words);
    case 'BF16':
      return widenBf16(new Uint16Array(buffer, byteOffset, out.length), words);
    default:
      throw new Error(`no float type ${dtype satisfies never}`);
  }
}

/** Whether bit patterns of float32 have no exponent of all ones. */
export function areFinite(words: Int32Array): boolean {
  // Adding 1 to the exponent's last bit carries into bit 31 only from all ones.
  let carries = 0;
  for (let i = 0; i < words.length; i++) carries |= (words[i] & 0x7f800000) + 0x00800000;
  return carries >= 0;
}

function widenBf16(codes: Uint16Array, words: Int32Array): boolean {
  let carries = 0;
  // Two codes at a time where they are aligned as one word: half the loads.
  const paired = codes.byteOffset % 4 === 0 ? codes.length >>> 1 : 0;
  const pairs = paired === 0 ? new Int32Array(0) : new Int32Array(codes.buffer, codes.byteOffset, paired);
  for (let i = 0; i < paired; i++) {
    const pair = pairs[i];
    words[2 * i] = pair << 16;
    words[2 * i + 1] = pair & 0xffff0000;
    carries |= ((pair & 0x7f80) + 0x80) << 16;
    carries |= (pair & 0x7f800000) + 0x00800000;
  }
  for (let i = 2 * paired; i < codes.length; i++) {
    words[i] = codes[i] << 16;
    carries |= (words[i] & 0x7f800000) + 0x00800000;
  }
  return carries >= 0;
}

/** Stores float32 values, rounding to nearest even; what is too large becomes infinite. A fresh array of little-endian bytes. */
export function fromFloat32(dtype: FloatDType, values: Float32Array): Uint8Array {
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  switch (dtype) {
    case 'F32':
      return new Uint8Array(words.slice().buffer);
    case 'F16':
      return new Uint8Array(narrowF16(words).buffer);
    case 'BF16':
      return new Uint8Array(narrowBf16(words).buffer);
    default:
      return dtype satisfies never;
  }
}

const double = new Float64Array(1);
const doubleWords = new Uint32Array(double.buffer);

/**
 * The F16 value nearest to any double, ties to even, in one rounding: subnormals kept, 65520 and more infinite, -0 and NaN as they are.
 */
export function roundToF16(x: number): number {
  const size = Math.abs(x);
  if (!(size < 65520)) return size >= 65520 ? (x < 0 ? -Infinity : Infinity) : x;
  double[0] = size;
  const exponent = Math.max((doubleWords[1] >>> 20) - 1023, -14);
  // F16 keeps 10 bits after the leading one, a double 52. Adding 2^(exponent + 42) leaves the sum no bits below
  // 2^(exponent - 10), so the addition itself rounds as F16 would. The power is put together from its bits: `**` is slow.
  doubleWords[0] = 0;
  doubleWords[1] = (exponent + 42 + 1023) << 20;
  const magic = double[0];
  const rounded = size + magic - magic;
  return x < 0 || Object.is(x, -0) ? -rounded : rounded;
}

function lookUp(codes: Uint16Array | Uint8Array, table: Uint32Array, words: Uint32Array = new Uint32Array(codes.length)) {
  // Bits, not numbers: a NaN's payload does not survive being a JavaScript number.
  for (let i = 0; i < codes.length; i++) words[i] = table[codes[i]];
  return new Float32Array(words.buffer, words.byteOffset, words.length);
}

function widened(codes: Uint16Array): Float32Array {
  const words = new Int32Array(codes.length);
  widenBf16(codes, words);
  return new Float32Array(words.buffer);
}

/** 64-bit integers to float32. `signed` is the same words, as Int32Array when the high word has a sign. */
function narrow64(words: Uint32Array, signed: Uint32Array | Int32Array): Float32Array {
  const values = new Float32Array(words.length / 2);
  for (let i = 0; i < values.length; i++) {
    const high = signed[2 * i + 1];
    let low = words[2 * i];
    // From 2^53 on a double would round before float32 does, and two roundings may differ from one. Of bits this low
    // float32 only needs to know whether any is set.
    if (high >= 0x200000 || high < -0x200000) low = (low & 0xfff) === 0 ? low : ((low | 0x1000) & ~0xfff) >>> 0;
    values[i] = high * 0x100000000 + low;
  }
  return values;
}

function unpack(bytes: Uint8Array, bits: number, count: number, signBit: number): Float32Array {
  const values = new Float32Array(count);
  const perByte = 8 / bits;
  const mask = (1 << bits) - 1;
  for (let i = 0; i < count; i++) {
    const code = (bytes[Math.floor(i / perByte)] >>> ((i % perByte) * bits)) & mask;
    values[i] = (code ^ signBit) - signBit;
  }
  return values;
}

function narrowBf16(words: Uint32Array): Uint16Array {
  const codes = new Uint16Array(words.length);
  const bits = new Int32Array(words.buffer, words.byteOffset, words.length);
  let carries = 0;
  for (let i = 0; i < bits.length; i++) {
    const word = bits[i];
    codes[i] = (word + (0x7fff + ((word >>> 16) & 1))) >>> 16;
    carries |= (word & 0x7f800000) + 0x00800000;
  }
  if (carries < 0) keepNans(bits, codes);
  return codes;
}

/** A NaN stays one: rounded like a number it could become infinity, or lose its kept payload and read as infinity. */
function keepNans(bits: Int32Array, codes: Uint16Array): void {
  for (let i = 0; i < bits.length; i++) {
    const word = bits[i];
    if ((word & 0x7fffffff) > 0x7f800000) codes[i] = (word & 0x7f0000) === 0 ? (word >>> 16) | 0x40 : word >>> 16;
  }
}

function narrowF16(words: Uint32Array): Uint16Array {
  const codes = new Uint16Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const sign = (words[i] >>> 16) & 0x8000;
    const size = words[i] & 0x7fffffff;
    if (size >= 0x38800000 && size < 0x47800000) {
      // [2^-14, 65536): move the exponent's bias from 127 to 15; a carry out of 65519 yields infinity by itself.
      codes[i] = sign | ((size - 0x38000000 + 0xfff + ((size >>> 13) & 1)) >>> 13);
    } else if (size < 0x38800000) {
      codes[i] = sign | subnormalF16(size);
    } else if (size <= 0x7f800000) {
      codes[i] = sign | 0x7c00;
    } else {
      codes[i] = sign | 0x7c00 | ((size >>> 13) & 0x3ff || 0x200);
    }
  }
  return codes;
}

/** Bits of a non-negative float32 below 2^-14 -> F16 code, in units of 2^-24. */
function subnormalF16(size: number): number {
  const exponent = size >>> 23;
  // 2^-25 (exponent field 102) is the last that can round up; below it the shift would pass 24.
  if (exponent < 102) return 0;
  const shift = 126 - exponent;
  const significand = (size & 0x7fffff) | 0x800000;
  const code = significand >>> shift;
  const rest = significand - (code << shift);
  const half = 1 << (shift - 1);
  return rest > half || (rest === half && (code & 1) === 1) ? code + 1 : code;
}

/** float32 bits of every code of a small float: `signBit | exponent | mantissa`, by IEEE's rules. */
function ieeeTable(exponentBits: number, mantissaBits: number): Uint32Array {
  const table = new Uint32Array(1 << (1 + exponentBits + mantissaBits));
  const values = new Float32Array(table.buffer);
  const bias = (1 << (exponentBits - 1)) - 1;
  const half = table.length / 2;
  for (let code = 0; code < half; code++) {
    const exponent = code >>> mantissaBits;
    const mantissa = code & ((1 << mantissaBits) - 1);
    if (exponent === (1 << exponentBits) - 1) table[code] = 0x7f800000 | (mantissa << (23 - mantissaBits));
    else if (exponent === 0) values[code] = mantissa * 2 ** (1 - bias - mantissaBits);
    else values[code] = (mantissa + (1 << mantissaBits)) * 2 ** (exponent - bias - mantissaBits);
    table[code + half] = (table[code] | 0x80000000) >>> 0;
  }
  return table;
}

const f16Table = once(() => ieeeTable(5, 10));
const e5m2Table = once(() => ieeeTable(5, 2));
// "fn": finite and NaN only. The codes IEEE would give to infinity are numbers up to 448, and only the all-ones code is NaN.
const e4m3Table = once(() => {
  const table = ieeeTable(4, 3);
  const values = new Float32Array(table.buffer);
  for (let mantissa = 0; mantissa < 7; mantissa++) {
    values[0x78 | mantissa] = (8 + mantissa) * 32;
    values[0xf8 | mantissa] = (8 + mantissa) * -32;
  }
  return table;
});

/** Tables are built at first use: most runs need one of them. */
function once<T>(make: () => T): () => T {
  let made: T | undefined;
  return () => {
    made ??= make();
    return made;
  };
}
