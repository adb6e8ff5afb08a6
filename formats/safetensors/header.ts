/**
 * The header of a safetensors file, read: JSON bytes -> checked tensors. A file is a little-endian u64 (the header's length), the
 * header, then the data; offsets count from the first data byte. Each rule of the format has its own name in the errors.
 */
import { FormatError, UnsupportedError } from '../../src/errors.ts';
import { byteLengthOf, elementCount } from '../dtype.ts';
import type { DType, TensorInfo } from '../tensor.ts';
import { type Json, JsonError, parseJson } from './json.ts';

/** A tensor and its bytes' place: `[start, end)` counted from the first data byte. */
export interface HeaderEntry extends TensorInfo {
  readonly start: number;
  readonly end: number;
}

export interface Header {
  /** In the order of their bytes. */
  readonly tensors: ReadonlyMap<string, HeaderEntry>;
  readonly metadata: ReadonlyMap<string, string>;
}

/** Bytes before the header: its length. */
export const LENGTH_BYTES = 8;
// The reference implementation's own limit; a header of a million tensors has about as much.
export const MAX_HEADER_BYTES = 100_000_000;
// No library's tensors have more dimensions than PyTorch's and NumPy's 64; a longer shape is an attack or a mistake.
export const MAX_RANK = 64;
/** The header key that holds free-form strings instead of a tensor. */
export const METADATA_KEY = '__metadata__';

/** Element types a safetensors file can hold and pcomp reads and writes, by their name in the file. */
export const SAFETENSORS_DTYPES: ReadonlySet<string> = new Set<DType>([
  'F64',
  'F32',
  'F16',
  'BF16',
  'F8_E4M3',
  'F8_E5M2',
  'I64',
  'I32',
  'I16',
  'I8',
  'U64',
  'U32',
  'U16',
  'U8',
  'BOOL',
]);
// Part of the format, but nothing pcomp compresses comes in them.
const FOREIGN_DTYPES = new Set(['C64', 'F4', 'F6_E2M3', 'F6_E3M2', 'F8_E8M0', 'F8_E4M3FNUZ', 'F8_E5M2FNUZ']);
const ENTRY_KEYS = ['dtype', 'shape', 'data_offsets'] as const;

