/** Reads a safetensors file lazily: the header when it is opened, a tensor's or a row range's bytes when asked for, nothing else. */
import { FormatError } from '../../src/errors.ts';
import { refuseForeign, SNIFF_BYTES } from '../sniff.ts';
import type { Tensor, TensorSource } from '../tensor.ts';
import { openFile, type RandomAccessFile } from './file.ts';
import { type Header, type HeaderEntry, LENGTH_BYTES, parseHeader, parseHeaderLength, quote } from './header.ts';

/** Where a tensor's bytes are: for readers that go to the file themselves. */
export interface FilePlace {
  readonly path: string;
  /** First byte, counted from the file's start. */
  readonly position: number;
}

/** A source whose tensors lie in files as they are. */
export interface PlacedSource extends TensorSource {
  /** Throws FormatError `tensor-missing` when there is none of that name. */
  placeOf(name: string): FilePlace;
}

/**
 * Opens one `.safetensors` file. Throws FormatError (the file breaks a rule), UnsupportedError (it is another format),
 * EnvironmentError `FILE_UNREADABLE`.
 */
export async function openSafetensors(path: string): Promise<PlacedSource> {
  return readSafetensors(await openFile(path));
}

/** As `openSafetensors`, from an open file, which the source then owns; it is closed when the header is refused. */
export async function readSafetensors(file: RandomAccessFile): Promise<PlacedSource> {
  const { path, byteLength } = file;
  try {
    const prefix = await file.read(0, Math.min(byteLength, SNIFF_BYTES));
    refuseForeign(path, prefix);
    const dataStart = LENGTH_BYTES + parseHeaderLength(path, prefix, byteLength);
    const header = parseHeader(path, await file.read(LENGTH_BYTES, dataStart), byteLength - dataStart);
    return new SafetensorsSource(file, header, dataStart);
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** The FormatError of asking for a tensor that is not there. */
export function missingTensor(path: string, name: string, count: number): FormatError {
  return new FormatError(path, 'tensor-missing', `there is no tensor ${quote(name)} among its ${count}`);
}

class SafetensorsSource implements PlacedSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, HeaderEntry>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: readonly { readonly path: string; readonly byteLength: number }[];
  readonly #file: RandomAccessFile;
  readonly #dataStart: number;

  constructor(file: RandomAccessFile, { tensors, metadata }: Header, dataStart: number) {
    this.path = file.path;
    this.tensors = tensors;
    this.metadata = metadata;
    this.files = [{ path: file.path, byteLength: file.byteLength }];
    this.#file = file;
    this.#dataStart = dataStart;
  }

  async read(name: string): Promise<Tensor> {
    const { dtype, shape, byteLength, start, end } = this.#entry(name);
    return { name, dtype, shape, byteLength, data: await this.#read(start, end) };
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const entry = this.#entry(name);
    const [rowCount, ...rowShape] = entry.shape;
    if (
      rowCount === undefined ||
      !Number.isInteger(start) ||
      !Number.isInteger(end) ||
      start < 0 ||
      end < start ||
      end > rowCount
    ) {
      throw new RangeError(`rows [${start}, ${end}) of tensor ${quote(name)} of shape [${entry.shape}]`);
    }
    const rowByteLength = rowCount === 0 ? 0 : entry.byteLength / rowCount;
    const data = await this.#read(entry.start + start * rowByteLength, entry.start + end * rowByteLength);
    return { name, dtype: entry.dtype, shape: [end - start, ...rowShape], byteLength: data.byteLength, data };
  }

  placeOf(name: string): FilePlace {
    return { path: this.path, position: this.#dataStart + this.#entry(name).start };
  }

  #entry(name: string): HeaderEntry {
    const entry = this.tensors.get(name);
    if (entry === undefined) throw missingTensor(this.path, name, this.tensors.size);
    return entry;
  }

  #read(start: number, end: number): Promise<Uint8Array> {
    return this.#file.read(this.#dataStart + start, this.#dataStart + end);
  }

  async close(): Promise<void> {
    await this.#file.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
