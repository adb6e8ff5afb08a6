/** What a merge has finished, on the disk: a line for each tensor, written only once the tensor's bytes are there. */
import { type FileHandle, open, readFile } from 'node:fs/promises';
import { errorCode } from '../../artifacts/process-lock.ts';
import type { TensorResult } from './tensor.ts';

/** Bytes and time after which finished tensors are brought to the disk: what a crash may cost. */
const SYNC_BYTES = 256 * 1024 * 1024;
const SYNC_MS = 250;

export class Journal implements AsyncDisposable {
  /** Finished tensors, of earlier runs too. */
  readonly results: Map<string, TensorResult>;
  readonly #handle: FileHandle;
  readonly #outputs: readonly FileHandle[];
  readonly #kept: () => Promise<void>;
  #waiting: TensorResult[] = [];
  #lastSync = performance.now();
  #syncing: Promise<void> | undefined;
  #failure: unknown;

  private constructor(
    results: Map<string, TensorResult>,
    handle: FileHandle,
    outputs: readonly FileHandle[],
    kept: () => Promise<void>,
  ) {
    this.results = results;
    this.#handle = handle;
    this.#outputs = outputs;
    this.#kept = kept;
  }

  /**
   * Opens `path`. @param outputs files that tensors are written to, @param fresh forget what is there,
   * @param kept called before finished tensors are put down
   */
  static async open(path: string, outputs: readonly string[], fresh: boolean, kept: () => Promise<void>): Promise<Journal> {
    const results = fresh ? new Map<string, TensorResult>() : await readJournal(path);
    const handle = await open(path, 'w');
    const files: FileHandle[] = [];
    try {
      // Written again: a torn last line would spoil the next one.
      await handle.write([...results.values()].map(lineOf).join(''));
      await handle.sync();
      for (const output of outputs) files.push(await open(output, 'r+'));
      return new Journal(results, handle, files, kept);
    } catch (error) {
      for (const file of [handle, ...files]) await file.close();
      throw error;
    }
  }

  /** Takes a finished tensor, and has it brought to the disk while others are merged. Throws what went wrong with that before. */
  add(result: TensorResult): void {
    if (this.#failure !== undefined) throw this.#failure;
    this.results.set(result.tensor, result);
    this.#waiting.push(result);
    const bytes = this.#waiting.reduce((sum, waiting) => sum + waiting.bytes, 0);
    const due = bytes >= SYNC_BYTES || performance.now() - this.#lastSync >= SYNC_MS;
    if (!due || this.#syncing) return;
    this.#syncing = this.#sync()
      .catch((error: unknown) => {
        this.#failure = error;
      })
      .finally(() => {
        this.#syncing = undefined;
      });
  }

  /** Brings everything to the disk. */
  async sync(): Promise<void> {
    await this.#syncing;
    if (this.#failure !== undefined) throw this.#failure;
    await this.#sync();
  }

  async #sync(): Promise<void> {
    const done = this.#waiting;
    if (done.length === 0) return;
    this.#waiting = [];
    for (const output of this.#outputs) await output.datasync();
    // Before the line: whoever finds a tensor in the journal can resume.
    await this.#kept();
    await this.#handle.write(done.map(lineOf).join(''));
    await this.#handle.datasync();
    this.#lastSync = performance.now();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#syncing;
    for (const file of [this.#handle, ...this.#outputs]) await file.close();
  }
}

function lineOf(result: TensorResult): string {
  return `${JSON.stringify(result)}\n`;
}

/** Finished tensors; a torn last line is no tensor. */
async function readJournal(path: string): Promise<Map<string, TensorResult>> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return new Map();
    throw error;
  }
  const results = new Map<string, TensorResult>();
  for (const line of text.split('\n').slice(0, -1)) {
    try {
      const result = JSON.parse(line) as TensorResult;
      results.set(result.tensor, result);
    } catch {
      break;
    }
  }
  return results;
}
