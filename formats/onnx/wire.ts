/** Protobuf's wire format, walked without decoding, so that large byte strings can be left where they are. */
import { FormatError } from '../../src/errors.ts';

/** Bytes that are somewhere: in memory or in a file. */
export interface ByteSource {
  /** What messages call it: the path of the file. */
  readonly path: string;
  readonly byteLength: number;
  /** Exactly the bytes `[start, end)`. The result is read-only and may share memory with the source. */
  read(start: number, end: number): Promise<Uint8Array>;
}

export class MemorySource implements ByteSource {
  readonly path: string;
  readonly #bytes: Uint8Array;

  constructor(path: string, bytes: Uint8Array) {
    this.path = path;
    // A Buffer's slices would share its memory.
    this.#bytes = new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get byteLength(): number {
    return this.#bytes.byteLength;
  }

  read(start: number, end: number): Promise<Uint8Array> {
    return Promise.resolve(this.#bytes.subarray(start, end));
  }
}

/** Large enough that a graph's nodes take few reads, small enough that skipping from initializer to initializer wastes little. */
const WINDOW_BYTES = 64 * 1024;

/** Serves many small neighbouring reads from one larger one. */
export class WindowedSource implements ByteSource {
  readonly path: string;
  readonly byteLength: number;
  readonly #source: ByteSource;
  #window = new Uint8Array(0);
  #windowStart = 0;

  constructor(source: ByteSource) {
    this.#source = source;
    this.path = source.path;
    this.byteLength = source.byteLength;
  }

  async read(start: number, end: number): Promise<Uint8Array> {
    if (start < this.#windowStart || end > this.#windowStart + this.#window.byteLength) {
      if (end - start > WINDOW_BYTES) return this.#source.read(start, end);
      this.#window = Uint8Array.from(await this.#source.read(start, Math.min(start + WINDOW_BYTES, this.byteLength)));
      this.#windowStart = start;
    }
    return this.#window.subarray(start - this.#windowStart, end - this.#windowStart);
  }
}

export const WIRE = { varint: 0, fixed64: 1, bytes: 2, fixed32: 5 } as const;

/** One field of a message: its record is `[start, end)`, its value `[valueStart, end)`. */
export interface WireField {
  readonly number: number;
  readonly wireType: number;
  readonly start: number;
  readonly valueStart: number;
  readonly end: number;
}

/** A varint of 64 bits takes at most ten bytes; a tag or a length is one varint. */
const MAX_VARINT_BYTES = 10;

/** What a broken message is called: the outermost one tells that this is no ONNX file at all. */
export interface BrokenRules {
  /** A tag or varint that cannot be. */
  readonly malformed: string;
  /** A value that ends after the message does. */
  readonly overrun: string;
}

/** The fields of the message at `[start, end)`, in file order. Throws FormatError with the given rules. */
export async function* fieldsOf(source: ByteSource, start: number, end: number, rules: BrokenRules): AsyncGenerator<WireField> {
  let position = start;
  while (position < end) {
    const head = await source.read(position, Math.min(position + 2 * MAX_VARINT_BYTES, end));
    const tag = varintAt(source, head, 0, position, end, rules);
    const number = Math.floor(tag.value / 8);
    const wireType = tag.value % 8;
    if (number < 1 || number > 0x1fffffff) {
      throw new FormatError(
        source.path,
        rules.malformed,
        `byte ${position} starts a field numbered ${number}; protobuf numbers them 1 to 536870911`,
      );
    }
    const field = (valueOffset: number, length: number): WireField => {
      const valueStart = position + valueOffset;
      if (valueStart + length > end) {
        throw new FormatError(
          source.path,
          rules.overrun,
          `field ${number} at byte ${position} ends at byte ${valueStart + length}, but its message ends at byte ${end}`,
        );
      }
      return { number, wireType, start: position, valueStart, end: valueStart + length };
    };
    let found: WireField;
    if (wireType === WIRE.varint) found = field(tag.next, varintAt(source, head, tag.next, position, end, rules).next - tag.next);
    else if (wireType === WIRE.fixed64) found = field(tag.next, 8);
    else if (wireType === WIRE.fixed32) found = field(tag.next, 4);
    else if (wireType === WIRE.bytes) {
      const length = varintAt(source, head, tag.next, position, end, rules);
      found = field(length.next, length.value);
    } else {
      throw new FormatError(
        source.path,
        rules.malformed,
        `field ${number} at byte ${position} has wire type ${wireType}; ONNX uses 0, 1, 2 and 5`,
      );
    }
    yield found;
    position = found.end;
  }
}

/** Reads the varint at `offset` of `bytes`, which start at byte `position` of the source. Values above 2^53 lose low bits. */
function varintAt(
  source: ByteSource,
  bytes: Uint8Array,
  offset: number,
  position: number,
  end: number,
  rules: BrokenRules,
): { readonly value: number; readonly next: number } {
  let value = 0;
  let unit = 1;
  for (let i = offset; i < offset + MAX_VARINT_BYTES; i++) {
    if (i >= bytes.byteLength) {
      throw new FormatError(
        source.path,
        rules.overrun,
        `the number at byte ${position + offset} does not end before its message does, at byte ${end}`,
      );
    }
    value += (bytes[i] & 0x7f) * unit;
    unit *= 128;
    if (bytes[i] < 0x80) return { value, next: i + 1 };
  }
  throw new FormatError(
    source.path,
    rules.malformed,
    `the number at byte ${position + offset} is longer than ${MAX_VARINT_BYTES} bytes`,
  );
}

/** Tag and length of a byte string field, ready to precede its bytes. */
export function bytesFieldHead(number: number, length: number): Uint8Array {
  return Uint8Array.from([...varint(number * 8 + WIRE.bytes), ...varint(length)]);
}

/** A whole byte string field. */
export function bytesField(number: number, bytes: Uint8Array): Uint8Array {
  return concat([bytesFieldHead(number, bytes.byteLength), bytes]);
}

export function concat(parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.byteLength;
  }
  return whole;
}

function varint(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  for (; rest >= 0x80; rest = Math.floor(rest / 128)) bytes.push((rest % 128) + 0x80);
  bytes.push(rest);
  return bytes;
}
