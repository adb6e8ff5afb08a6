/** Writes a safetensors file: told every tensor up front, it knows every offset, takes bytes in any order, and appears only when whole. */
import type { TensorDeclaration, TensorSink } from '../tensor.ts';
import { Coverage } from './coverage.ts';
import { type HeaderEntry, quote } from './header.ts';
import { type Layout, layOut } from './layout.ts';
import { OutputFile } from './output-file.ts';

const NO_METADATA: ReadonlyMap<string, string> = new Map();

/**
 * Starts a file at `path` (written beside it as `<path>.partial`). Equal declarations and metadata, in any order, give equal bytes.
 * Throws UnsupportedError for what the format cannot hold, EnvironmentError `DISK_FULL` or for a folder that cannot be written.
 */
export async function createSafetensorsSink(
  path: string,
  declarations: readonly TensorDeclaration[],
  metadata: ReadonlyMap<string, string> = NO_METADATA,
): Promise<SafetensorsSink> {
  const layout = layOut(declarations, metadata);
  const file = await OutputFile.create(path, layout.fileByteLength);
  try {
    await file.write(layout.prefix, 0);
    return new SafetensorsSink(file, layout);
  } catch (error) {
    await file.discard();
    throw error;
  }
}

/** `finalize()` in two steps, so that several files can be checked before any of them appears: `complete()`, then `publish()`. */
export class SafetensorsSink implements TensorSink {
  readonly path: string;
  /** Size of the finished file. */
  readonly byteLength: number;
  readonly #file: OutputFile;
  readonly #dataStart: number;
  readonly #tensors: ReadonlyMap<string, { readonly entry: HeaderEntry; readonly coverage: Coverage }>;
  /** After a failed write the file cannot be trusted: it can only be discarded. */
  #state: 'open' | 'failed' | 'complete' | 'published' | 'discarded' = 'open';
  #pendingWrites = 0;

  constructor(file: OutputFile, { prefix, tensors, fileByteLength }: Layout) {
    this.path = file.path;
    this.byteLength = fileByteLength;
    this.#file = file;
    this.#dataStart = prefix.byteLength;
    this.#tensors = new Map([...tensors].map(([name, entry]) => [name, { entry, coverage: new Coverage(entry.byteLength) }]));
  }

  async write(name: string, data: Uint8Array): Promise<void> {
    const { entry } = this.#tensor(name);
    if (data.byteLength !== entry.byteLength) {
      throw new RangeError(`tensor ${quote(name)} takes ${entry.byteLength} bytes, but ${data.byteLength} were given`);
    }
    await this.#writeAt(name, 0, data);
  }

  async writeRows(name: string, start: number, data: Uint8Array): Promise<void> {
    const { shape, byteLength } = this.#tensor(name).entry;
    const rowCount = shape[0];
    if (rowCount === undefined) throw new RangeError(`tensor ${quote(name)} is a scalar and has no rows`);
    const rowByteLength = rowCount === 0 ? 0 : byteLength / rowCount;
    const wholeRows = rowByteLength === 0 ? data.byteLength === 0 : data.byteLength % rowByteLength === 0;
    if (!wholeRows || !Number.isInteger(start) || start < 0 || start * rowByteLength + data.byteLength > byteLength) {
      const rows = `${data.byteLength} bytes from row ${start} on`;
      throw new RangeError(`tensor ${quote(name)} has ${rowCount} rows of ${rowByteLength} bytes, but ${rows} were given`);
    }
    await this.#writeAt(name, start * rowByteLength, data);
  }

  /** Checks that every byte was written and brings them to the disk. The file keeps its temporary name. */
  async complete(): Promise<void> {
    this.#checkOpen();
    if (this.#pendingWrites > 0) throw new Error(`${this.path}: ${this.#pendingWrites} writes are still under way`);
    for (const [name, { coverage }] of this.#tensors) {
      const gap = coverage.gap();
      if (gap !== undefined)
        throw new Error(`${this.path}: bytes [${gap.start}, ${gap.end}) of tensor ${quote(name)} were never written`);
    }
    this.#state = 'complete';
    await this.#file.sync();
  }

  /** Gives the completed file its final name. */
  async publish(): Promise<void> {
    if (this.#state !== 'complete') throw new Error(`${this.path} is ${this.#state}`);
    await this.#file.publish();
    this.#state = 'published';
  }

  async finalize(): Promise<readonly string[]> {
    await this.complete();
    await this.publish();
    return [this.path];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#state === 'published' || this.#state === 'discarded') return;
    this.#state = 'discarded';
    await this.#file.discard();
  }

  async #writeAt(name: string, offset: number, data: Uint8Array): Promise<void> {
    const { entry, coverage } = this.#tensor(name);
    // Taken before the first await: of two writes at once to one place, the second must fail.
    if (!coverage.claim(offset, offset + data.byteLength)) {
      throw new Error(`${this.path}: bytes [${offset}, ${offset + data.byteLength}) of tensor ${quote(name)} are written twice`);
    }
    this.#pendingWrites += 1;
    try {
      await this.#file.write(data, this.#dataStart + entry.start + offset);
    } catch (error) {
      if (this.#state === 'open') this.#state = 'failed';
      throw error;
    } finally {
      this.#pendingWrites -= 1;
    }
  }

  #tensor(name: string): { readonly entry: HeaderEntry; readonly coverage: Coverage } {
    this.#checkOpen();
    const tensor = this.#tensors.get(name);
    if (tensor === undefined) throw new RangeError(`${this.path}: tensor ${quote(name)} was not declared`);
    return tensor;
  }

  #checkOpen(): void {
    if (this.#state !== 'open') throw new Error(`${this.path} is ${this.#state}`);
  }
}
