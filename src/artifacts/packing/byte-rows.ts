/** Codes of 2, 4 or 8 bits packed low bits first into bytes, row by row: operands and zero points of MatMulNBits. */

/** Widths MatMulNBits computes with. */
export type OperandBits = 2 | 4 | 8;

/**
 * Packs `rows` rows of `columns` codes into rows of `rowBytes` bytes; value k of a row takes bits `[k b, (k+1) b)`. What is left of a row is 0.
 * The same function packs B, with rows of `blocks * blockSize * b / 8` bytes, and zero points, with rows of `ceil(blocks * b / 8)`.
 */
export function packByteRows(codes: Uint8Array, rows: number, columns: number, bits: OperandBits, rowBytes: number): Uint8Array {
  const packed = new Uint8Array(rows * rowBytes);
  const perByte = 8 / bits;
  for (let row = 0; row < rows; row++) {
    const first = row * columns;
    let target = row * rowBytes;
    for (let k = 0; k < columns; k += perByte) {
      const end = Math.min(k + perByte, columns);
      let byte = 0;
      for (let i = k, shift = 0; i < end; i++, shift += bits) byte |= codes[first + i] << shift;
      packed[target++] = byte;
    }
  }
  return packed;
}

/** Reverse of `packByteRows`: `rows` rows of `columns` codes. */
export function unpackByteRows(
  packed: Uint8Array,
  rows: number,
  columns: number,
  bits: OperandBits,
  rowBytes: number,
): Uint8Array {
  const codes = new Uint8Array(rows * columns);
  const perByte = 8 / bits;
  const mask = (1 << bits) - 1;
  for (let row = 0; row < rows; row++) {
    const first = row * columns;
    let source = row * rowBytes;
    for (let k = 0; k < columns; k += perByte) {
      const end = Math.min(k + perByte, columns);
      let byte = packed[source++];
      for (let i = k; i < end; i++) {
        codes[first + i] = byte & mask;
        byte >>>= bits;
      }
    }
  }
  return codes;
}
