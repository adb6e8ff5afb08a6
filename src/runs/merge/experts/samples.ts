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
    let long = 0;
    for (const path of paths) {
      const found = await samplesOf(path, expert, tokenizer, options);
      samples.push(...found.samples);
      long += found.long;
      plain &&= found.plain;
    }
    if (samples.length === 0) {
      const cause = long > 0 ? `, but for ${long} prompts of ${options.sequenceLength} tokens or more` : '';
      throw new RecipeError(`--calibration ${paths.join(' ')}: no text for expert ${label} in it${cause}`);
    }
    if (long > 0)
      notes.push(`${label}: ${long} prompts of ${options.sequenceLength} tokens or more leave no room for a response; left out`);
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

/** The samples of a file, how many of its prompts are too long to be one, and whether it is plain: see SampleSets. */
async function samplesOf(
  path: string,
  expert: number,
  tokenizer: Tokenizer,
  options: SampleOptions,
): Promise<{ samples: Sample[]; long: number; plain: boolean }> {
  const { sequenceLength, count, seed } = options;
  const samples: Sample[] = [];
  const documents: string[] = [];
  let long = 0;
  let plain = true;
  for await (const document of readPrompts(parseTextFile(path))) {
    if (typeof document === 'string') {
      documents.push(document);
      continue;
    }
    plain &&= 'response' in document && document.response !== undefined;
    const exchange =
      'messages' in document
        ? conversation(tokenizer, await templateFor(path, expert, options), document.messages)
        : {
            head: tokenizer.encode(document.prompt, 'before'),
            ...(document.response === undefined ? {} : { whole: tokenizer.encode(document.prompt + document.response) }),
          };
    const sample = sampleOf(expert, exchange, options);
    if (sample) samples.push(sample);
    else long++;
    if (samples.length >= count) break;
  }
  if (documents.length === 0) return { samples, long, plain };
  const tokens = tokenizer.encode(documents.join('\n\n'));
  if (tokens.length < 2) throw new RecipeError(`--calibration ${basename(path)}: less than two tokens of text`);
  const { windows } = calibrationWindows(tokens, { samples: count, sequenceLength, seed });
  return { samples: [...samples, ...windows.map((window) => ({ expert, tokens: window, countedFrom: 0 }))], long, plain };
}

/** Undefined when nothing but the prompt is left of `sequenceLength` tokens. */
function sampleOf(expert: number, { head, whole }: Exchange, { sequenceLength, answers }: SampleOptions): Sample | undefined {
  if (whole === undefined && answers !== true) return { expert, tokens: head.slice(0, sequenceLength), countedFrom: 0 };
  if (head.length >= sequenceLength) return undefined;
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
