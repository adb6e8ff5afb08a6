/** A file of known size, read at any place, a bounded piece at a time. */
import { constants } from 'node:buffer';
import { type FileHandle, open, stat } from 'node:fs/promises';
import { EnvironmentError, FormatError, UnsupportedError } from '../../src/errors.ts';

/** What a reader needs of a file. */
export interface RandomAccessFile {
  readonly path: string;
  /** Bytes in the file when it was opened. */
  readonly byteLength: number;
  /** Bytes `[start, end)`. Throws FormatError `file-changed` when the file has become shorter. */
  read(start: number, end: number): Promise<Uint8Array>;
  close(): Promise<void>;
}

// One read(2) moves less than 2 GiB, and a long one would hold one of the few I/O threads for seconds.
const READ_BYTES = 64 * 1024 * 1024;

/** Opens a regular file. Throws EnvironmentError `FILE_UNREADABLE` for anything else. */
export async function openFile(path: string): Promise<RandomAccessFile> {
  let handle: FileHandle | undefined;
  try {
    // Asked before opening: opening a named pipe would wait for a writer.
    if (!(await stat(path)).isFile()) throw new EnvironmentError('FILE_UNREADABLE', `${path}: not a regular file`);
    handle = await open(path, 'r');
    return new DiskFile(path, (await handle.stat()).size, handle);
  } catch (error) {
    await handle?.close();
    throw unreadable(path, error);
  }
}

/** An error of the operating system as one line for the user; any other error as it is. */
export function unreadable(path: string, error: unknown): unknown {
  const code = error instanceof Error && 'code' in error ? String(error.code) : '';
  if (error instanceof EnvironmentError || code === '') return error;
  const reason = REASONS.get(code) ?? (error as Error).message;
  return new EnvironmentError('FILE_UNREADABLE', `${path}: ${reason}`, { cause: error });
}

const REASONS = new Map([
  ['ENOENT', 'no such file or folder'],
  ['ENOTDIR', 'no such file or folder'],
  ['EACCES', 'no permission to read it'],
  ['EPERM', 'no permission to read it'],
  ['ELOOP', 'its symbolic links run in a circle'],
  ['EMFILE', 'too many files are open'],
]);

class DiskFile implements RandomAccessFile {
  readonly path: string;
  readonly byteLength: number;
  readonly #handle: FileHandle;

  constructor(path: string, byteLength: number, handle: FileHandle) {
    this.path = path;
    this.byteLength = byteLength;
    this.#handle = handle;
  }

  async read(start: number, end: number): Promise<Uint8Array> {
    const bytes = allocate(this.path, end - start);
    let done = 0;
    while (done < bytes.byteLength) {
      const length = Math.min(READ_BYTES, bytes.byteLength - done);
      const { bytesRead } = await this.#readOnce(bytes, done, length, start + done);
      if (bytesRead === 0) {
        throw new FormatError(
          this.path,
          'file-changed',
          `ends at byte ${start + done}, but had ${this.byteLength} bytes when it was opened: something is rewriting it`,
        );
      }
      done += bytesRead;
    }
    return bytes;
  }

  async #readOnce(bytes: Uint8Array, offset: number, length: number, position: number): Promise<{ bytesRead: number }> {
    try {
      return await this.#handle.read(bytes, offset, length, position);
    } catch (error) {
      throw unreadable(this.path, error);
    }
  }

  async close(): Promise<void> {
    await this.#handle.close();
  }
}

function allocate(path: string, byteLength: number): Uint8Array {
  if (byteLength > constants.MAX_LENGTH) {
    throw new UnsupportedError(
      `${path}: ${byteLength} bytes at once, but one buffer holds ${constants.MAX_LENGTH}; read it in rows`,
    );
  }
  try {
    return new Uint8Array(byteLength);
  } catch (error) {
    throw new EnvironmentError('OUT_OF_MEMORY', `${path}: no memory for a tensor of ${byteLength} bytes`, { cause: error });
  }
}
