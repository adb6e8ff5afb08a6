/** Text as tokens, cut into the windows that calibration and evaluation run over. */
import { Random } from '../compute/random.ts';
import { RecipeError } from '../errors.ts';

export interface CalibrationWindows {
  /** Token ids of each window, none empty. */
  readonly windows: readonly Int32Array[];
  /** What a reader of the report should know about the cut. */
  readonly notes: readonly string[];
}

/**
 * `samples` random crops of `sequenceLength` consecutive tokens; every start is equally likely, so crops may overlap, and do
 * when the text is short (a note says so). A text shorter than one window gives one short window. A crop is a plain piece of the
 * token stream, as in the paper: only one that starts at the beginning of the text has the beginning-of-sequence token.
 */
export function calibrationWindows(
  tokens: Int32Array,
  options: { readonly samples: number; readonly sequenceLength: number; readonly seed: number },
): CalibrationWindows {
  const { samples, sequenceLength } = options;
  if (!Number.isInteger(samples) || samples < 1)
    throw new RecipeError(`--samples ${samples}: a whole number of at least 1 is needed`);
  assertSequenceLength(sequenceLength, 1);
  if (tokens.length === 0) throw new RecipeError('the calibration text gives no tokens');
  if (tokens.length <= sequenceLength) {
    const notes =
      tokens.length < sequenceLength || samples > 1
        ? [
            `the calibration text has ${tokens.length} tokens: one window of ${tokens.length} is used, not ${samples} of ${sequenceLength}`,
          ]
        : [];
    return { windows: [tokens.slice()], notes };
  }
  const starts = tokens.length - sequenceLength + 1;
  const random = new Random(options.seed, 'calibration windows');
  const windows = Array.from({ length: samples }, () => {
    const start = random.nextBelow(starts);
    return tokens.slice(start, start + sequenceLength);
  });
  const wanted = samples * sequenceLength;
  const notes =
    wanted > tokens.length
      ? [
          `the calibration text has ${tokens.length} tokens, ${samples} x ${sequenceLength} = ${wanted} are drawn from it: windows overlap`,
        ]
      : [];
  return { windows, notes };
}

/** Part of the text, and of the windows, that is held out. */
const HELD_OUT = 1 / 8;
/** Fewer held-out tokens say nothing. */
const LEAST_HELD_OUT = 8;

/**
 * Sets windows aside that calibration does not see: an eighth of `samples`, at most an eighth of the text, at even distances over it so that
 * every file of a mixed text has its share. `rest` is the text without them. Throws RecipeError for a text that is too short.
 */
export function holdOut(
  tokens: Int32Array,
  { samples, sequenceLength }: { readonly samples: number; readonly sequenceLength: number },
): { readonly rest: Int32Array; readonly heldOut: readonly Int32Array[] } {
  const room = Math.floor(tokens.length * HELD_OUT);
  if (room < LEAST_HELD_OUT) {
    throw new RecipeError(
      `--max-loss: the calibration text has ${tokens.length} tokens; at least ${LEAST_HELD_OUT / HELD_OUT} are needed to hold some out`,
    );
  }
  const count = Math.max(1, Math.min(Math.ceil(samples * HELD_OUT), Math.floor(room / sequenceLength)));
  const length = Math.min(sequenceLength, room);
  const rest = new Int32Array(tokens.length - count * length);
  const heldOut: Int32Array[] = [];
  for (let i = 0, from = 0; i <= count; i++) {
    // Each stretch of the text ends with its window; what follows the last is rounding.
    const start = i === count ? tokens.length : Math.floor(((i + 1) * tokens.length) / count) - length;
    rest.set(tokens.subarray(from, start), from - i * length);
    if (i < count) heldOut.push(tokens.slice(start, start + length));
    from = start + length;
  }
  return { rest, heldOut };
}

export interface EvaluationWindows {
  readonly windows: readonly Int32Array[];
  /** Tokens that are predicted: all but the first of each window. */
  readonly scoredTokens: number;
}

/**
 * The whole token stream in windows of `length`, one after the other; a last short window counts, unless it has a single token,
 * which scores nothing and is left out. Throws RecipeError for a length below 2 or when nothing is left to score.
 */
export function evaluationWindows(tokens: Int32Array, length: number): EvaluationWindows {
  assertSequenceLength(length, 2);
  const windows: Int32Array[] = [];
  let scoredTokens = 0;
  for (let start = 0; start + 1 < tokens.length; start += length) {
    const window = tokens.slice(start, start + length);
    windows.push(window);
    scoredTokens += window.length - 1;
  }
  if (scoredTokens === 0) throw new RecipeError(`the text has ${tokens.length} tokens; at least 2 are needed to score one`);
  return { windows, scoredTokens };
}

function assertSequenceLength(length: number, least: number): void {
  if (!Number.isInteger(length) || length < least) {
    throw new RecipeError(`--sequence-length ${length}: a whole number of at least ${least} is needed`);
  }
}
