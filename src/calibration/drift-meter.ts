/** Follows one site input in two models at once: the float one, and the one whose earlier layers are quantized. */
import type { Blas, Matrix } from '../compute/blas.ts';
import type { Spool, StateStore } from './state-store.ts';
import type { Drift } from './statistics.ts';

/** One token in so many is held out. */
const HELD_OUT = 8;

export class DriftMeter implements AsyncDisposable {
  readonly #blas: Blas;
  readonly #features: number;
  /** First held-out row. */
  readonly #heldOutStart: number;
  readonly #cross: Float32Array;
  readonly #sums: { readonly actual: Float64Array; readonly float: Float64Array } | undefined;
  readonly #actual: StateStore;
  readonly #difference: StateStore;
  #rows = 0;

  /** @param tokenCount rows that `add` will get in all @param means whether means are wanted */
  constructor(blas: Blas, features: number, tokenCount: number, spool: Spool, means: boolean) {
    const heldOut = Math.ceil(tokenCount / HELD_OUT);
    this.#blas = blas;
    this.#features = features;
    this.#heldOutStart = tokenCount - heldOut;
    this.#cross = new Float32Array(features * features);
    this.#sums = means ? { actual: new Float64Array(features), float: new Float64Array(features) } : undefined;
    this.#actual = spool.allocate(heldOut, features);
    this.#difference = spool.allocate(heldOut, features);
  }

  /** The same tokens in both models, (tokens, features); `float` is overwritten. */
  async add(actual: Float32Array, float: Float32Array): Promise<void> {
    const n = this.#features;
    const rows = actual.length / n;
    if (this.#sums) {
      addRows(this.#sums.actual, actual);
      addRows(this.#sums.float, float);
    }
    for (let i = 0; i < float.length; i++) float[i] -= actual[i];
    const measured = Math.max(0, Math.min(rows, this.#heldOutStart - this.#rows));
    this.#rows += rows;
    if (measured < rows) {
      await this.#actual.append(actual.subarray(measured * n));
      await this.#difference.append(float.subarray(measured * n));
    }
    if (measured === 0) return;
    const matrix = (data: Float32Array): Matrix => ({ rows: measured, columns: n, data: data.subarray(0, measured * n) });
    const out = { rows: n, columns: n, data: this.#cross };
    await this.#blas.gemm(matrix(float), matrix(actual), { transposeA: true, beta: 1, out });
  }

  finish(batchRows: number): Drift {
    const count = Math.max(1, this.#heldOutStart);
    for (let i = 0; i < this.#cross.length; i++) this.#cross[i] /= count;
    const [actual, difference] = [this.#actual, this.#difference];
    const columns = this.#features;
    const mean = (sum: Float64Array) => sum.map((value) => value / Math.max(1, this.#rows));
    return {
      cross: this.#cross,
      ...(this.#sums && { means: { actual: mean(this.#sums.actual), float: mean(this.#sums.float) } }),
      async *heldOut() {
        for (let start = 0; start < actual.rows; start += batchRows) {
          const end = Math.min(start + batchRows, actual.rows);
          const matrix = (data: Float32Array): Matrix => ({ rows: end - start, columns, data });
          yield { actual: matrix(await actual.read(start, end)), difference: matrix(await difference.read(start, end)) };
        }
      },
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#actual[Symbol.asyncDispose]();
    await this.#difference[Symbol.asyncDispose]();
  }
}

function addRows(sum: Float64Array, rows: Float32Array): void {
  const n = sum.length;
  for (let at = 0; at < rows.length; at += n) {
    for (let j = 0; j < n; j++) sum[j] += rows[at + j];
  }
}
