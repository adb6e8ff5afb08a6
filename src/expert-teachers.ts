/** What every expert makes of its own samples, computed once: the targets of a learned merge (merging.md 6.3, 6.5). */
import { BlockRunner, DEFAULT_BATCH_TOKENS } from './calibration/block-runner.ts';
import { embedTokens } from './calibration/embed.ts';
import { HiddenStates } from './calibration/hidden-states.ts';
import type { Spool, StateStore } from './calibration/state-store.ts';
import type { Blas, Matrix } from './compute/blas.ts';
import type { Engine } from './compute/engine.ts';
import type { Sample } from './expert-samples.ts';
import type { Model, WeightReader } from './model/model.ts';
import { OutputHead } from './output-head.ts';

/** Rows of logits held at once, in bytes of float32. */
const LOGITS_BYTES = 64 * 2 ** 20;

/** Where forward passes run. */
export interface Forward {
  readonly model: Model;
  readonly engine: Engine;
  readonly blas: Blas;
  readonly spool: Spool;
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  readonly signal?: AbortSignal | undefined;
}

/** Samples with what their experts make of them, all in the order of the samples. */
export interface Lesson {
  readonly sample: Sample;
  /** First of its tokens among those of all samples. */
  readonly firstToken: number;
  /** First of its counted rows among those of all samples. */
  readonly firstRow: number;
  readonly rows: number;
}

export interface Teachers extends AsyncDisposable {
  readonly lessons: readonly Lesson[];
  /** (counted rows of all samples, vocabulary). */
  readonly logits: StateStore;
  /** After the middle block, (tokens of all samples, hiddenSize). */
  readonly middle: StateStore;
  /** Of each expert: mean of |h - mean h|^2 after the middle block. */
  readonly variances: readonly number[];
}

/** The block after which hidden states are compared. */
export function middleBlock({ blocks }: Model): number {
  return Math.floor(blocks.length / 2);
}

/** How far a model is from an expert on its samples. */
export interface Distance {
  /** Mean KL(expert || model) per counted row, in nats; mean over samples. */
  readonly kl: number;
  /** Share of counted rows where both rank the same token first. */
  readonly agreement: number;
}

/** Runs every expert once over its own samples. @param weightsOf weights of an expert */
export async function teach(
  forward: Forward,
  samples: readonly Sample[],
  expertCount: number,
  weightsOf: (expert: number) => WeightReader,
  onExpert: (expert: number) => void,
): Promise<Teachers> {
  const { model, spool } = forward;
  const { vocabSize, hiddenSize } = model.shape;
  const lessons = lessonsOf(samples);
  const { rows, tokens } = extentOf(lessons);
  const logits = spool.allocate(rows, vocabSize);
  const middle = spool.allocate(tokens, hiddenSize);
  const variances: number[] = [];
  for (let expert = 0; expert < expertCount; expert++) {
    onExpert(expert);
    const own = lessons.filter(({ sample }) => sample.expert === expert);
    const weights = weightsOf(expert);
    await using pass = await forwardPass(forward, weights, own);
    let token = 0;
    const moments = new Moments(hiddenSize);
    for (const lesson of own) {
      const states = await pass.middle.read(token, token + lesson.sample.tokens.length);
      moments.add(states);
      await middle.write(lesson.firstToken, states);
      token += lesson.sample.tokens.length;
    }
    variances.push(moments.variance);
    for await (const { lesson, start, values } of pass.logits()) await logits.write(lesson.firstRow + start, values.data);
  }
  return {
    lessons,
    logits,
    middle,
    variances,
    async [Symbol.asyncDispose]() {
      await logits[Symbol.asyncDispose]();
      await middle[Symbol.asyncDispose]();
    },
  };
}

/** Distance of a model from every expert, over lessons of all of them. */
export async function distances(
  forward: Forward,
  teachers: Teachers,
  lessons: readonly Lesson[],
  expertCount: number,
  weights: WeightReader,
): Promise<Distance[]> {
  const sums = Array.from({ length: expertCount }, () => ({ kl: 0, samples: 0, agreed: 0, rows: 0 }));
  await using pass = await forwardPass(forward, weights, lessons);
  for await (const { lesson, start, values } of pass.logits()) {
    const data = await teachers.logits.read(lesson.firstRow + start, lesson.firstRow + start + values.rows);
    const target = { rows: values.rows, columns: values.columns, data };
    const sum = sums[lesson.sample.expert];
    sum.kl += ((await forward.blas.meanKl(target, values)) * values.rows) / lesson.rows;
    sum.agreed += agreements(target, values);
    sum.rows += values.rows;
    if (start === 0) sum.samples++;
  }
  return sums.map(({ kl, samples, agreed, rows }) => ({
    kl: samples === 0 ? 0 : kl / samples,
    agreement: agreed / Math.max(1, rows),
  }));
}

/** Mean over experts. */
export function meanKl(all: readonly Distance[]): number {
  return all.reduce((sum, { kl }) => sum + kl, 0) / all.length;
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

interface ForwardPass extends AsyncDisposable {
  /** Hidden states after the middle block, lesson after lesson. */
  readonly middle: StateStore;
  /** Logits of counted rows, a piece of a lesson at a time; `start` counts from the lesson's first counted row. */
  logits(): AsyncIterable<{ readonly lesson: Lesson; readonly start: number; readonly values: Matrix }>;
}

async function forwardPass(forward: Forward, weights: WeightReader, lessons: readonly Lesson[]): Promise<ForwardPass> {
  const { model, engine, blas, spool, path, signal } = forward;
  const { hiddenSize, vocabSize } = model.shape;
  const windows = lessons.map(({ sample }) => sample.tokens);
  const states = new HiddenStates(windows, hiddenSize, DEFAULT_BATCH_TOKENS, spool);
  const middle = spool.allocate(states.tokenCount, hiddenSize);
  const runner = new BlockRunner(model, engine, path);
  await embedTokens(model, weights, states, { path });
  for (const block of model.blocks) {
    signal?.throwIfAborted();
    await runner.advance(states, block, weights);
    if (block.index !== middleBlock(model)) continue;
    for (const { rowStart, rowEnd } of states.batches) await middle.write(rowStart, await states.store.read(rowStart, rowEnd));
  }
  const head = new OutputHead(model, weights, engine, blas);
  const rowsAtOnce = Math.max(1, Math.floor(LOGITS_BYTES / (4 * vocabSize)));
  return {
    middle,
    async *logits() {
      let token = 0;
      for (const lesson of lessons) {
        const { tokens, countedFrom } = lesson.sample;
        for (let start = 0; start < lesson.rows; start += rowsAtOnce) {
          signal?.throwIfAborted();
          const end = Math.min(start + rowsAtOnce, lesson.rows);
          const from = token + countedFrom;
          const data = await states.store.read(from + start, from + end);
          yield { lesson, start, values: await head.logits({ rows: end - start, columns: hiddenSize, data }) };
        }
        token += tokens.length;
      }
    },
    async [Symbol.asyncDispose]() {
      await states[Symbol.asyncDispose]();
      await middle[Symbol.asyncDispose]();
    },
  };
}

function agreements(a: Matrix, b: Matrix): number {
  let count = 0;
  for (let row = 0; row < a.rows; row++) if (argmax(a, row) === argmax(b, row)) count++;
  return count;
}

function argmax({ data, columns }: Matrix, row: number): number {
  let best = 0;
  for (let j = 1; j < columns; j++) if (data[row * columns + j] > data[row * columns + best]) best = j;
  return best;
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