/** A name as messages show it: quoted, on one line, of bounded length. */
export function quote(name: string): string {
  return JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}...` : name);
}

/** The header's length from the file's first bytes. Throws FormatError. */
export function parseHeaderLength(path: string, prefix: Uint8Array, fileByteLength: number): number {
  if (fileByteLength === 0) throw new FormatError(path, 'file-empty', 'the file is empty');
  if (fileByteLength < LENGTH_BYTES) {
    const detail = `a safetensors file starts with ${LENGTH_BYTES} bytes of header length, but the file has ${fileByteLength}`;
    throw new FormatError(path, 'header-too-short', detail);
  }
  const length = new DataView(prefix.buffer, prefix.byteOffset, LENGTH_BYTES).getBigUint64(0, true);
  if (length === 0n) throw new FormatError(path, 'header-empty', 'the header has length 0, but holds at least "{}"');
  if (length > MAX_HEADER_BYTES) {
    const detail = `the first 8 bytes give a header of ${length} bytes, but at most ${MAX_HEADER_BYTES} are allowed: not a safetensors file?`;
    throw new FormatError(path, 'header-length-exceeds-limit', detail);
  }
  if (Number(length) > fileByteLength - LENGTH_BYTES) {
    const detail = `the header ends at byte ${Number(length) + LENGTH_BYTES}, but the file has ${fileByteLength}`;
    throw new FormatError(path, 'header-length-exceeds-file', detail);
  }
  return Number(length);
}

/**
 * Checks a header against every rule of the format.
 * @param bytes the header's JSON, @param dataByteLength bytes that follow the header in the file
 */
export function parseHeader(path: string, bytes: Uint8Array, dataByteLength: number): Header {
  const entries: HeaderEntry[] = [];
  let metadata: ReadonlyMap<string, string> = new Map();
  for (const [name, value] of parseHeaderObject(path, bytes)) {
    if (name === METADATA_KEY) metadata = parseMetadata(path, value);
    else entries.push(parseEntry(path, name, value));
  }
  entries.sort((a, b) => a.start - b.start || a.end - b.end);
  checkLayout(path, entries, dataByteLength);
  return { tensors: new Map(entries.map((entry) => [entry.name, entry])), metadata };
}

function parseHeaderObject(path: string, bytes: Uint8Array): ReadonlyMap<string, Json> {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (error) {
    throw new FormatError(path, 'header-not-utf8', 'the header is not valid UTF-8', { cause: error });
  }
  if (text[0] !== '{') {
    throw new FormatError(
      path,
      'header-not-object',
      `the header must begin with "{", but begins with ${quote(text.slice(0, 12))}`,
    );
  }
  try {
    // A text that begins with "{" and parses is an object.
    return parseJson(text) as ReadonlyMap<string, Json>;
  } catch (error) {
    if (!(error instanceof JsonError)) throw error;
    throw new FormatError(path, headerRule(error), `the header is refused: ${error.message}`, { cause: error });
  }
}

function headerRule({ kind, depth }: JsonError): string {
  if (kind === 'syntax') return 'header-not-json';
  if (kind === 'reserved-key') return 'name-reserved';
  return depth === 1 ? 'name-duplicate' : 'key-duplicate';
}

function parseMetadata(path: string, value: Json): ReadonlyMap<string, string> {
  if (!(value instanceof Map)) {
    throw new FormatError(path, 'metadata-not-object', `${METADATA_KEY} must be an object of strings, but is ${show(value)}`);
  }
  for (const [key, item] of value) {
    if (typeof item === 'string') continue;
    throw new FormatError(path, 'metadata-not-string', `${METADATA_KEY} ${quote(key)} must be a string, but is ${show(item)}`);
  }
  return value as ReadonlyMap<string, string>;
}

function parseEntry(path: string, name: string, value: Json): HeaderEntry {
  const tensor = `tensor ${quote(name)}`;
  if (!(value instanceof Map)) {
    throw new FormatError(path, 'entry-not-object', `${tensor} must be described by an object, but is ${show(value)}`);
  }
  for (const key of ENTRY_KEYS) {
    if (!value.has(key)) throw new FormatError(path, 'entry-key-missing', `${tensor} has no "${key}"`);
  }
  for (const key of value.keys()) {
    if ((ENTRY_KEYS as readonly string[]).includes(key)) continue;
    throw new FormatError(
      path,
      'entry-key-unknown',
      `${tensor} has ${quote(key)}, but only ${ENTRY_KEYS.join(', ')} are allowed`,
    );
  }
  const dtype = parseDType(path, tensor, value.get('dtype'));
  const shape = parseShape(path, tensor, dtype, value.get('shape'));
  const [start, end] = parseOffsets(path, tensor, value.get('data_offsets'));
  const byteLength = byteLengthOf(dtype, shape);
  if (end - start !== byteLength) {
    const detail = `${tensor} takes ${end - start} bytes (data_offsets [${start}, ${end}]), but ${dtype} [${shape}] takes ${byteLength}`;
    throw new FormatError(path, 'offsets-size-mismatch', detail);
  }
  return { name, dtype, shape, byteLength, start, end };
}

function parseDType(path: string, tensor: string, value: Json | undefined): DType {
  if (typeof value !== 'string') {
    throw new FormatError(path, 'dtype-not-string', `${tensor}: dtype must be a string, but is ${show(value)}`);
  }
  if (SAFETENSORS_DTYPES.has(value)) return value as DType;
  const supported = [...SAFETENSORS_DTYPES].join(', ');
  if (FOREIGN_DTYPES.has(value)) throw new UnsupportedError(`${path}: ${tensor} is ${value}; pcomp reads ${supported}`);
  throw new FormatError(path, 'dtype-unknown', `${tensor} has dtype ${quote(value)}, but a tensor is one of ${supported}`);
}

function parseShape(path: string, tensor: string, dtype: DType, value: Json | undefined): readonly number[] {
  if (!Array.isArray(value)) {
    throw new FormatError(path, 'shape-not-array', `${tensor}: shape must be a list, but is ${show(value)}`);
  }
  if (value.length > MAX_RANK) {
    throw new FormatError(
      path,
      'shape-rank-exceeds-limit',
      `${tensor} has ${value.length} dimensions, but at most ${MAX_RANK} are allowed`,
    );
  }
  for (const dim of value) {
    if (!isInteger(dim))
      throw new FormatError(path, 'shape-not-integer', `${tensor}: a dimension is ${show(dim)}, not an integer`);
    if (dim < 0) throw new FormatError(path, 'shape-negative', `${tensor}: a dimension is ${dim}, less than 0`);
  }
  const shape = value as readonly number[];
  // Every partial product counts, so that [2^40, 2^40, 0] is as absurd here as it is to readers that multiply in 64 bits.
  const largest = Math.max(...shape.map((_, i) => elementCount(shape.slice(0, i + 1))), byteLengthOf(dtype, shape));
  // Written so that NaN (of Infinity times 0) is refused too.
  if (!(largest <= Number.MAX_SAFE_INTEGER)) {
    throw new FormatError(path, 'shape-overflow', `${tensor}: ${dtype} [${shape}] is larger than 2^53 bytes`);
  }
  return shape;
}

function parseOffsets(path: string, tensor: string, value: Json | undefined): readonly [number, number] {
  if (!Array.isArray(value) || value.length !== 2) {
    throw new FormatError(path, 'offsets-not-pair', `${tensor}: data_offsets must be [start, end], but is ${show(value)}`);
  }
  const [start, end] = value as readonly Json[];
  if (!Number.isSafeInteger(start) || !Number.isSafeInteger(end) || (start as number) < 0 || (end as number) < 0) {
    const detail = `${tensor}: data_offsets [${show(start)}, ${show(end)}] must be integers from 0 to 2^53`;
    throw new FormatError(path, 'offsets-not-integer', detail);
  }
  if ((end as number) < (start as number)) {
    throw new FormatError(path, 'offsets-reversed', `${tensor} ends at byte ${end}, before its start at ${start}`);
  }
  return [start as number, end as number];
}

/** The data is exactly the tensors, one after the other, as the format asks: nothing hides between or behind them. */
function checkLayout(path: string, sorted: readonly HeaderEntry[], dataByteLength: number): void {
  let end = 0;
  for (const entry of sorted) {
    if (entry.start !== end) throw layoutError(path, entry, end, sorted, dataByteLength);
    end = entry.end;
  }
  if (end > dataByteLength) {
    const detail = `the tensors take ${end} bytes, but only ${dataByteLength} follow the header: the file was cut short, fetch it again`;
    throw new FormatError(path, 'data-truncated', detail);
  }
  if (end < dataByteLength) {
    throw new FormatError(path, 'data-trailing', `the tensors take ${end} bytes, but ${dataByteLength} follow the header`);
  }
}

function layoutError(
  path: string,
  entry: HeaderEntry,
  end: number,
  sorted: readonly HeaderEntry[],
  dataByteLength: number,
): FormatError {
  const outside = sorted.find((other) => other.end > dataByteLength);
  if (outside !== undefined) {
    const detail = `tensor ${quote(outside.name)} ends at data byte ${outside.end}, but the file has ${dataByteLength}`;
    return new FormatError(path, 'offsets-out-of-bounds', detail);
  }
  const tensor = `tensor ${quote(entry.name)} starts at data byte ${entry.start}`;
  if (entry === sorted[0]) return new FormatError(path, 'offsets-not-from-zero', `${tensor}, but the first tensor starts at 0`);
  if (entry.start < end) {
    return new FormatError(path, 'offsets-overlap', `${tensor}, but the tensor before it ends at ${end}: they overlap`);
  }
  return new FormatError(
    path,
    'offsets-hole',
    `${tensor}, but the tensor before it ends at ${end}: nothing describes what is between`,
  );
}

/** An integer, however large: 1e30 is one too, and refused later for its size. */
function isInteger(value: Json | undefined): value is number {
  return typeof value === 'number' && (Number.isInteger(value) || value === Infinity);
}

function show(value: Json | undefined): string {
  if (value instanceof Map) return 'an object';
  if (Array.isArray(value)) return `a list of ${value.length}`;
  return typeof value === 'string' ? quote(value) : String(value);
}
