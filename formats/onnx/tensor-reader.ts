/** TensorProto to header and bytes: large values stay where they are, whatever field they are stored in. */
import { FormatError, UnsupportedError } from '../../src/errors.ts';
import { byteLengthOf } from '../dtype.ts';
import type { DType } from '../tensor.ts';
import { carriedTypeName, dtypeOf } from './data-types.ts';
import { checkName, decode, safeInteger, unknownOf } from './decoding.ts';
import type { ExternalFiles } from './file-source.ts';
import { type TensorMessage, tensorCodec } from './schema.ts';
import { decodeTypedData, TYPED_FIELDS } from './typed-data.ts';
import { type BrokenRules, type ByteSource, concat, fieldsOf, WIRE } from './wire.ts';

/** Values of at least this many bytes are left on disk; shapes, axes and scalars are smaller. */
export const LARGE_BYTES = 1024;

/** More than NumPy (64) or any runtime takes. */
const MAX_RANK = 64;

const RAW_DATA = 9;
const EXTERNAL = 1;

export const NESTED: BrokenRules = { malformed: 'malformed-message', overrun: 'message-overruns-parent' };

/** Where to look for external data. */
export interface TensorContext {
  readonly path: string;
  /** `undefined` for a model that was given as bytes. */
  readonly external: ExternalFiles | undefined;
}

/** A tensor of a type pcomp computes with. */
export interface ReadTensor {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly byteLength: number;
  readonly unknown?: readonly Uint8Array[];
  readonly fetch: (start: number, end: number) => Promise<Uint8Array>;
}

/** A tensor of another valid type: kept encoded. */
export interface CarriedTensor {
  readonly name: string;
  readonly encoded: Uint8Array;
}

interface Extent {
  readonly field: number;
  readonly wireType: number;
  readonly start: number;
  readonly end: number;
}

/** Reads the TensorProto at `[start, end)` of the source. */
export async function readTensor(
  source: ByteSource,
  start: number,
  end: number,
  context: TensorContext,
): Promise<ReadTensor | CarriedTensor> {
  const { path } = context;
  const headerParts: Uint8Array[] = [];
  const extents: Extent[] = [];
  for await (const field of fieldsOf(source, start, end, NESTED)) {
    if (field.number === RAW_DATA || TYPED_FIELDS.has(field.number)) {
      if (field.number === RAW_DATA && field.wireType !== WIRE.bytes) {
        throw new FormatError(
          path,
          'malformed-message',
          `raw_data at byte ${field.start} has wire type ${field.wireType}, not 2`,
        );
      }
      // An empty field says nothing: writers leave them behind.
      if (field.end > field.valueStart)
        extents.push({ field: field.number, wireType: field.wireType, start: field.valueStart, end: field.end });
    } else headerParts.push(Uint8Array.from(await source.read(field.start, field.end)));
  }
  const message = decode(tensorCodec, concat(headerParts), path, 'a tensor');
  const name = checkName(message.name ?? '', path, 'a tensor');
  const what = `tensor "${name}"`;
  const dtype = dtypeOf(message.dataType ?? 0);
  if (dtype === undefined) return carry(source, start, end, message, name, path);

  const shape = readShape(message, path, what);
  const byteLength = byteLengthOf(dtype, shape);
  if (!Number.isSafeInteger(byteLength)) {
    throw new FormatError(path, 'shape-overflow', `${what} has shape [${shape.join(', ')}], whose bytes cannot be counted`);
  }
  if (message.segment !== undefined)
    throw new UnsupportedError(`${path}: ${what} is stored in segments; pcomp reads whole tensors only`);
  const header = { name, dtype, shape, byteLength, ...unknownOf(message) };
  const fields = new Set(extents.map((extent) => extent.field));
  if (message.dataLocation === EXTERNAL) {
    if (fields.size > 0)
      throw new FormatError(path, 'data-twice', `${what} has external data and data in field ${[...fields].join(', ')}`);
    return { ...header, fetch: await externalData(message, byteLength, what, context) };
  }
  if (message.dataLocation !== undefined && message.dataLocation !== 0) {
    throw new FormatError(
      path,
      'data-location-unknown',
      `${what} has data location ${message.dataLocation}; ONNX knows 0 (here) and 1 (external)`,
    );
  }
  if (fields.size > 1)
    throw new FormatError(path, 'data-twice', `${what} has data in fields ${[...fields].join(' and ')}; one must hold it all`);
  return { ...header, fetch: await internalData(source, extents, dtype, byteLength, what, path) };
}

function readShape(message: TensorMessage, path: string, what: string): number[] {
  const dims = message.dims ?? [];
  if (dims.length > MAX_RANK)
    throw new FormatError(path, 'rank-too-high', `${what} has ${dims.length} dimensions, pcomp reads up to ${MAX_RANK}`);
  return dims.map((dim) => {
    const value = safeInteger(dim, path, 'shape-overflow', `a dimension of ${what}`);
    if (value < 0) throw new FormatError(path, 'dimension-negative', `${what} has a dimension of ${value}`);
    return value;
  });
}

