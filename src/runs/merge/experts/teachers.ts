/** What every expert makes of its own samples, computed once: the targets of a learned merge (merging.md 6.3, 6.5). */
import { createHash } from 'node:crypto';
import { BlockRunner, DEFAULT_BATCH_TOKENS } from '../../../calibration/block-runner.ts';
import { embedTokens } from '../../../calibration/embed.ts';
import { HiddenStates } from '../../../calibration/hidden-states.ts';
import type { Spool, StateStore } from '../../../calibration/state-store.ts';
import type { Blas, Matrix } from '../../../compute/blas.ts';
import type { Engine } from '../../../compute/engine.ts';
import type { Model, WeightReader } from '../../../model/model.ts';
import { OutputHead } from '../../evaluate/output-head.ts';
import { Scorer } from '../../evaluate/scoring.ts';
import type { Sample } from './samples.ts';

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

/** A distance, and how well the samples themselves are predicted. */
export interface ScoredDistance extends Distance {
  /** Of counted rows that a token follows, of the model. */
  readonly perplexity: number;
  /** The same of the expert. */
  readonly expertPerplexity: number;
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

/** What is summed up of one expert's samples. */
interface Tally {
  kl: number;
  samples: number;
  agreed: number;
  rows: number;
}

/** Logits of the expert and of the model for counted rows of a lesson, the first of them row `start`. */
type OnRows = (lesson: Lesson, start: number, target: Matrix, own: Matrix) => void;

/** Distance of a model from every expert, over lessons of all of them. */
export async function distances(
  forward: Forward,
  teachers: Teachers,
  lessons: readonly Lesson[],
  expertCount: number,
  weights: WeightReader,
  onRows?: OnRows,
): Promise<Distance[]> {
  const sums = Array.from({ length: expertCount }, (): Tally => ({ kl: 0, samples: 0, agreed: 0, rows: 0 }));
  await using pass = await forwardPass(forward, weights, lessons);
  for await (const { lesson, start, values } of pass.logits()) {
    const target = await teachers.logits(lesson, start, start + values.rows);
    const sum = sums[lesson.sample.expert];
    sum.kl += ((await forward.blas.meanKl(target, values)) * values.rows) / lesson.rows;
    sum.agreed += agreements(target, values);
    sum.rows += values.rows;
    if (start === 0) sum.samples++;
    onRows?.(lesson, start, target, values);
  }
  return sums.map(({ kl, samples, agreed, rows }) => ({
    kl: samples === 0 ? 0 : kl / samples,
    agreement: agreed / Math.max(1, rows),
  }));
}

/** The same with perplexities, which take as long again where the vocabulary is large. */
export async function scoredDistances(...given: Parameters<typeof distances>): Promise<ScoredDistance[]> {
  const [, , , expertCount] = given;
  const scores = Array.from({ length: expertCount }, () => ({ own: new Scorer(), expert: new Scorer() }));
  const measured = await distances(given[0], given[1], given[2], expertCount, given[4], ({ sample }, start, target, own) => {
    const next = sample.countedFrom + start + 1;
    const tokens = sample.tokens.subarray(next, next + own.rows);
    const score = scores[sample.expert];
    score.own.add(own.data, tokens, own.columns);
    score.expert.add(target.data, tokens, target.columns);
  });
  return measured.map((distance, k) => ({
    ...distance,
    perplexity: scores[k].own.score.perplexity,
    expertPerplexity: scores[k].expert.score.perplexity,
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
  /** Hidden states after the last block, lesson after lesson. */
  readonly last: StateStore;
  /** After the middle block, where that was asked for. */
  readonly middle?: StateStore;
  /** Logits of counted rows, a piece of a lesson at a time; `start` counts from the lesson's first counted row. */
  logits(): AsyncIterable<{ readonly lesson: Lesson; readonly start: number; readonly values: Matrix }>;
}

async function forwardPass(
  forward: Forward,
  weights: WeightReader,
  lessons: readonly Lesson[],
  keepsMiddle = false,
): Promise<ForwardPass> {
  const { model, engine, blas, spool, path, signal } = forward;
  const { hiddenSize, vocabSize } = model.shape;
  const windows = lessons.map(({ sample }) => sample.tokens);
  const states = new HiddenStates(windows, hiddenSize, DEFAULT_BATCH_TOKENS, spool);
  const middle = keepsMiddle ? spool.allocate(states.tokenCount, hiddenSize) : undefined;
  const runner = new BlockRunner(model, engine, path);
  await embedTokens(model, weights, states, { path });
  for (const block of model.blocks) {
    signal?.throwIfAborted();
    await runner.advance(states, block, weights);
    if (middle === undefined || block.index !== middleBlock(model)) continue;
    for (const { rowStart, rowEnd } of states.batches) await middle.write(rowStart, await states.store.read(rowStart, rowEnd));
  }
  const head = new OutputHead(model, weights, engine, blas);
  const rowsAtOnce = Math.max(1, Math.floor(LOGITS_BYTES / (4 * vocabSize)));
  return {
    last: states.store,
    ...(middle ? { middle } : {}),
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
      await middle?.[Symbol.asyncDispose]();
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
