/** A file being written: under a temporary sibling name until it is published, at any place, whole or not at all. */
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { EnvironmentError } from '../../src/errors.ts';

// One write(2) moves less than 2 GiB, and a long one would hold one of the few I/O threads for seconds.
const WRITE_BYTES = 64 * 1024 * 1024;

/** `write` at any place, then `sync`, then `publish`; `discard` instead removes it. */
export class OutputFile {
  readonly path: string;
  readonly #temporaryPath: string;
  readonly #byteLength: number;
  #handle: FileHandle | undefined;

  private constructor(path: string, temporaryPath: string, byteLength: number, handle: FileHandle) {
    this.path = path;
    this.#temporaryPath = temporaryPath;
    this.#byteLength = byteLength;
    this.#handle = handle;
  }

  /**
   * Creates `<path>.partial`, replacing what a killed run left there.
   * @param byteLength what the file will take, for the message when the disk is full
   */
  static async create(path: string, byteLength: number): Promise<OutputFile> {
    const temporaryPath = `${path}.partial`;
    try {
      await rm(temporaryPath, { force: true });
      return new OutputFile(path, temporaryPath, byteLength, await open(temporaryPath, 'wx'));
    } catch (error) {
      throw unwritable(path, byteLength, error);
    }
  }

  async write(bytes: Uint8Array, position: number): Promise<void> {
    if (this.#handle === undefined) throw new Error(`${this.path} is closed`);
    try {
      let done = 0;
      while (done < bytes.byteLength) {
        const length = Math.min(WRITE_BYTES, bytes.byteLength - done);
        done += (await this.#handle.write(bytes, done, length, position + done)).bytesWritten;
      }
    } catch (error) {
      throw unwritable(this.path, this.#byteLength, error);
    }
  }

  /** Brings the bytes to the disk and closes: a rename that outlives its bytes would leave an empty file after a power cut. */
  async sync(): Promise<void> {
    try {
      await this.#handle?.sync();
      await this.#close();
    } catch (error) {
      throw unwritable(this.path, this.#byteLength, error);
    }
  }

  /** Gives the file its final name, replacing a file of that name. */
  async publish(): Promise<void> {
    try {
      await rename(this.#temporaryPath, this.path);
      await syncFolder(dirname(this.path));
    } catch (error) {
      throw unwritable(this.path, this.#byteLength, error);
    }
  }

  /** Removes what was written and not published. */
  async discard(): Promise<void> {
    await this.#close();
    await rm(this.#temporaryPath, { force: true });
  }

  async #close(): Promise<void> {
    const handle = this.#handle;
    this.#handle = undefined;
    await handle?.close();
  }
}

/** An error of the operating system as one line for the user; any other error as it is. */
function unwritable(path: string, byteLength: number, error: unknown): unknown {
  const code = error instanceof Error && 'code' in error ? String(error.code) : '';
  const cause = { cause: error };
  if (code === 'ENOSPC')
    return new EnvironmentError('DISK_FULL', `${path}: the disk is full; the file takes ${byteLength} bytes`, cause);
  if (code === 'EDQUOT') {
    return new EnvironmentError('DISK_FULL', `${path}: your disk quota is used up; the file takes ${byteLength} bytes`, cause);
  }
  if (code === 'EFBIG') {
    return new EnvironmentError('DISK_FULL', `${path}: ${byteLength} bytes are more than a file may have on this disk`, cause);
  }
  if (['EACCES', 'EPERM', 'EROFS', 'ENOENT', 'ENOTDIR', 'EISDIR', 'ERR_FS_EISDIR'].includes(code)) {
    return new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be written (${(error as Error).message})`, cause);
  }
  return error;
}

/** Makes a rename last; systems that cannot open folders (Windows) need no such thing. */
async function syncFolder(path: string): Promise<void> {
  let folder: FileHandle | undefined;
  try {
    folder = await open(path, 'r');
    await folder.sync();
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? String(error.code) : '';
    if (!['EPERM', 'EISDIR', 'EACCES', 'EINVAL', 'ENOTSUP'].includes(code)) throw error;
  } finally {
    await folder?.close();
  }
}
