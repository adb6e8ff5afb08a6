/** Codes of a branch's factor in bytes: one a code, or two, a row's first half in the low bits and its second in the high ones. */

/** Bytes of a row of `length` codes. */
export function factorRowBytes(length: number, bits: 8 | 4): number {
  return bits === 8 ? length : Math.ceil(length / 2);
}

/** @param codes (rank, length) */
export function packFactor(codes: Uint8Array, rank: number, bits: 8 | 4): Uint8Array {
  if (bits === 8) return codes;
  const length = codes.length / rank;
  const half = factorRowBytes(length, 4);
  const bytes = new Uint8Array(rank * half);
  for (let k = 0; k < rank; k++)
    for (let j = 0; j < half; j++)
      bytes[k * half + j] = codes[k * length + j] | (half + j < length ? codes[k * length + half + j] << 4 : 0);
  return bytes;
}

/** Reverse of `packFactor`. */
export function unpackFactor(bytes: Uint8Array, rank: number, length: number, bits: 8 | 4): Uint8Array {
  if (bits === 8) return bytes;
  const half = factorRowBytes(length, 4);
  return Uint8Array.from({ length: rank * length }, (_, at) => {
    const [row, j] = [Math.floor(at / length) * half, at % length];
    return j < half ? bytes[row + j] & 15 : bytes[row + j - half] >> 4;
  });
}
