/** Text to train an adapter on: documents joined by the end-of-text token, cut into windows, the last of them held out. */
import { parseTextFile, readDocuments } from '../../calibration/text.ts';
import type { Tokenizer } from '../../calibration/tokenizer.ts';
import { evaluationWindows } from '../../calibration/windows.ts';
import { Random } from '../../compute/random.ts';
import { RecipeError } from '../../errors.ts';

export interface TrainingText {
  /** Each `sequenceLength` tokens long, but for the last. */
  readonly training: readonly Int32Array[];
  readonly heldOut: readonly Int32Array[];
}

/** Part of the windows that is held out; at least one. */
const HELD_OUT = 0.05;
const SURVEY_WINDOWS = 128;

/** Throws RecipeError for less than two windows of text. */
export async function readTrainingText(
  tokenizer: Tokenizer,
  files: readonly string[],
  sequenceLength: number,
  endOfText: number | undefined,
): Promise<TrainingText> {
  const tokens: number[] = [];
  for await (const document of readDocuments(files.map(parseTextFile))) {
    if (tokens.length > 0 && endOfText !== undefined) tokens.push(endOfText);
    for (const token of tokenizer.encode(document)) tokens.push(token);
  }
  if (tokens.length < 4) throw new RecipeError(`--text ${files.join(' ')}: ${tokens.length} tokens in it; at least 4 are needed`);
  const length = Math.min(sequenceLength, Math.ceil(tokens.length / 2));
  const { windows } = evaluationWindows(Int32Array.from(tokens), length);
  const spare = Math.max(1, Math.floor(HELD_OUT * windows.length));
  if (windows.length - spare < 1)
    throw new RecipeError(`--text ${files.join(' ')}: one window of ${length} tokens; two are needed`);
  return { training: windows.slice(0, windows.length - spare), heldOut: windows.slice(windows.length - spare) };
}

/** The token that stands between documents, by a model's config.json. */
export function endOfText({ eos_token_id: id }: Readonly<Record<string, unknown>>): number | undefined {
  const first: unknown = Array.isArray(id) ? id[0] : id;
  return typeof first === 'number' ? first : undefined;
}

/** Windows that are enough to measure what enters a layer, evenly over the text. */
export function surveyWindows(training: readonly Int32Array[]): readonly Int32Array[] {
  const count = Math.min(training.length, SURVEY_WINDOWS);
  return Array.from({ length: count }, (_, i) => training[Math.floor((i * training.length) / count)]);
}

/** The windows of step `t`, counted from 1: all are seen once, in an order of its own, before any is seen again. */
export function batchOf(windows: readonly Int32Array[], t: number, batch: number, seed: number): Int32Array[] {
  const orders = new Map<number, Uint32Array>();
  const orderOf = (epoch: number): Uint32Array => {
    const known = orders.get(epoch);
    if (known) return known;
    const order = Uint32Array.from(windows.keys());
    const random = new Random(seed, `training order ${epoch}`);
    for (let i = order.length - 1; i > 0; i--) {
      const j = random.nextBelow(i + 1);
      [order[i], order[j]] = [order[j], order[i]];
    }
    orders.set(epoch, order);
    return order;
  };
  return Array.from({ length: batch }, (_, i) => {
    const at = (t - 1) * batch + i;
    return windows[orderOf(Math.floor(at / windows.length))[at % windows.length]];
  });
}
