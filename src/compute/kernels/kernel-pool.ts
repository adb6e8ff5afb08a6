/** The kernels with their rows divided among threads. Rows never meet in a kernel, so the results are those of one thread, bit for bit. */
import { type JobRunner, startJobThread } from '../job-thread.ts';
import type { AsyncKernels, Grid, Group, Kernels } from './kernels.ts';
import { inlineKernels, wasmKernels } from './wasm-kernels.ts';

/** Kernels whose threads end with them. */
export type KernelPool = AsyncKernels & AsyncDisposable;

/** A kernel call on some rows, as it travels to a thread. */
export interface KernelJob<K extends keyof Kernels = keyof Kernels> {
  readonly kernel: K;
  readonly args: Parameters<Kernels[K]>;
}

/** What a thread answers. */
export type KernelResult<K extends keyof Kernels = keyof Kernels> = ReturnType<Kernels[K]>;

type KernelThread = JobRunner<KernelJob, KernelResult>;

/** Parts begin at whole vectors of the module. */
const LANES = 16;
/**
 * Elements of a group from which a part pays its way to a thread and back: about half a millisecond of work. On two busy cores searchScales of 768 rows ran
 * 1.8 times as fast in two parts, fitWeighted 1.4 to 1.5 times; polish gained nothing, and compensate is too short, so they stay whole.
 */
const LEAST_ELEMENTS = { searchScales: 2 ** 13, fitWeighted: 2 ** 15 } as const;

/** The kernels on up to `threads` threads, the calling one included; the others start when there is work for them. */
export function openKernels(threads: number): KernelPool {
  const pool = new RowPool(threads);
  const here = inlineKernels();
  return {
    ...here,
    async searchScales(group, bits, grid, weights) {
      if (pool.isWhole('searchScales', group)) return here.searchScales(group, bits, grid, weights);
      const scales = new Float32Array(group.rows);
      await pool.divide('searchScales', group, (part) => ({
        args: [part.group(group), bits, part.grid(grid), weights && part.take(weights)],
        place: (own) => part.put(scales, own),
      }));
      return scales;
    },
    async fitWeighted(group, bits, weights) {
      if (bits === 1 || pool.isWhole('fitWeighted', group)) return here.fitWeighted(group, bits, weights);
      const grid = { scale: new Float32Array(group.rows), shift: new Float32Array(group.rows) };
      const losses = new Float32Array(group.rows);
      await pool.divide('fitWeighted', group, (part) => ({
        args: [part.group(group), bits, weights],
        place(own) {
          part.put(grid.scale, own.grid.scale);
          part.put(grid.shift, own.grid.shift);
          part.put(losses, own.losses);
        },
      }));
      return { grid, losses };
    },
    [Symbol.asyncDispose]: () => pool[Symbol.asyncDispose](),
  };
}

type Divided = keyof typeof LEAST_ELEMENTS;
type Shape = Pick<Group, 'rows' | 'columns'>;

/** A part of a call: what goes to the kernel, and where its result goes. */
interface PartCall<K extends Divided> {
  readonly args: Parameters<Kernels[K]>;
  place(result: KernelResult<K>): void;
}

class RowPool implements AsyncDisposable {
  readonly #parts: number;
  /** One a part; the calling thread does the first part. */
  readonly #memories: SharedMemory[] = [];
  /** They do the parts after the first. */
  readonly #threads: KernelThread[] = [];
  #turn: Promise<unknown> = Promise.resolve();

  constructor(threads: number) {
    this.#parts = threads;
  }

  /** Whether a call is too small, or the threads too few, to be divided. */
  isWhole(kernel: Divided, shape: Shape): boolean {
    return this.#rowsOfPart(kernel, shape) >= shape.rows;
  }

  /** Runs a kernel on every part of the rows. The memories are one call's at a time. */
  divide<K extends Divided>(kernel: K, shape: Shape, call: (part: Part) => PartCall<K>): Promise<void> {
    const run = this.#turn.then(() => this.#run(kernel, shape.rows, this.#rowsOfPart(kernel, shape), call));
    this.#turn = run.catch(() => undefined);
    return run;
  }

