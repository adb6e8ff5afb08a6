/** From hidden states after the last block to logits: final norm, then the output head in pieces that fit in memory. */
import type { Blas, Matrix } from '../../compute/blas.ts';
import type { Engine, NdArray } from '../../compute/engine.ts';
import type { Model, WeightReader } from '../../model/model.ts';

/** A head up to this size (float32 bytes) is read once and kept; a larger one is streamed for every call. */
const RESIDENT_BYTES = 512 * 2 ** 20;
/** Rows of a streamed head held at once, in bytes of float32. */
const CHUNK_BYTES = 64 * 2 ** 20;

export class OutputHead {
  readonly #model: Model;
  readonly #weights: WeightReader;
  readonly #engine: Engine;
  readonly #blas: Blas;
  readonly #residentBytes: number;
  #resident: Float32Array | undefined;
  #norm: Readonly<Record<string, NdArray>> | undefined;

  /** @param residentBytes largest head that is kept in memory */
  constructor(model: Model, weights: WeightReader, engine: Engine, blas: Blas, residentBytes = RESIDENT_BYTES) {
    this.#model = model;
    this.#weights = weights;
    this.#engine = engine;
    this.#blas = blas;
    this.#residentBytes = Math.min(residentBytes, RESIDENT_BYTES);
  }

  /** `hidden` (rows, hiddenSize) before the final norm -> logits (rows, vocabSize). */
  async logits(hidden: Matrix): Promise<Matrix> {
    const { vocabSize, hiddenSize } = this.#model.shape;
    const normed = await this.#normalize(hidden);
    if (vocabSize * hiddenSize * 4 <= this.#residentBytes) {
      this.#resident ??= await this.#weights.load(this.#model.outputHead);
      return this.#blas.gemm(normed, { rows: vocabSize, columns: hiddenSize, data: this.#resident }, { transposeB: true });
    }
    const logits = new Float32Array(hidden.rows * vocabSize);
    const step = Math.floor(CHUNK_BYTES / (hiddenSize * 4));
    for (let start = 0; start < vocabSize; start += step) {
      const end = Math.min(start + step, vocabSize);
      const data = await this.#weights.loadRows(this.#model.outputHead, start, end);
      const part = await this.#blas.gemm(normed, { rows: end - start, columns: hiddenSize, data }, { transposeB: true });
      for (let row = 0; row < hidden.rows; row++) {
        logits.set(part.data.subarray(row * part.columns, (row + 1) * part.columns), row * vocabSize + start);
      }
    }
    return { rows: hidden.rows, columns: vocabSize, data: logits };
  }

  async #normalize(hidden: Matrix): Promise<Matrix> {
    const graph = this.#model.finalNormGraph();
    const program = await this.#engine.compile(graph.model, { key: graph.key });
    if (this.#norm === undefined) {
      const norm: Record<string, NdArray> = {};
      for (const [input, name] of graph.weights) {
        const data = await this.#weights.load(name);
        norm[input] = { dtype: 'F32', shape: [data.length], data };
      }
      this.#norm = norm;
    }
    const feeds = { ...this.#norm, hidden: { dtype: 'F32', shape: [hidden.rows, hidden.columns], data: hidden.data } as const };
    const { hidden_out } = await program.run(feeds);
    return { rows: hidden.rows, columns: hidden.columns, data: hidden_out.data as Float32Array };
  }
}
