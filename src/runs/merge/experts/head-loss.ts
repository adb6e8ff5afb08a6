/** The loss at the output head, a piece of a lesson at a time. */
import type { StateStore } from '../../../calibration/state-store.ts';
import type { NdArray, Program } from '../../../compute/engine.ts';
import type { HeadObjective, WeightReader } from '../../../model/model.ts';
import type { Forward } from '../../forward.ts';
import { openHeadProgram } from '../../head-program.ts';
import type { Lesson } from './forward-pass.ts';
import type { Teachers } from './teachers.ts';

/** Rows of logits that a piece of the head takes at once. */
const HEAD_ROWS = 128;

export class HeadLoss {
  readonly #program: Program;
  readonly #hiddenSize: number;
  /** Whether the loss compares with what the expert says. */
  readonly #compares: boolean;
  readonly #fixed: Readonly<Record<string, NdArray>>;

  private constructor(program: Program, hiddenSize: number, compares: boolean, fixed: Readonly<Record<string, NdArray>>) {
    this.#program = program;
    this.#hiddenSize = hiddenSize;
    this.#compares = compares;
    this.#fixed = fixed;
  }

  /** Norm and head are not learned, so they are read once. */
  static async open({ model, engine }: Forward, weights: WeightReader, objective: HeadObjective): Promise<HeadLoss> {
    const { program, fixed } = await openHeadProgram(model, engine, weights, HEAD_ROWS, objective);
    return new HeadLoss(program, model.shape.hiddenSize, objective.kind === 'divergence', fixed);
  }

  /** Adds the cotangents of a lesson's states; returns its part of the loss, the mean over `count` lessons. */
  async add(
    lesson: Lesson,
    first: number,
    hidden: StateStore,
    teachers: Teachers,
    cotangent: StateStore,
    count: number,
  ): Promise<number> {
    let loss = 0;
    const from = first + lesson.sample.countedFrom;
    for (let start = 0; start < lesson.rows; start += HEAD_ROWS) {
      const end = Math.min(start + HEAD_ROWS, lesson.rows);
      const padded = (rows: Float32Array, columns: number): NdArray => {
        const data = new Float32Array(HEAD_ROWS * columns);
        data.set(rows);
        return { dtype: 'F32', shape: [HEAD_ROWS, columns], data };
      };
      const weight = new Float32Array(end - start).fill(1 / (lesson.rows * count));
      const said = this.#compares ? await teachers.logits(lesson, start, end) : undefined;
      const made = await this.#program.run({
        ...this.#fixed,
        hidden: padded(await hidden.read(from + start, from + end), this.#hiddenSize),
        ...(said ? { teacher: padded(said.data, said.columns) } : {}),
        weight: padded(weight, 1),
      });
      loss += made['loss'].data[0] as number;
      const own = (made['hidden_cotangent'].data as Float32Array).subarray(0, (end - start) * this.#hiddenSize);
      await cotangent.write(from + start, own);
    }
    return loss;
  }
}
