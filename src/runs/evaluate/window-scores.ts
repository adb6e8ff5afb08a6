/** Windows of text scored by whatever yields their logits. */
import type { Blas } from '../../compute/blas.ts';
import type { Engine } from '../../compute/engine.ts';
import type { Model, WeightReader } from '../../model/model.ts';
import type { RunHooks } from '../run.ts';
import { BlockLogits, type LogitsSource } from './logits-source.ts';
import { type Score, Scorer } from './scoring.ts';

/** Most logits held at once, in bytes of float32. */
const LOGITS_BYTES = 256 * 2 ** 20;

/** Scores every token of `windows` but each one's first; with `reference`, also against its logits of the same windows. */
export async function scoreWindows(
  own: LogitsSource,
  windows: readonly Int32Array[],
  model: Model,
  hooks: RunHooks,
  reference?: LogitsSource,
): Promise<Scorer> {
  const rowsAtOnce = Math.max(1, Math.floor(LOGITS_BYTES / (model.shape.vocabSize * Float32Array.BYTES_PER_ELEMENT)));
  const scorer = new Scorer();
  const references = reference?.rows(rowsAtOnce)[Symbol.asyncIterator]();
  for await (const { windowIndex, start, logits } of own.rows(rowsAtOnce)) {
    hooks.signal?.throwIfAborted();
    // Row r predicts token r + 1; a window's last row predicts nothing that is there.
    const targets = windows[windowIndex].subarray(start + 1, start + 1 + logits.rows);
    const other = references && (await references.next()).value?.logits.data;
    scorer.add(logits.data, targets, logits.columns, other);
  }
  return scorer;
}

/** What a model is, and what it is run on. */
export interface Scored {
  readonly model: Model;
  readonly weights: WeightReader;
  /** As the user named it; used in messages. */
  readonly path: string;
}

export interface ScoringMachine {
  readonly engine: Engine;
  readonly blas: Blas;
  readonly windows: readonly Int32Array[];
  /** Bytes of hidden states kept in RAM. */
  readonly ramBytes: number;
  readonly hooks: RunHooks;
}

/** Runs the model over the windows, block by block in float arithmetic, and scores it. */
export async function scoreModel({ model, weights, path }: Scored, machine: ScoringMachine): Promise<Score> {
  await using logits = await BlockLogits.run({ ...machine, model, weights, path });
  return (await scoreWindows(logits, machine.windows, model, machine.hooks)).score;
}
