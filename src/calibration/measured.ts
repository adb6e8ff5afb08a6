/** The statistics of one block's site inputs, and the memory behind them. */
import type { Matrix } from '../compute/blas.ts';
import type { WindowBatch } from './hidden-states.ts';
import type { StateStore } from './state-store.ts';
import type { CalibrationStats } from './statistics.ts';

/** Statistics of one site input over a store of its activations, which it owns. */
export class MeasuredInput implements CalibrationStats, AsyncDisposable {
  readonly input: string;
  readonly features: number;
  readonly tokenCount: number;
  readonly hessian: Float64Array;
  readonly #store: StateStore;
  readonly #batches: readonly WindowBatch[];

  constructor(input: string, hessian: Float64Array, store: StateStore, batches: readonly WindowBatch[]) {
    this.input = input;
    this.features = store.columns;
    this.tokenCount = store.rows;
    this.hessian = hessian;
    this.#store = store;
    this.#batches = batches;
  }

  async *batches(): AsyncGenerator<Matrix> {
    for (const { rowStart, rowEnd } of this.#batches) {
      yield { rows: rowEnd - rowStart, columns: this.features, data: await this.#store.read(rowStart, rowEnd) };
    }
  }

  /** Drops the activations; the Hessian goes with the last reference to this object. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.#store[Symbol.asyncDispose]();
  }
}

/** Input name -> its statistics. Disposing drops the activations of all. */
export class MeasuredBlock extends Map<string, MeasuredInput> implements AsyncDisposable {
  constructor(inputs: Iterable<MeasuredInput>) {
    super();
    for (const stats of inputs) this.set(stats.input, stats);
  }

  /** Drops one input's statistics as soon as its last site is done. */
  async release(input: string): Promise<void> {
    await this.get(input)?.[Symbol.asyncDispose]();
    this.delete(input);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const input of [...this.keys()]) await this.release(input);
  }
}
