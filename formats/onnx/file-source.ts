/** Files read by position: the model's own and those its external tensors name. No handle is kept between reads. */
import { type FileHandle, open, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { EnvironmentError, FormatError } from '../../src/errors.ts';
import type { ByteSource } from './wire.ts';

// One call reads less than 2 GiB, and a long one would hold one of the few I/O threads for seconds.
const READ_BYTES = 64 * 1024 * 1024;

/** A file whose size and time of change are fixed at opening; later reads refuse a file that was replaced meanwhile. */
export class FileSource implements ByteSource {
  readonly path: string;
  readonly byteLength: number;
  readonly #changedMs: number;
  #closed = false;

  private constructor(path: string, byteLength: number, changedMs: number) {
    this.path = path;
    this.byteLength = byteLength;
    this.#changedMs = changedMs;
  }

  /** `undefined` when there is no regular file at `path`. Throws EnvironmentError FILE_UNREADABLE when the system refuses. */
  static async open(path: string): Promise<FileSource | undefined> {
    try {
      const stats = await stat(path);
      return stats.isFile() ? new FileSource(path, stats.size, stats.mtimeMs) : undefined;
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code;
      if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
      throw unreadable(path, error);
    }
  }

  /** Later reads are refused. */
  close(): void {
    this.#closed = true;
  }

  async read(start: number, end: number): Promise<Uint8Array> {
    if (this.#closed) throw new Error(`${this.path} was closed`);
    let handle: FileHandle;
    try {
      handle = await open(this.path);
    } catch (error) {
      throw unreadable(this.path, error);
    }
    try {
      const { size, mtimeMs } = await handle.stat();
      if (size !== this.byteLength || mtimeMs !== this.#changedMs) {
        throw new FormatError(
          this.path,
          'file-changed',
          `the file was changed while it was open: ${this.byteLength} bytes then, ${size} now`,
        );
      }
      const bytes = new Uint8Array(end - start);
      for (let done = 0; done < bytes.byteLength; ) {
        const { bytesRead } = await handle.read(bytes, done, Math.min(READ_BYTES, bytes.byteLength - done), start + done);
        if (bytesRead === 0)
          throw new FormatError(this.path, 'truncated', `the file ends at byte ${start + done}, wanted bytes up to ${end}`);
        done += bytesRead;
      }
      return bytes;
    } finally {
      await handle.close();
    }
  }
}

function unreadable(path: string, cause: unknown): EnvironmentError {
  return new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be read (${(cause as Error).message})`, { cause });
}

/** The files beside a model that its external tensors name, each looked up once. */
export class ExternalFiles {
  readonly #modelPath: string;
  readonly #byLocation = new Map<string, FileSource>();

  /** @param modelPath the .onnx file; locations are relative to its folder */
  constructor(modelPath: string) {
    this.#modelPath = modelPath;
  }

  /** Every file that was looked up, in the order of first use. */
  get files(): readonly FileSource[] {
    return [...this.#byLocation.values()];
  }

  /**
   * The file at a `location` of the model. The location must be a plain relative name below the model's folder. The file
   * itself may be a symbolic link (the Hugging Face cache is made of those).
   */
  async at(location: string, tensor: string): Promise<FileSource> {
    const known = this.#byLocation.get(location);
    if (known !== undefined) return known;
    const complaint = locationComplaint(location);
    if (complaint !== undefined) {
      throw new FormatError(
        this.#modelPath,
        'external-path-escapes',
        `tensor "${tensor}" is stored in ${JSON.stringify(location)}, which ${complaint}; it must be a file below the model's folder`,
      );
    }
    const source = await FileSource.open(join(dirname(this.#modelPath), location));
    if (source === undefined) {
      throw new FormatError(
        this.#modelPath,
        'external-file-missing',
        `tensor "${tensor}" is stored in ${JSON.stringify(location)}, and there is no such file`,
      );
    }
    this.#byLocation.set(location, source);
    return source;
  }
}

function locationComplaint(location: string): string | undefined {
  if (location.includes('\0')) return 'contains a NUL character';
  if (location.includes('\\')) return 'contains a backslash';
  if (location.startsWith('/') || /^[A-Za-z]:/.test(location)) return 'is an absolute path';
  if (location.split('/').includes('..')) return 'climbs out of its folder';
  return undefined;
}
