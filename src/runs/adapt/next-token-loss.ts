/** Negative log-likelihood of next tokens at the output head, and what it does to the hidden states after the last block. */
import type { StateStore } from '../../calibration/state-store.ts';
import type { Engine, NdArray, Program } from '../../compute/engine.ts';
import type { Model, WeightReader } from '../../model/model.ts';
import { openHeadProgram } from '../head-program.ts';

/** Rows of logits at once, in bytes of float32. */
const LOGITS_BYTES = 16 * 2 ** 20;

export class NextTokenLoss {
  readonly #program: Program;
  readonly #rows: number;
  readonly #hiddenSize: number;
  readonly #fixed: Readonly<Record<string, NdArray>>;

  private constructor(program: Program, rows: number, { hiddenSize }: Model['shape'], fixed: Readonly<Record<string, NdArray>>) {
    this.#program = program;
    this.#rows = rows;
    this.#hiddenSize = hiddenSize;
    this.#fixed = fixed;
  }

  /** For weights that do not change. */
  static async open(model: Model, engine: Engine, weights: WeightReader): Promise<NextTokenLoss> {
    const rows = Math.max(1, Math.min(256, Math.floor(LOGITS_BYTES / (4 * model.shape.vocabSize))));
    const { program, fixed } = await openHeadProgram(model, engine, weights, rows, { kind: 'label' });
    return new NextTokenLoss(program, rows, model.shape, fixed);
  }

  /** Mean loss of predicting every window's tokens from those before them; `hidden` holds the windows one after the other. */
  async score(hidden: StateStore, windows: readonly Int32Array[], cotangent?: StateStore): Promise<number> {
    const predicted = windows.reduce((sum, { length }) => sum + length - 1, 0);
    let loss = 0;
    let first = 0;
    for (const window of windows) {
      loss += await this.add(hidden, first, window.subarray(1), 1 / predicted, cotangent);
      first += window.length;
    }
    return loss;
  }

  /**
   * Loss of rows `[first, first + labels.length)` of `hidden`, row i having to say `labels[i]`: the sum times `weight`. Their cotangents go to the
   * same rows of `cotangent`.
   */
  async add(hidden: StateStore, first: number, labels: Int32Array, weight: number, cotangent?: StateStore): Promise<number> {
    let loss = 0;
    for (let start = 0; start < labels.length; start += this.#rows) {
      const count = Math.min(this.#rows, labels.length - start);
      const states = new Float32Array(this.#rows * this.#hiddenSize);
      states.set(await hidden.read(first + start, first + start + count));
      const label = new Float32Array(this.#rows);
      label.set(labels.subarray(start, start + count));
      const made = await this.#program.run(
        {
          ...this.#fixed,
          hidden: { dtype: 'F32', shape: [this.#rows, this.#hiddenSize], data: states },
          label: { dtype: 'F32', shape: [this.#rows, 1], data: label },
          weight: { dtype: 'F32', shape: [this.#rows, 1], data: new Float32Array(this.#rows).fill(weight, 0, count) },
        },
        { outputs: cotangent ? ['loss', 'hidden_cotangent'] : ['loss'] },
      );
      loss += made['loss'].data[0] as number;
      if (cotangent) {
        const own = (made['hidden_cotangent'].data as Float32Array).subarray(0, count * this.#hiddenSize);
        await cotangent.write(first + start, own);
      }
    }
    return loss;
  }
}
