/** External data files being written: tensors one after another, page-aligned, in shards that stay below 2 GB. */
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { EnvironmentError } from '../../src/errors.ts';
import type { ExternalPlace } from './encoder.ts';

/** Runtimes map files by pages; the ONNX specification recommends this alignment for that. */
const ALIGNMENT = 4096;

/** Browsers hold a data file in one ArrayBuffer, and those end at 2 GB. */
export const MAX_SHARD_BYTES = 2_000_000_000;

export interface WrittenFile {
  readonly path: string;
  readonly byteLength: number;
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
  readonly #shards: { readonly name: string; byteLength: number }[] = [];
  #handle: FileHandle | undefined;
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

  /** Appends a tensor of `byteLength` bytes, given in chunks. */
  async add(byteLength: number, chunks: AsyncIterable<Uint8Array>): Promise<ExternalPlace> {
    let shard = this.#shards.at(-1);
    let offset = Math.ceil((shard?.byteLength ?? 0) / ALIGNMENT) * ALIGNMENT;
    if (
      shard === undefined ||
      this.#handle === undefined ||
      (shard.byteLength > 0 && offset + byteLength >= this.#maxShardBytes)
    ) {
      shard = await this.#openShard();
      offset = 0;
    }
    const path = this.#temporaryPath(shard.name);
    await write(this.#handle, path, new Uint8Array(offset - shard.byteLength));
    shard.byteLength = offset;
    for await (const chunk of chunks) {
      await write(this.#handle, path, chunk);
      shard.byteLength += chunk.byteLength;
    }
    if (shard.byteLength !== offset + byteLength) {
      throw new RangeError(`a tensor of ${byteLength} bytes was given in ${shard.byteLength - offset}`);
    }
    return { location: shard.name, offset };
  }

  /** Makes the files durable and gives them their names. */
  async finalize(): Promise<readonly WrittenFile[]> {
    await this.#closeShard();
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
    await this.#handle?.close();
    this.#handle = undefined;
    for (const { name } of this.#shards) await rm(this.#temporaryPath(name), { force: true });
  }

  async #openShard(): Promise<{ readonly name: string; byteLength: number }> {
    await this.#closeShard();
    const index = this.#shards.length;
    const shard = { name: `${this.#fileName}_data${index === 0 ? '' : `_${index}`}`, byteLength: 0 };
    this.#handle = await open(this.#temporaryPath(shard.name), 'w');
    this.#shards.push(shard);
    return shard;
  }

  async #closeShard(): Promise<void> {
    const handle = this.#handle;
    const shard = this.#shards.at(-1);
    this.#handle = undefined;
    if (handle !== undefined && shard !== undefined) await syncAndClose(handle, this.#temporaryPath(shard.name));
  }

  #temporaryPath(name: string): string {
    return join(this.#folder, temporaryName(name));
  }
}

/** Appends all of `bytes`. Throws EnvironmentError DISK_FULL when there is no room. */
export async function write(handle: FileHandle | undefined, path: string, bytes: Uint8Array): Promise<void> {
  if (handle === undefined) throw new Error(`${path} is not open`);
  try {
    for (let done = 0; done < bytes.byteLength; ) done += (await handle.write(bytes, done)).bytesWritten;
  } catch (cause) {
    throw diskFull(cause, path);
  }
}

/** Makes the file durable and closes it. A disk may turn out to be full only now. */
export async function syncAndClose(handle: FileHandle, path: string): Promise<void> {
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