  #rowsOfPart(kernel: Divided, { rows, columns }: Shape): number {
    const most = Math.max(1, Math.floor((rows * columns) / LEAST_ELEMENTS[kernel]));
    return Math.ceil(rows / Math.min(this.#parts, most) / LANES) * LANES;
  }

  async #run<K extends Divided>(kernel: K, rows: number, size: number, call: (part: Part) => PartCall<K>): Promise<void> {
    const calls: PartCall<K>[] = [];
    for (let from = 0; from < rows; from += size) {
      calls.push(call(this.#part(calls.length, rows, from, Math.min(from + size, rows))));
    }
    const [own, ...others] = calls;
    const theirs = others.map(async ({ args, place }, i) => {
      place((await this.#thread(i).run({ kernel, args } as KernelJob)) as KernelResult<K>);
    });
    // The calling thread works too; what it throws must not leave the others unheard.
    const mine = new Promise<void>((resolve) => {
      own.place(runKernel({ kernel, args: own.args }));
      resolve();
    });
    for (const end of await Promise.allSettled([mine, ...theirs])) if (end.status === 'rejected') throw end.reason;
  }

  #part(i: number, rows: number, from: number, to: number): Part {
    this.#memories[i] ??= new SharedMemory();
    return new Part(this.#memories[i].restart(), rows, from, to);
  }

  #thread(i: number): KernelThread {
    this.#threads[i] ??= startJobThread(import.meta.url, 'kernel-worker');
    return this.#threads[i];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#turn;
    for (const thread of this.#threads) await thread[Symbol.asyncDispose]();
    this.#threads.length = 0;
  }
}

/** Does a job on this thread. */
export function runKernel<K extends keyof Kernels>({ kernel, args }: KernelJob<K>): KernelResult<K> {
  const kernels = wasmKernels();
  return (kernels[kernel] as (...args: Parameters<Kernels[K]>) => KernelResult<K>).apply(kernels, args);
}

/** Rows [from, to) of everything. */
class Part {
  readonly #memory: SharedMemory;
  readonly #rows: number;
  readonly #from: number;
  readonly #to: number;

  constructor(memory: SharedMemory, rows: number, from: number, to: number) {
    this.#memory = memory;
    this.#rows = rows;
    this.#from = from;
    this.#to = to;
  }

  /** These rows of (columns, rows) values, (columns, to - from) in memory that the thread sees too. */
  take(values: Float32Array): Float32Array {
    const columns = values.length / this.#rows;
    const count = this.#to - this.#from;
    const part = this.#memory.floats(columns * count);
    for (let j = 0; j < columns; j++) {
      const start = j * this.#rows;
      part.set(values.subarray(start + this.#from, start + this.#to), j * count);
    }
    return part;
  }

  group({ columns, values }: Group): Group {
    return { columns, rows: this.#to - this.#from, values: this.take(values) };
  }

  grid({ scale, shift }: Grid): Grid {
    return { scale: this.take(scale), shift: this.take(shift) };
  }

  /** The reverse of `take`. */
  put<T extends Float32Array | Uint8Array>(whole: T, part: T): void {
    const columns = whole.length / this.#rows;
    const count = this.#to - this.#from;
    for (let j = 0; j < columns; j++) whole.set(part.subarray(j * count, (j + 1) * count), j * this.#rows + this.#from);
  }
}

/** Memory that grows to what one call takes, and is used again by the next. */
class SharedMemory {
  #buffer = new SharedArrayBuffer(0);
  #used = 0;

  restart(): this {
    this.#used = 0;
    return this;
  }

  floats(length: number): Float32Array {
    const bytes = 4 * length;
    if (this.#used + bytes > this.#buffer.byteLength) {
      // Views of this call keep what they lie in.
      this.#buffer = new SharedArrayBuffer(Math.max(2 * this.#buffer.byteLength, bytes));
      this.#used = 0;
    }
    const floats = new Float32Array(this.#buffer, this.#used, length);
    this.#used += bytes;
    return floats;
  }
}
