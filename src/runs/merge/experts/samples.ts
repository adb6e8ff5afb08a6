/** What learned merges are fitted on: texts, prompts and conversations for each expert, as tokens (merging.md 6.2). */
import { basename } from 'node:path';
import type { ChatMessage, ChatTemplate } from '../../../calibration/chat-template.ts';
import { parseTextFile, readPrompts } from '../../../calibration/text.ts';
import type { Tokenizer } from '../../../calibration/tokenizer.ts';
import { calibrationWindows } from '../../../calibration/windows.ts';
import { RecipeError } from '../../../errors.ts';

/** A text on which the merged model is compared with one expert. */
export interface Sample {
  readonly expert: number;
  readonly tokens: Int32Array;
  /** Logits of rows from here on count: what predicts the response, or everything in a plain text. */
  readonly countedFrom: number;
  /** A prompt without a response, which its expert may write. */
  readonly open?: true;
}

export interface SampleSets {
  readonly training: readonly Sample[];
  /** Judges iterates; empty for fewer than `HELD_OUT_FROM` samples of an expert. */
  readonly heldOut: readonly Sample[];
  /** Nothing but plain texts, and prompts that have their response: all that is read again without templates and experts. */
  readonly plain: boolean;
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
  /** Whether experts are to write the responses that prompts lack: the prompt itself does not count then, and must leave room. */
  readonly answers?: boolean;
  /** The template that an expert's conversations are written by; asked only when there are some. Absent: conversations are refused. */
  readonly templateOf?: (expert: number) => Promise<ChatTemplate | undefined>;
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
  let plain = true;
  for (const [expert, paths] of files.entries()) {
    const label = options.labels[expert];
    const samples: Sample[] = [];
    const left = { long: 0, empty: 0 };
    for (const path of paths) {
      const found = await samplesOf(path, expert, tokenizer, options);
      samples.push(...found.samples);
      left.long += found.left.long;
      left.empty += found.left.empty;
      plain &&= found.plain;
    }
    const long = `${left.long} prompts of ${options.sequenceLength} tokens or more`;
    const empty = `${left.empty} prompts without a token`;
    if (samples.length === 0) {
      const causes = [...(left.long > 0 ? [long] : []), ...(left.empty > 0 ? [empty] : [])].join(' and ');
      throw new RecipeError(
        `--calibration ${paths.join(' ')}: no text for expert ${label} in it${causes === '' ? '' : `, but for ${causes}`}`,
      );
    }
    if (left.long > 0) notes.push(`${label}: ${long} leave no room for a response; left out`);
    if (left.empty > 0) notes.push(`${label}: ${empty}, of which nothing follows; left out`);
    const taken = samples.slice(0, options.count);
    if (taken.length < FEW) notes.push(`${label}: ${taken.length} samples; at least ${FEW} are needed to learn from`);
    const spare = options.holdOut && taken.length >= HELD_OUT_FROM ? Math.ceil(taken.length / HELD_OUT) : 0;
    training.push(...taken.slice(0, taken.length - spare));
    heldOut.push(...taken.slice(taken.length - spare));
  }
  return { training, heldOut, plain, notes };
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

/** A prompt and what follows it, as tokens; without `whole` the prompt is open. */
interface Exchange {
  readonly head: Int32Array;
  readonly whole?: Int32Array;
}

/** What of a file is no sample: prompts that leave no room for a response, and those of no tokens. */
interface LeftOut {
  long: number;
  empty: number;
}

/** The samples of a file, how many of its lines are none, and whether it is plain: see SampleSets. */
async function samplesOf(
  path: string,
  expert: number,
  tokenizer: Tokenizer,
  options: SampleOptions,
): Promise<{ samples: Sample[]; left: LeftOut; plain: boolean }> {
  const { sequenceLength, count, seed } = options;
  const samples: Sample[] = [];
  const documents: string[] = [];
  const left: LeftOut = { long: 0, empty: 0 };
  let template: ChatTemplate | undefined;
  let plain = true;
  for await (const document of readPrompts(parseTextFile(path))) {
    if (typeof document === 'string') {
      documents.push(document);
      continue;
    }
    plain &&= 'response' in document && document.response !== undefined;
    let exchange: Exchange;
    if ('messages' in document) {
      template ??= await templateFor(path, expert, options);
      exchange = conversation(tokenizer, template, document.messages);
    } else {
      const { prompt, response } = document;
      const head = tokenizer.encode(prompt, 'before');
      exchange = response === undefined ? { head } : { head, whole: tokenizer.encode(prompt + response) };
    }
    const sample = sampleOf(expert, exchange, options);
    if (typeof sample === 'object') samples.push(sample);
    else left[sample]++;
    if (samples.length >= count) break;
  }
  if (documents.length === 0) return { samples, left, plain };
  const tokens = tokenizer.encode(documents.join('\n\n'));
  if (tokens.length < 2) throw new RecipeError(`--calibration ${basename(path)}: less than two tokens of text`);
  const { windows } = calibrationWindows(tokens, { samples: count, sequenceLength, seed });
  return { samples: [...samples, ...windows.map((window) => ({ expert, tokens: window, countedFrom: 0 }))], left, plain };
}

/** Or why there is none: nothing but the prompt is left of `sequenceLength` tokens, or there is no token to start from. */
function sampleOf(expert: number, { head, whole }: Exchange, { sequenceLength, answers }: SampleOptions): Sample | keyof LeftOut {
  if ((whole ?? head).length === 0) return 'empty';
  if (whole === undefined && answers !== true) return { expert, tokens: head.slice(0, sequenceLength), countedFrom: 0 };
  if (head.length >= sequenceLength) return 'long';
  if (whole === undefined) return { expert, tokens: head, countedFrom: 0, open: true };
  // The row of the prompt's last token predicts the first of the response. Where the two are one word, tokens differ before its end.
  let shared = 0;
  while (shared < head.length && head[shared] === whole[shared]) shared++;
  return { expert, tokens: whole.slice(0, sequenceLength), countedFrom: Math.max(0, shared - 1) };
}

async function templateFor(path: string, expert: number, { labels, templateOf }: SampleOptions): Promise<ChatTemplate> {
  const template = await templateOf?.(expert);
  if (template) return template;
  const why = templateOf
    ? `neither ${labels[expert]} nor the base has a chat template`
    : 'only learned methods take conversations';
  throw new RecipeError(`--calibration ${path}: holds messages, and ${why}; give prompt and response instead`);
}

/** What the assistant says last is the response; a conversation that ends with another's words is open. */
function conversation(tokenizer: Tokenizer, template: ChatTemplate, messages: readonly ChatMessage[]): Exchange {
  const answered = messages.at(-1)!.role === 'assistant';
  const asked = answered ? messages.slice(0, -1) : messages;
  const head = tokenizer.encode(template.render(asked, true), 'none');
  return answered ? { head, whole: tokenizer.encode(template.render(messages, false), 'none') } : { head };
}
