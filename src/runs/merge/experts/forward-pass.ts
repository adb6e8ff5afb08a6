/** A model over lessons, a block at a time: hidden states of all tokens, and logits where they count. */
import { BlockRunner, DEFAULT_BATCH_TOKENS } from '../../../calibration/block-runner.ts';
import { embedTokens } from '../../../calibration/embed.ts';
import { HiddenStates } from '../../../calibration/hidden-states.ts';
import type { StateStore } from '../../../calibration/state-store.ts';
import type { Matrix } from '../../../compute/blas.ts';
import type { Model, WeightReader } from '../../../model/model.ts';
import { OutputHead } from '../../evaluate/output-head.ts';
import type { Forward } from '../../forward.ts';
import type { Sample } from './samples.ts';

/** Rows of logits held at once, in bytes of float32. */
export const LOGITS_BYTES = 64 * 2 ** 20;

/** Samples with what their experts make of them, all in the order of the samples. */
export interface Lesson {
  readonly sample: Sample;
  /** First of its tokens among those of all samples. */
  readonly firstToken: number;
  /** First of its counted rows among those of all samples. */
  readonly firstRow: number;
  readonly rows: number;
}

/** The block after which hidden states are compared. */
export function middleBlock({ blocks }: Model): number {
  return Math.floor(blocks.length / 2);
}

interface ForwardPass extends AsyncDisposable {
  /** Hidden states after the last block, lesson after lesson. */
  readonly last: StateStore;
  /** After the middle block, where that was asked for. */
  readonly middle?: StateStore;
  /** Logits of counted rows, a piece of a lesson at a time; `start` counts from the lesson's first counted row. */
  logits(): AsyncIterable<{ readonly lesson: Lesson; readonly start: number; readonly values: Matrix }>;
}

/** @param keepsMiddle states after the middle block, too */
export async function forwardPass(
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
