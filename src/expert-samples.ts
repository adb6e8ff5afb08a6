/** What learned merges are fitted on: texts or prompts for each expert, as tokens (merging.md 6.2). */
import { basename } from 'node:path';
import { parseTextFile, readPrompts } from './calibration/text.ts';
import type { Tokenizer } from './calibration/tokenizer.ts';
import { calibrationWindows } from './calibration/windows.ts';
import { RecipeError } from './errors.ts';

/** A text on which the merged model is compared with one expert. */
export interface Sample {
  readonly expert: number;
  readonly tokens: Int32Array;
  /** Logits of rows from here on count: what predicts the response, or everything in a plain text. */
  readonly countedFrom: number;
}

export interface SampleSets {
  readonly training: readonly Sample[];
  /** Judges iterates; empty for fewer than `HELD_OUT_FROM` samples of an expert. */
  readonly heldOut: readonly Sample[];
  readonly notes: readonly string[];
}

export interface SampleOptions {
  /** `label=FILE`, or a file for every expert. */
  readonly calibration: readonly string[];
  readonly labels: readonly string[];
  /** Most samples of an expert. */
  readonly count: number;
  readonly sequenceLength: number;
  readonly seed: number;
  readonly holdOut: boolean;
}

/** Samples of an expert from which on an eighth is held out. */
export const HELD_OUT_FROM = 16;
const HELD_OUT = 8;
/** Fewer make coefficients of noise. */
const FEW = 8;

/** Reads the samples of every expert. Throws RecipeError for experts without text, labels that no expert has, and empty files. */
export async function readSamples(tokenizer: Tokenizer, options: SampleOptions): Promise<SampleSets> {
  const notes: string[] = [];
  const files = filesByExpert(options, notes);
  const training: Sample[] = [];
  const heldOut: Sample[] = [];
  for (const [expert, paths] of files.entries()) {
    const label = options.labels[expert];
    const samples: Sample[] = [];
    for (const path of paths) samples.push(...(await samplesOf(path, expert, tokenizer, options)));
    if (samples.length === 0) throw new RecipeError(`--calibration ${paths.join(' ')}: no text for expert ${label} in it`);
    const taken = samples.slice(0, options.count);
    if (taken.length < FEW) notes.push(`${label}: ${taken.length} samples; at least ${FEW} are needed to learn from`);
    const spare = options.holdOut && taken.length >= HELD_OUT_FROM ? Math.ceil(taken.length / HELD_OUT) : 0;
    training.push(...taken.slice(0, taken.length - spare));
    heldOut.push(...taken.slice(taken.length - spare));
  }
  return { training, heldOut, notes };
}

/** Paths that are given for each expert. */
function filesByExpert({ calibration, labels }: SampleOptions, notes: string[]): string[][] {
  const files = labels.map((): string[] => []);
  for (const argument of calibration) {
    const equals = argument.indexOf('=');
    if (equals < 0) {
      for (const own of files) own.push(argument);
      if (labels.length > 1) {
        notes.push(
          `--calibration ${argument}: used for every expert, which asks for average behaviour; better one text each, label=FILE`,
        );
      }
      continue;
    }
    const label = argument.slice(0, equals);
    const expert = labels.indexOf(label);
    if (expert < 0)
      throw new RecipeError(`--calibration ${argument}: no expert is called ${label}; there are ${labels.join(', ')}`);
    files[expert].push(argument.slice(equals + 1));
  }
  const bare = labels.filter((_, k) => files[k].length === 0);
  if (bare.length > 0) throw new RecipeError(`--calibration: no text for expert ${bare.join(', ')}; give ${bare[0]}=FILE`);
  return files;
}

async function samplesOf(path: string, expert: number, tokenizer: Tokenizer, options: SampleOptions): Promise<Sample[]> {
  const { sequenceLength, count, seed } = options;
  const samples: Sample[] = [];
  const documents: string[] = [];
  for await (const document of readPrompts(parseTextFile(path))) {
    if (typeof document === 'string') {
      documents.push(document);
      continue;
    }
    const { prompt, response } = document;
    const head = tokenizer.encode(prompt);
    const whole = response === undefined ? head : tokenizer.encode(prompt + response);
    const tokens = whole.slice(0, sequenceLength);
    // The row of the prompt's last token predicts the first of the response. A prompt alone is compared as a whole.
    const countedFrom = response === undefined ? 0 : Math.max(0, Math.min(head.length, whole.length) - 1);
    if (countedFrom >= tokens.length) continue;
    samples.push({ expert, tokens, countedFrom });
    if (samples.length >= count) break;
  }
  if (documents.length === 0) return samples;
  const tokens = tokenizer.encode(documents.join('\n\n'));
  if (tokens.length < 2) throw new RecipeError(`--calibration ${basename(path)}: less than two tokens of text`);
  const { windows } = calibrationWindows(tokens, { samples: count, sequenceLength, seed });
  return [...samples, ...windows.map((window) => ({ expert, tokens: window, countedFrom: 0 }))];
}
