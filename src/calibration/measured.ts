/** The statistics of one block's site inputs, and the memory behind them. */
import type { Matrix } from '../compute/blas.ts';
import type { DriftMeter } from './drift-meter.ts';
import type { WindowBatch } from './hidden-states.ts';
import type { StateStore } from './state-store.ts';
import type { CalibrationStats, Drift } from './statistics.ts';

/** What a measured input keeps beside its Hessian, and owns. */
export interface MeasuredKeep {
  /** Its activations, when they are to be replayed. */
  readonly store?: StateStore | undefined;
  readonly drift?: DriftMeter | undefined;
}

/** Statistics of one site input. */
export class MeasuredInput implements CalibrationStats, AsyncDisposable {
  readonly input: string;
  readonly features: number;
  readonly tokenCount: number;
  readonly hessian: Float64Array;
  readonly drift?: Drift;
  readonly #keep: MeasuredKeep;
  readonly #batches: readonly WindowBatch[];

  constructor(
    { input, features, tokenCount }: Pick<CalibrationStats, 'input' | 'features' | 'tokenCount'>,
    hessian: Float64Array,
    keep: MeasuredKeep,
    batches: readonly WindowBatch[],
  ) {
    this.input = input;
    this.features = features;
    this.tokenCount = tokenCount;
    this.hessian = hessian;
    this.#keep = keep;
    this.#batches = batches;
    const longest = batches.reduce((most, { rowStart, rowEnd }) => Math.max(most, rowEnd - rowStart), 1);
    if (keep.drift) this.drift = keep.drift.finish(longest);
  }

  async *batches(): AsyncGenerator<Matrix> {
    const { store } = this.#keep;
    if (store === undefined) throw new Error(`the activations of ${this.input} were not kept: measure with replay`);
    for (const { rowStart, rowEnd } of this.#batches) {
      yield { rows: rowEnd - rowStart, columns: this.features, data: await store.read(rowStart, rowEnd) };
    }
  }

  /** Drops the activations; the Hessian goes with the last reference to this object. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#keep.store?.[Symbol.asyncDispose]();
    await this.#keep.drift?.[Symbol.asyncDispose]();
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
