/** The header of a safetensors file, written: declared tensors -> their places and the file's first bytes. The mirror image of header.ts. */
import { UnsupportedError } from '../../src/errors.ts';
import { bitsPerElement, byteLengthOf } from '../dtype.ts';
import type { TensorDeclaration } from '../tensor.ts';
import { type HeaderEntry, LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY, quote, SAFETENSORS_DTYPES } from './header.ts';

export interface Layout {
  /** Header length, header and padding: everything before the data. */
  readonly prefix: Uint8Array;
  /** In the order of their bytes. */
  readonly tensors: ReadonlyMap<string, HeaderEntry>;
  readonly fileByteLength: number;
}

/**
 * Lays tensors out by element size descending, then by name: every tensor starts at a multiple of its element size, so that readers
 * can map it, and equal declarations give equal bytes whatever their order.
 */
export function layOut(declarations: readonly TensorDeclaration[], metadata: ReadonlyMap<string, string>): Layout {
  const sorted = declarations.map(checkDeclaration).sort(compare);
  const tensors = new Map<string, HeaderEntry>();
  let end = 0;
  for (const { name, dtype, shape } of sorted) {
    if (tensors.has(name)) throw new RangeError(`tensor ${quote(name)} is declared twice`);
    const start = end;
    const byteLength = byteLengthOf(dtype, shape);
    end += byteLength;
    tensors.set(name, { name, dtype, shape, byteLength, start, end });
  }
  const prefix = encodeHeader(tensors, metadata);
  return { prefix, tensors, fileByteLength: prefix.byteLength + end };
}

/** By bytes of their UTF-8, as other implementations sort; JavaScript's own order differs beyond the basic plane. */
export function compareNames(a: string, b: string): number {
  return Buffer.compare(Buffer.from(a), Buffer.from(b));
}

function compare(a: TensorDeclaration, b: TensorDeclaration): number {
  return bitsPerElement(b.dtype) - bitsPerElement(a.dtype) || compareNames(a.name, b.name);
}

function checkDeclaration(declaration: TensorDeclaration): TensorDeclaration {
  const { name, dtype, shape } = declaration;
  if (!SAFETENSORS_DTYPES.has(dtype)) {
    const supported = [...SAFETENSORS_DTYPES].join(', ');
    throw new UnsupportedError(`tensor ${quote(name)} is ${dtype}, which a safetensors file cannot hold; it holds ${supported}`);
  }
  if (name === METADATA_KEY || name === '__proto__' || /\p{Surrogate}/u.test(name)) {
    throw new UnsupportedError(`a safetensors file cannot hold a tensor named ${quote(name)}`);
  }
  if (!shape.every((dim) => Number.isSafeInteger(dim) && dim >= 0) || !Number.isSafeInteger(byteLengthOf(dtype, shape))) {
    throw new RangeError(`tensor ${quote(name)}: [${shape}] is no shape`);
  }
  return declaration;
}

function encodeHeader(tensors: ReadonlyMap<string, HeaderEntry>, metadata: ReadonlyMap<string, string>): Uint8Array {
  // Written by hand: an object of JavaScript would move names such as "0" to the front.
  const members: string[] = [];
  if (metadata.size > 0) {
    const strings = [...metadata].sort(([a], [b]) => compareNames(a, b)).map(([key, value]) => `${quoted(key)}:${quoted(value)}`);
    members.push(`"${METADATA_KEY}":{${strings.join(',')}}`);
  }
  for (const { name, dtype, shape, start, end } of tensors.values()) {
    members.push(`${quoted(name)}:{"dtype":"${dtype}","shape":[${shape.join(',')}],"data_offsets":[${start},${end}]}`);
  }
  const json = Buffer.from(`{${members.join(',')}}`);
  // The data begins at a multiple of 8: no element is wider.
  const length = Math.ceil(json.byteLength / 8) * 8;
  if (length > MAX_HEADER_BYTES) {
    throw new UnsupportedError(
      `${tensors.size} tensors need a header of ${length} bytes, but at most ${MAX_HEADER_BYTES} are allowed`,
    );
  }
  const prefix = new Uint8Array(LENGTH_BYTES + length).fill(0x20);
  new DataView(prefix.buffer).setBigUint64(0, BigInt(length), true);
  prefix.set(json, LENGTH_BYTES);
  return prefix;
}

function quoted(text: string): string {
  return JSON.stringify(text);
}
