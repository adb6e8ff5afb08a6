/** External data files being written: tensors one after another, page-aligned, in shards that stay below 2 GB. */
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { EnvironmentError } from '../../src/errors.ts';
import type { ExternalPlace } from './encoder.ts';

/** Runtimes map files by pages; the ONNX specification recommends this alignment for that. */
const ALIGNMENT = 4096;

/** Browsers hold a data file in one ArrayBuffer, and those end at 2 GB. */
export const MAX_SHARD_BYTES = 2_000_000_000;

// One call writes less than 2 GiB, and a long one would hold one of the few I/O threads for seconds.
const WRITE_BYTES = 64 * 1024 * 1024;

export interface WrittenFile {
  readonly path: string;
  readonly byteLength: number;
}

interface OpenShard {
  readonly name: string;
  readonly handle: FileHandle;
  byteLength: number;
}

/** What a file is called until it is whole. */
export function temporaryName(name: string): string {
  return `.${name}.partial`;
}

/**
 * Writes `<fileName>_data`, `<fileName>_data_1`, ... into a folder. They have temporary names until `finalize()`; disposing
 * before that removes them.
 */
export class ExternalDataWriter implements AsyncDisposable {
  readonly #folder: string;
  readonly #fileName: string;
  readonly #maxShardBytes: number;
  readonly #shards: OpenShard[] = [];
  #open: OpenShard | undefined;
  #finalized = false;

  /**
   * @param fileName the .onnx file's, `model_q2.onnx`
   * @param maxShardBytes every shard is shorter than this, save one that holds a single tensor which is not
   */
  constructor(folder: string, fileName: string, maxShardBytes = MAX_SHARD_BYTES) {
    this.#folder = folder;
    this.#fileName = fileName;
    this.#maxShardBytes = maxShardBytes;
  }

  /** Appends a tensor of `byteLength` bytes, given in chunks. Throws EnvironmentError DISK_FULL when there is no room. */
  async add(byteLength: number, chunks: AsyncIterable<Uint8Array>): Promise<ExternalPlace> {
    const shard = await this.#shardFor(byteLength);
    const path = this.#temporaryPath(shard.name);
    const offset = aligned(shard.byteLength);
    await write(shard.handle, path, new Uint8Array(offset - shard.byteLength));
    shard.byteLength = offset;
    for await (const chunk of chunks) {
      await write(shard.handle, path, chunk);
      shard.byteLength += chunk.byteLength;
    }
    if (shard.byteLength !== offset + byteLength) {
      throw new RangeError(`a tensor of ${byteLength} bytes was given in ${shard.byteLength - offset}`);
    }
    return { location: shard.name, offset };
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

  /** The shard being written, or the next one when a tensor of `byteLength` bytes would take it to the bound. */
  async #shardFor(byteLength: number): Promise<OpenShard> {
    const current = this.#open;
    if (current !== undefined && aligned(current.byteLength) + byteLength < this.#maxShardBytes) return current;
    await this.#closeOpenShard();
    const index = this.#shards.length;
    const name = `${this.#fileName}_data${index === 0 ? '' : `_${index}`}`;
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

function aligned(offset: number): number {
  return Math.ceil(offset / ALIGNMENT) * ALIGNMENT;
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