async function carry(
  source: ByteSource,
  start: number,
  end: number,
  message: TensorMessage,
  name: string,
  path: string,
): Promise<CarriedTensor> {
  const number = message.dataType ?? 0;
  const typeName = carriedTypeName(number);
  if (typeName === undefined) {
    throw new FormatError(path, 'data-type-unknown', `tensor "${name}" has data type ${number}; ONNX 1.20 defines 1 to 26`);
  }
  // Its bytes would have to move when the model is written elsewhere, and their number is not ours to know.
  if (message.dataLocation === EXTERNAL) {
    throw new UnsupportedError(
      `${path}: tensor "${name}" of type ${typeName} is stored externally; pcomp carries tensors of this type only when they are inside the file`,
    );
  }
  return { name, encoded: Uint8Array.from(await source.read(start, end)) };
}

async function internalData(
  source: ByteSource,
  extents: readonly Extent[],
  dtype: DType,
  byteLength: number,
  what: string,
  path: string,
): Promise<ReadTensor['fetch']> {
  const first = extents[0];
  if (first === undefined) {
    if (byteLength > 0) throw new FormatError(path, 'data-missing', `${what} has no data, its shape takes ${byteLength} bytes`);
    return inMemory(new Uint8Array(0));
  }
  const [storedAs, allowed] = TYPED_FIELDS.get(first.field) ?? ['raw_data', undefined];
  if (allowed !== undefined && !allowed.includes(dtype)) {
    throw new FormatError(
      path,
      'data-field-wrong',
      `${what} of type ${dtype} has its data in ${storedAs}, which is for ${allowed.join(', ')}`,
    );
  }
  const stored = extents.reduce((sum, extent) => sum + extent.end - extent.start, 0);
  const checkLength = (actual: number): void => {
    if (actual !== byteLength)
      throw new FormatError(
        path,
        'data-size-mismatch',
        `${what} has ${actual} bytes of data in ${storedAs}, its shape takes ${byteLength}`,
      );
  };
  const verbatim = allowed === undefined || storedAs === 'float_data' || storedAs === 'double_data';
  if (verbatim) {
    checkLength(stored);
    if (extents.length === 1 && stored >= LARGE_BYTES)
      return async (start, end) => owned(await source.read(first.start + start, first.start + end));
  }
  const parts: Uint8Array[] = [];
  for (const extent of extents) parts.push(await source.read(extent.start, extent.end));
  const bytes = concat(parts);
  if (verbatim) return inMemory(bytes);
  if (extents.some((extent) => extent.wireType === WIRE.fixed32 || extent.wireType === WIRE.fixed64)) {
    throw new FormatError(path, 'malformed-message', `${what} has ${storedAs} of fixed width; integers are varints there`);
  }
  const typed = decodeTypedData(bytes, dtype, path, what);
  checkLength(typed.byteLength);
  return inMemory(typed);
}

async function externalData(
  message: TensorMessage,
  byteLength: number,
  what: string,
  context: TensorContext,
): Promise<ReadTensor['fetch']> {
  const { path, external } = context;
  const entries = new Map((message.externalData ?? []).map((entry) => [entry.key ?? '', entry.value ?? '']));
  const location = entries.get('location');
  if (location === undefined || location === '')
    throw new FormatError(path, 'external-location-missing', `${what} has external data but names no file`);
  if (external === undefined)
    throw new UnsupportedError(
      `${path}: ${what} is stored in ${JSON.stringify(location)}, but the model was given as bytes, without a folder`,
    );
  const number = (key: string, fallback: number): number => {
    const text = entries.get(key);
    if (text === undefined) return fallback;
    const value = Number(text);
    if (!/^[0-9]+$/.test(text) || !Number.isSafeInteger(value)) {
      throw new FormatError(
        path,
        'external-number-malformed',
        `${what} has external ${key} ${JSON.stringify(text)}, which is not a number of bytes`,
      );
    }
    return value;
  };
  const offset = number('offset', 0);
  const length = number('length', byteLength);
  if (length !== byteLength)
    throw new FormatError(
      path,
      'data-size-mismatch',
      `${what} has ${length} bytes of external data, its shape takes ${byteLength}`,
    );
  const file = await external.at(location, message.name ?? '');
  if (offset + length > file.byteLength) {
    throw new FormatError(
      path,
      'external-out-of-bounds',
      `${what} ends at byte ${offset + length} of ${location}, which has ${file.byteLength}`,
    );
  }
  return (start, end) => file.read(offset + start, offset + end);
}

function inMemory(bytes: Uint8Array): ReadTensor['fetch'] {
  return (start, end) => Promise.resolve(bytes.slice(start, end));
}

/** Bytes in a buffer of their own: callers make typed arrays of it, which must be aligned, and may write to them. */
function owned(bytes: Uint8Array): Uint8Array {
  return bytes.byteLength === bytes.buffer.byteLength ? bytes : bytes.slice();
}
