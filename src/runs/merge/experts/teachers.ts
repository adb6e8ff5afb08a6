/** What every expert makes of its own samples, computed once: the targets of a learned merge (merging.md 6.3, 6.5). */
import { createHash } from 'node:crypto';
import type { StateStore } from '../../../calibration/state-store.ts';
import type { Matrix } from '../../../compute/blas.ts';
import type { Model, WeightReader } from '../../../model/model.ts';
import { OutputHead } from '../../evaluate/output-head.ts';
import type { Forward } from '../../forward.ts';
import { forwardPass, type Lesson, LOGITS_BYTES } from './forward-pass.ts';
import type { Sample } from './samples.ts';

/**
 * What experts said, kept as the hidden states they said it from: their own norm and head make the logits again, exactly, whenever they are
 * compared with. That is `4 hiddenSize` bytes for a row, not `4 vocabSize`.
 */
export interface Teachers extends AsyncDisposable {
  readonly lessons: readonly Lesson[];
  /** Logits (end - start, vocabSize) of counted rows of a lesson, by the expert whose sample it is. */
  logits(lesson: Lesson, start: number, end: number): Promise<Matrix>;
  /** After the middle block, where that is compared. */
  readonly middle?: MiddleStates;
}

export interface MiddleStates {
  /** (tokens of all samples, hiddenSize) */
  readonly states: StateStore;
  /** Of each expert: mean of |h - mean h|^2. */
  readonly variances: readonly number[];
}

export interface TeachOptions {
  readonly samples: readonly Sample[];
  readonly expertCount: number;
  /** Weights of an expert. */
  readonly weightsOf: (expert: number) => WeightReader;
  /** Keep the states after the middle block. */
  readonly middle: boolean;
  readonly onExpert?: (expert: number) => void;
}

/** Runs every expert once over its own samples. */
export async function teach(
  forward: Forward,
  { samples, expertCount, weightsOf, middle: keepsMiddle, onExpert }: TeachOptions,
): Promise<Teachers> {
  const { model, spool } = forward;
  const { hiddenSize } = model.shape;
  const lessons = lessonsOf(samples);
  const { rows, tokens } = extentOf(lessons);
  const last = spool.allocate(rows, hiddenSize);
  const middle = keepsMiddle ? spool.allocate(tokens, hiddenSize) : undefined;
  const variances: number[] = [];
  for (let expert = 0; expert < expertCount; expert++) {
    onExpert?.(expert);
    const own = lessons.filter(({ sample }) => sample.expert === expert);
    await using pass = await forwardPass(forward, weightsOf(expert), own, keepsMiddle);
    let token = 0;
    const moments = new Moments(hiddenSize);
    for (const lesson of own) {
      const { tokens: ids, countedFrom } = lesson.sample;
      if (middle && pass.middle) {
        const states = await pass.middle.read(token, token + ids.length);
        moments.add(states);
        await middle.write(lesson.firstToken, states);
      }
      await last.write(lesson.firstRow, await pass.last.read(token + countedFrom, token + ids.length));
      token += ids.length;
    }
    variances.push(moments.variance);
  }
  const heads = await expertHeads(forward, expertCount, weightsOf);
  return {
    lessons,
    async logits({ sample, firstRow }, start, end) {
      const data = await last.read(firstRow + start, firstRow + end);
      return heads[sample.expert].logits({ rows: end - start, columns: hiddenSize, data });
    },
    ...(middle ? { middle: { states: middle, variances } } : {}),
    async [Symbol.asyncDispose]() {
      await last[Symbol.asyncDispose]();
      await middle?.[Symbol.asyncDispose]();
    },
  };
}

/** Most bytes of all experts' heads in memory; larger ones are read again for every piece of logits. */
const HEADS_BYTES = 1024 * 2 ** 20;

/** Norm and head of every expert; experts that did not change them share one. */
async function expertHeads(
  { model, engine, blas }: Forward,
  expertCount: number,
  weightsOf: (expert: number) => WeightReader,
): Promise<OutputHead[]> {
  const shared = new Map<string, OutputHead>();
  const heads: OutputHead[] = [];
  for (let expert = 0; expert < expertCount; expert++) {
    const weights = weightsOf(expert);
    const print = await headFingerprint(model, weights);
    const head = shared.get(print) ?? new OutputHead(model, weights, engine, blas, HEADS_BYTES / expertCount);
    shared.set(print, head);
    heads.push(head);
  }
  return heads;
}

/** A digest of all weights after the last block, read a piece at a time. */
async function headFingerprint(model: Model, weights: WeightReader): Promise<string> {
  const hash = createHash('sha256');
  const add = (values: Float32Array) => hash.update(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  for (const name of model.finalNormGraph().weights.values()) add(await weights.load(name));
  const { vocabSize, hiddenSize } = model.shape;
  const step = Math.max(1, Math.floor(LOGITS_BYTES / (4 * hiddenSize)));
  for (let start = 0; start < vocabSize; start += step)
    add(await weights.loadRows(model.outputHead, start, Math.min(vocabSize, start + step)));
  return hash.digest('hex');
}

function lessonsOf(samples: readonly Sample[]): Lesson[] {
  let [firstToken, firstRow] = [0, 0];
  return samples.map((sample) => {
    const lesson = { sample, firstToken, firstRow, rows: sample.tokens.length - sample.countedFrom };
    firstToken += sample.tokens.length;
    firstRow += lesson.rows;
    return lesson;
  });
}

function extentOf(lessons: readonly Lesson[]): { rows: number; tokens: number } {
  const last = lessons.at(-1);
  return last ? { rows: last.firstRow + last.rows, tokens: last.firstToken + last.sample.tokens.length } : { rows: 0, tokens: 0 };
}

/** Mean square distance from the mean, over rows that come piece by piece. */
class Moments {
  readonly #sums: Float64Array;
  #squares = 0;
  #rows = 0;

  constructor(columns: number) {
    this.#sums = new Float64Array(columns);
  }

  add(rows: Float32Array): void {
    const n = this.#sums.length;
    for (let i = 0; i < rows.length; i++) {
      this.#sums[i % n] += rows[i];
      this.#squares += rows[i] * rows[i];
    }
    this.#rows += rows.length / n;
  }

  get variance(): number {
    const rows = Math.max(1, this.#rows);
    return this.#squares / rows - this.#sums.reduce((sum, value) => sum + (value / rows) ** 2, 0);
  }
}
