/** External data files being written: tensors one after another, aligned, in shards that stay below 2 GB. */
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { EnvironmentError } from '../../src/errors.ts';
import type { ExternalPlace } from './encoder.ts';
import { LARGE_BYTES } from './tensor-reader.ts';

/** Runtimes map files by pages, and the ONNX specification recommends this alignment for that. */
const PAGE = 4096;
/** Tensors from here on begin a page, as onnxruntime's own writer has it: for smaller ones pages would cost files of a few megabytes a tenth of their size. */
const PAGED_BYTES = 2 ** 20;
/** Others begin where the widest vector instructions load from. */
const ALIGNMENT = 64;

/** Browsers hold a data file in one ArrayBuffer, and those end at 2 GB. */
export const MAX_SHARD_BYTES = 2_000_000_000;

// One call writes less than 2 GiB, and a long one would hold one of the few I/O threads for seconds.
const WRITE_BYTES = 64 * 1024 * 1024;

export interface WrittenFile {
  readonly path: string;
  readonly byteLength: number;
}

/** A data file and how much of it is taken. */
interface Shard {
  readonly name: string;
  byteLength: number;
}

interface OpenShard extends Shard {
  readonly handle: FileHandle;
}

/** What a file is called until it is whole. */
export function temporaryName(name: string): string {
  return `.${name}.partial`;
}

/** Bytes between a tensor of so many and the next, where that begins no page. */
export function gapBehind(byteLength: number): number {
  return byteLength < LARGE_BYTES ? 0 : Math.ceil(byteLength / ALIGNMENT) * ALIGNMENT - byteLength;
}

/** Where tensors go: in the file that is being filled, or the next one when a tensor would take that to the bound. Writes nothing. */
export class DataPlaces {
  readonly #fileName: string;
  readonly #maxShardBytes: number;
  readonly #shards: Shard[] = [];

  /** As ExternalDataWriter takes them. */
  constructor(fileName: string, maxShardBytes = MAX_SHARD_BYTES) {
    this.#fileName = fileName;
    this.#maxShardBytes = maxShardBytes;
  }

  /** Files so far, with what is taken of each. */
  get shards(): readonly Readonly<Shard>[] {
    return this.#shards;
  }

  /** Takes a place for a tensor. */
  add(byteLength: number): ExternalPlace {
    const alignment = byteLength < PAGED_BYTES ? ALIGNMENT : PAGE;
    const aligned = (offset: number) => Math.ceil(offset / alignment) * alignment;
    let shard = this.#shards.at(-1);
    if (shard === undefined || aligned(shard.byteLength) + byteLength >= this.#maxShardBytes) {
      const index = this.#shards.length;
      shard = { name: `${this.#fileName}_data${index === 0 ? '' : `_${index}`}`, byteLength: 0 };
      this.#shards.push(shard);
    }
    const offset = aligned(shard.byteLength);
    shard.byteLength = offset + byteLength;
    return { location: shard.name, offset };
  }
}

/**
 * Writes `<fileName>_data`, `<fileName>_data_1`, ... into a folder. They have temporary names until `finalize()`; disposing
 * before that removes them.
 */
export class ExternalDataWriter implements AsyncDisposable {
  readonly #folder: string;
  readonly #places: DataPlaces;
  readonly #shards: OpenShard[] = [];
  #open: OpenShard | undefined;
  #finalized = false;

  /**
   * @param fileName the .onnx file's, `model_q2.onnx`
   * @param maxShardBytes every shard is shorter than this, save one that holds a single tensor which is not
   */
  constructor(folder: string, fileName: string, maxShardBytes = MAX_SHARD_BYTES) {
    this.#folder = folder;
    this.#places = new DataPlaces(fileName, maxShardBytes);
  }

  /** Appends a tensor of `byteLength` bytes, given in chunks. Throws EnvironmentError DISK_FULL when there is no room. */
  async add(byteLength: number, chunks: AsyncIterable<Uint8Array>): Promise<ExternalPlace> {
    const place = this.#places.add(byteLength);
    const { location, offset } = place;
    const shard = await this.#shardNamed(location);
    const path = this.#temporaryPath(location);
    await write(shard.handle, path, new Uint8Array(offset - shard.byteLength));
    shard.byteLength = offset;
    for await (const chunk of chunks) {
      await write(shard.handle, path, chunk);
      shard.byteLength += chunk.byteLength;
    }
    if (shard.byteLength !== offset + byteLength) {
      throw new RangeError(`a tensor of ${byteLength} bytes was given in ${shard.byteLength - offset}`);
    }
    return place;
  }

  /** Makes the files durable and gives them their names. */
  async finalize(): Promise<readonly WrittenFile[]> {
    await this.#closeOpenShard();
    const files: WrittenFile[] = [];
    for (const { name, byteLength } of this.#shards) {
      const path = join(this.#folder, name);
      await rename(this.#temporaryPath(name), path);
      files.push({ path, byteLength });
    }
    this.#finalized = true;
    return files;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#finalized) return;
    await this.#open?.handle.close();
    this.#open = undefined;
    for (const { name } of this.#shards) await rm(this.#temporaryPath(name), { force: true });
  }

  /** The shard being written, or a new one once that is whole. */
  async #shardNamed(name: string): Promise<OpenShard> {
    if (this.#open?.name === name) return this.#open;
    await this.#closeOpenShard();
    this.#open = { name, byteLength: 0, handle: await open(this.#temporaryPath(name), 'w') };
    this.#shards.push(this.#open);
    return this.#open;
  }

  async #closeOpenShard(): Promise<void> {
    const shard = this.#open;
    this.#open = undefined;
    if (shard !== undefined) await syncAndClose(shard.handle, this.#temporaryPath(shard.name));
  }

  #temporaryPath(name: string): string {
    return join(this.#folder, temporaryName(name));
  }
}

/** Writes a whole file. Throws EnvironmentError DISK_FULL when there is no room. */
export async function writeDurably(path: string, bytes: Uint8Array): Promise<void> {
  const handle = await open(path, 'w');
  try {
    await write(handle, path, bytes);
  } catch (error) {
    await handle.close();
    throw error;
  }
  await syncAndClose(handle, path);
}

/** Appends all of `bytes`. Throws EnvironmentError DISK_FULL when there is no room. */
async function write(handle: FileHandle, path: string, bytes: Uint8Array): Promise<void> {
  try {
    for (let done = 0; done < bytes.byteLength; ) {
      done += (await handle.write(bytes, done, Math.min(WRITE_BYTES, bytes.byteLength - done))).bytesWritten;
    }
  } catch (cause) {
    throw diskFull(cause, path);
  }
}

/** Makes the file durable and closes it. A disk may turn out to be full only now. */
async function syncAndClose(handle: FileHandle, path: string): Promise<void> {
  try {
    await handle.sync();
  } catch (cause) {
    throw diskFull(cause, path);
  } finally {
    await handle.close();
  }
}

/** The error to throw for one the system gave. */
function diskFull(cause: unknown, path: string): unknown {
  const { code } = cause as NodeJS.ErrnoException;
  if (code !== 'ENOSPC' && code !== 'EDQUOT') return cause;
  return new EnvironmentError('DISK_FULL', `${path}: the disk is full. Free some space, or write to another disk.`, { cause });
}
