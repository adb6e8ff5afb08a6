/** The typed data fields of TensorProto (`int32_data` and kin), which hold integers as varints, to plain little-endian bytes. */
import { FormatError } from '../../src/errors.ts';
import { bitsPerElement } from '../dtype.ts';
import type { DType } from '../tensor.ts';

/** Field number -> its name and the types that may be stored in it. */
export const TYPED_FIELDS: ReadonlyMap<number, readonly [name: string, dtypes: readonly DType[]]> = new Map<
  number,
  readonly [string, readonly DType[]]
>([
  [4, ['float_data', ['F32']]],
  [5, ['int32_data', ['I32', 'I16', 'I8', 'U16', 'U8', 'BOOL', 'F16', 'BF16', 'F8_E4M3', 'F8_E5M2', 'U4', 'I4', 'U2', 'I2']]],
  [7, ['int64_data', ['I64']]],
  [10, ['double_data', ['F64']]],
  [11, ['uint64_data', ['U32', 'U64']]],
]);

// Everything else is stored as bits: floats as unsigned integers of their width, sub-byte elements as packed bytes.
const SIGNED: ReadonlySet<DType> = new Set(['I64', 'I32', 'I16', 'I8']);

/** Decodes a run of varints. Throws FormatError `value-out-of-range` for an integer the type cannot hold. */
export function decodeTypedData(bytes: Uint8Array, dtype: DType, path: string, what: string): Uint8Array {
  let count = 0;
  for (const byte of bytes) if (byte < 0x80) count++;
  const width = Math.max(8, bitsPerElement(dtype));
  const out = new DataView(new ArrayBuffer((count * width) / 8));
  const [low, high] =
    dtype === 'BOOL'
      ? [0n, 1n]
      : SIGNED.has(dtype)
        ? [-(1n << BigInt(width - 1)), (1n << BigInt(width - 1)) - 1n]
        : [0n, (1n << BigInt(width)) - 1n];
  const unsigned64 = dtype === 'U64';

  let position = 0;
  for (let i = 0; i < count; i++) {
    let value = 0n;
    // Almost all values take few bytes: those are gathered as a number.
    let small = 0;
    let shift = 0;
    for (; position < bytes.byteLength; ) {
      const byte = bytes[position++];
      if (shift < 28) small += (byte & 0x7f) << shift;
      else value += BigInt(byte & 0x7f) << BigInt(shift);
      shift += 7;
      if (byte < 0x80) break;
    }
    if (shift > 70)
      throw new FormatError(path, 'malformed-message', `${what} has an integer of ${shift / 7} bytes, 10 is the most`);
    const raw = value + BigInt(small);
    const exact = unsigned64 ? BigInt.asUintN(64, raw) : BigInt.asIntN(64, raw);
    if (exact < low || exact > high) {
      throw new FormatError(
        path,
        'value-out-of-range',
        `${what} of type ${dtype} holds the integer ${exact}, beyond ${low} to ${high}`,
      );
    }
    if (width === 64) out.setBigUint64(8 * i, BigInt.asUintN(64, exact), true);
    else if (width === 32) out.setUint32(4 * i, Number(BigInt.asUintN(32, exact)), true);
    else if (width === 16) out.setUint16(2 * i, Number(BigInt.asUintN(16, exact)), true);
    else out.setUint8(i, Number(BigInt.asUintN(8, exact)));
  }
  if (position !== bytes.byteLength) throw new FormatError(path, 'malformed-message', `${what} ends inside an integer`);
  return new Uint8Array(out.buffer);
}
