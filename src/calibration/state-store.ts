/** Where long activations live: rows of floats in RAM up to a bound, and in a temporary file beyond it. */
import { type FileHandle, mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { EnvironmentError } from '../errors.ts';

/** 512 MiB: the hidden states of 8 x 2048 tokens of a 7B model, and the larger half of their site inputs. */
export const DEFAULT_RAM_BYTES = 512 * 1024 * 1024;

/** One store's part in RAM is one typed array, and those end at 2^32 elements; the rest goes to the file. */
const MAX_RAM_BYTES = 2 ** 34 - 2 ** 20;

export interface SpoolOptions {
  /** Bytes of activations kept in RAM, all stores together. */
  readonly ramBytes?: number;
  /** Where the temporary folder is made; default: the system's. */
  readonly folder?: string;
}

/** Makes stores that share one bound on RAM and one temporary folder, all of which go away with the spool. */
export class Spool implements AsyncDisposable {
  #ramLeft: number;
  readonly #parent: string;
  #folder: Promise<string> | undefined;
  #files = 0;
  readonly #stores = new Set<StateStore>();

  constructor(options: SpoolOptions = {}) {
    this.#ramLeft = options.ramBytes ?? DEFAULT_RAM_BYTES;
    this.#parent = options.folder ?? tmpdir();
  }

  /** Whether such a store would be in RAM as a whole. */
  fits(rows: number, columns: number): boolean {
    return rows * columns * Float32Array.BYTES_PER_ELEMENT <= Math.min(this.#ramLeft, MAX_RAM_BYTES);
  }

  /** A store of `rows` rows of `columns` floats, all zero; what RAM is left takes the first rows, a file the others. */
  allocate(rows: number, columns: number): StateStore {
    const rowBytes = columns * Float32Array.BYTES_PER_ELEMENT;
    const ramRows = Math.max(0, Math.min(rows, Math.floor(Math.min(this.#ramLeft, MAX_RAM_BYTES) / rowBytes)));
    this.#ramLeft -= ramRows * rowBytes;
    const store = new StateStore(rows, columns, ramRows, {
      createFile: () => this.#createFile(),
      release: () => {
        this.#ramLeft += ramRows * rowBytes;
        this.#stores.delete(store);
      },
    });
    this.#stores.add(store);
    return store;
  }

  async #createFile(): Promise<SpoolFile> {
    try {
      this.#folder ??= mkdtemp(join(this.#parent, 'pcomp-'));
      const path = join(await this.#folder, `activations-${this.#files++}.f32`);
      const handle = await open(path, 'wx+', 0o600);
      // A file without a name goes away with the process, however that ends. Where the system refuses, it goes on disposal.
      await rm(path, { force: true }).catch(() => undefined);
      return { path, handle };
    } catch (error) {
      throw diskError(error, this.#parent);
    }
  }

  /** Disposes the stores that are still open, whose files may have no name any more, and removes the temporary folder. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const store of this.#stores) await store[Symbol.asyncDispose]();
    // A folder that could not be made was reported when it was needed.
    const folder = await this.#folder?.catch(() => undefined);
    this.#folder = undefined;
    if (folder !== undefined) await rm(folder, { recursive: true, force: true });
  }
}

interface SpoolFile {
  readonly path: string;
  readonly handle: FileHandle;
}

interface StoreOwner {
  createFile(): Promise<SpoolFile>;
  release(): void;
}

/** `rows` rows of `columns` floats with positional reads and writes. Made by `Spool.allocate`. */
export class StateStore implements AsyncDisposable {
  readonly rows: number;
  readonly columns: number;
  /** Rows `[0, ramRows)` are in RAM, the others in the file. */
  readonly ramRows: number;
  #ram: Float32Array;
  #file: Promise<SpoolFile> | undefined;
  readonly #owner: StoreOwner;
  #appended = 0;
  #open = true;

  constructor(rows: number, columns: number, ramRows: number, owner: StoreOwner) {
    this.rows = rows;
    this.columns = columns;
    this.ramRows = ramRows;
    this.#ram = allocateRam(ramRows * columns);
    this.#owner = owner;
  }

  /** Writes whole rows after those appended before. */
  async append(data: Float32Array): Promise<void> {
    const start = this.#appended;
    this.#appended += data.length / this.columns;
    await this.write(start, data);
  }

  /** Writes whole rows, the first at row `start`. Throws EnvironmentError DISK_FULL when the file cannot grow. */
  async write(start: number, data: Float32Array): Promise<void> {
    const count = data.length / this.columns;
    this.#check(start, start + count);
    const inRam = Math.max(0, Math.min(count, this.ramRows - start));
    this.#ram.set(
      inRam === count ? data : data.subarray(0, inRam * this.columns),
      start < this.ramRows ? start * this.columns : 0,
    );
    if (inRam === count) return;
    const { path, handle } = await this.#spooled();
    const rest = data.subarray(inRam * this.columns);
    try {
      await writeFully(handle, bytesOf(rest), this.#filePosition(start + inRam));
    } catch (error) {
      throw diskError(error, path);
    }
  }

  /** Rows `[start, end)`: a view of the store itself when they are in RAM (do not change it), otherwise a copy. */
  async read(start: number, end: number): Promise<Float32Array> {
    this.#check(start, end);
    const { columns, ramRows } = this;
    if (end <= ramRows) return this.#ram.subarray(start * columns, end * columns);
    const out = new Float32Array((end - start) * columns);
    const inRam = Math.max(0, ramRows - start);
    if (inRam > 0) out.set(this.#ram.subarray(start * columns));
    const { path, handle } = await this.#spooled();
    try {
      await readFully(handle, bytesOf(out.subarray(inRam * columns)), this.#filePosition(start + inRam));
    } catch (error) {
      throw diskError(error, path);
    }
    return out;
  }

  /** Gives the RAM back to the spool and deletes the file. May be called twice. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#open) return;
    this.#open = false;
    this.#ram = new Float32Array(0);
    this.#owner.release();
    const file = await this.#file?.catch(() => undefined);
    await file?.handle.close();
    if (file) await rm(file.path, { force: true });
  }

  #spooled(): Promise<SpoolFile> {
    this.#file ??= this.#owner.createFile();
    return this.#file;
  }

  #filePosition(row: number): number {
    return (row - this.ramRows) * this.columns * Float32Array.BYTES_PER_ELEMENT;
  }

  #check(start: number, end: number): void {
    if (!this.#open) throw new Error('the activation store was disposed');
    if (!Number.isInteger(end) || start < 0 || end > this.rows || start > end) {
      throw new RangeError(`rows ${start}..${end} of an activation store of ${this.rows} rows of ${this.columns}`);
    }
  }
}

function allocateRam(length: number): Float32Array {
  try {
    return new Float32Array(length);
  } catch (error) {
    const detail = `no memory for ${length * Float32Array.BYTES_PER_ELEMENT} bytes of activations; lower --max-memory, and more of them go to disk`;
    throw new EnvironmentError('OUT_OF_MEMORY', detail, { cause: error });
  }
}

function bytesOf(data: Float32Array): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/** One system call moves at most about 2 GiB. */
const MAX_TRANSFER = 1 << 30;

async function writeFully(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, done, Math.min(bytes.length - done, MAX_TRANSFER), position + done);
    done += bytesWritten;
  }
}

/** Bytes past the end of the file were never written and stay zero. */
async function readFully(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const { bytesRead } = await handle.read(bytes, done, Math.min(bytes.length - done, MAX_TRANSFER), position + done);
    if (bytesRead === 0) return;
    done += bytesRead;
  }
}

/** Errors of the temporary file that a user can do something about. */
export function diskError(error: unknown, path: string): unknown {
  const code = (error as NodeJS.ErrnoException | undefined)?.code;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new EnvironmentError(
      'DISK_FULL',
      `${path}: no space left for the activations of the calibration text; free some, set TMPDIR to a larger disk, or lower --samples`,
      { cause: error },
    );
  }
  if (code === 'EACCES' || code === 'EPERM' || code === 'ENOENT' || code === 'EROFS') {
    return new EnvironmentError(
      'FILE_UNREADABLE',
      `${path}: cannot keep temporary activations here (${code}); set TMPDIR to a writable folder`,
      {
        cause: error,
      },
    );
  }
  return error;
}
