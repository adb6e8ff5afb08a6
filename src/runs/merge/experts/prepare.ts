/** What a merge that runs models begins from, known before any does: the network, the samples, and what learning will take. */
import { statfs } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { readGenerationConfig } from '../../../artifacts/generation-config.ts';
import { loadChatTemplate } from '../../../calibration/chat-template.ts';
import { loadTokenizer } from '../../../calibration/tokenizer.ts';
import { EnvironmentError, RecipeError } from '../../../errors.ts';
import { mergerOf } from '../../../methods/merge/index.ts';
import type { LearnedMethod, LearnedValues, TextValues } from '../../../methods/merge/learned.ts';
import { createModel } from '../../../model/architectures/index.ts';
import type { Model } from '../../../model/model.ts';
import type { MergeInputs } from '../inputs.ts';
import type { MergeRecipe } from '../recipe.ts';
import { matrixSeconds } from '../schedule.ts';
import { sitesOf, sizeOf } from './chunks.ts';
import { GAMMAS, stageRules, validatesGamma } from './rules.ts';
import { readSamples, type Sample, type SampleSets } from './samples.ts';
import { SEARCHED, startMethods } from './start.ts';

/** Core hours that the search of a start may take. */
const LONG_HOURS = 1;

/** Part of --max-memory for task vectors that stay in memory; the rest is for activations, and what neither holds is on disk. */
export const KEPT_PART = 0.5;

/** The network, and the text that models are compared on. */
export interface PreparedText {
  readonly model: Model;
  readonly folder: string;
  readonly labels: readonly string[];
  readonly samples: SampleSets;
  /** Longest sample. */
  readonly sequenceLength: number;
  /** Tokens that end a response, by expert. */
  readonly endTokens: readonly ReadonlySet<number>[];
}

export interface PreparedLearning extends PreparedText {
  readonly method: LearnedMethod;
  readonly values: LearnedValues;
  /** Training-free methods that coefficients may start from. */
  readonly starts: readonly string[];
  readonly cost: LearningCost;
}

/** What learning takes, as far as the request tells. */
export interface LearningCost {
  /** Of all experts: samples to learn from, and to judge by. */
  readonly samples: number;
  readonly heldOut: number;
  /** Prompts whose responses the experts write. */
  readonly prompts: number;
  /** Tokens of all samples; a response that is to be written at its longest. */
  readonly tokens: number;
  /** Updates of all stages, cross-validation included. */
  readonly updates: number;
  /** Activations, teachers and starts that do not fit into memory. */
  readonly temporaryBytes: number;
}

/** Reads samples and counts. Throws RecipeError for requests that cannot be learned from. */
export async function prepareLearning(
  method: LearnedMethod,
  values: LearnedValues,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  note: (message: string) => void,
): Promise<PreparedLearning> {
  const text = await prepareText(method.name, values, recipe.preset !== 'paper', inputs, recipe, note);
  const starts = startsOf(values, text.samples, matrixSeconds(inputs) / 3600, note);
  const counted = { ...text, method, values, starts };
  return { ...counted, cost: costOf(counted, recipe) };
}

/** Reads the samples of every expert. @param who wants them, for messages @param holdOut leave some aside, to judge by */
export async function prepareText(
  who: string,
  values: TextValues,
  holdOut: boolean,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  note: (message: string) => void,
): Promise<PreparedText> {
  const { network, folder, template } = inputs;
  if (network === undefined) throw new RecipeError(`${folder}: ${who} runs the model, and there is no config.json to tell how`);
  const model = createModel(network, join(folder, 'config.json'), template.tensors);
  const tokenizer = await loadTokenizer(folder, model.shape.vocabSize);
  const labels = inputs.experts.map(({ label }) => label);
  const sequenceLength = Math.min(values.length, model.shape.contextLength);
  const folders = inputs.experts.map(({ place }) => (place.kind === 'folder' ? place.path : folder));
  const samples = await readSamples(tokenizer, {
    calibration: recipe.calibration,
    labels,
    count: values.samples,
    sequenceLength,
    seed: recipe.seed,
    holdOut,
    answers: recipe.generate,
    templateOf: async (expert) => (await loadChatTemplate(folders[expert])) ?? loadChatTemplate(folder),
  });
  for (const message of samples.notes) note(message);
  const endTokens: ReadonlySet<number>[] = [];
  for (const [k, { config: own }] of inputs.experts.entries())
    endTokens.push(endTokensOf(await readGenerationConfig({ folder: folders[k], config: own ?? network })));
  return { model, folder, labels, samples, sequenceLength, endTokens };
}

/** Leaves out what would take too long, and what measures text that would have to be written first. */
function startsOf(
  values: LearnedValues,
  { plain }: SampleSets,
  hours: number,
  note: (message: string) => void,
): readonly string[] {
  const measures = (method: string) => mergerOf(method).statistics !== undefined;
  if (measures(values.start === 'auto' || values.start === 'none' ? 'linear' : values.start) && !plain) {
    throw new RecipeError(
      `--set start=${values.start}: measures plain texts, or prompts with their responses; give such, or another start`,
    );
  }
  if (values.start === 'auto' && hours > LONG_HOURS)
    note(`starts that decompose every matrix are left out: about ${Math.ceil(hours)} core hours; --set start=tsv-m insists`);
  return startMethods(
    values.start,
    ({ access, statistics }) => (access !== 'matrix' || hours <= LONG_HOURS) && (statistics === undefined || plain),
  );
}

function endTokensOf({ eos_token_id: ids }: Readonly<Record<string, unknown>>): ReadonlySet<number> {
  return new Set([ids].flat().filter((id): id is number => typeof id === 'number'));
}

/** Throws EnvironmentError DISK_FULL when temporary files would not fit. */
export async function requireTemporarySpace({ temporaryBytes }: Pick<LearningCost, 'temporaryBytes'>): Promise<void> {
  const folder = tmpdir();
  const { bavail, bsize } = await statfs(folder);
  if (bavail * bsize >= temporaryBytes) return;
  throw new EnvironmentError(
    'DISK_FULL',
    `${folder}: running the models keeps up to ${temporaryBytes} bytes in temporary files, and the disk has ${bavail * bsize} left; raise --max-memory, set TMPDIR to a larger disk, or lower --set samples= or length=`,
  );
}

/** Tokens of samples, a response that is to be written at its longest. */
export function tokensOf(
  samples: readonly Sample[],
  { sequenceLength }: PreparedText,
  { response_length: response }: TextValues,
): number {
  return samples.reduce((sum, sample) => sum + lengthOf(sample, sequenceLength, response), 0);
}

function lengthOf({ tokens, open }: Sample, sequenceLength: number, response: number): number {
  return open ? Math.min(sequenceLength, tokens.length + response) : tokens.length;
}

function costOf(counted: Omit<PreparedLearning, 'cost'>, recipe: MergeRecipe): LearningCost {
  const { method, values, model, labels, samples, sequenceLength, starts } = counted;
  const all = [...samples.training, ...samples.heldOut];
  const count = (list: readonly Sample[]) => tokensOf(list, counted, values);
  const own = (k: number, list: readonly Sample[]) => list.filter(({ expert }) => expert === k);
  const perExpert = samples.training.length / labels.length;
  const paper = recipe.preset === 'paper';
  const { updates: planned, batch } = stageRules(method, values, { paper, gamma: 0, experts: labels.length });
  const most = Math.max(...labels.map((_, k) => own(k, samples.training).length));
  const first = planned === 'epoch' ? Math.ceil((most * labels.length) / batch) : planned;
  const second = !method.chunked ? 0 : paper ? first : values.chunk_updates;
  const trials = validatesGamma(values, perExpert) ? GAMMAS.length * 2 : 0;

  const { hiddenSize, blockCount } = model.shape;
  const row = 4 * hiddenSize;
  const tokens = count(all);
  // Teachers: states before the head, and after the middle block where they are compared.
  const teachers = tokens * row * (values.hidden > 0 ? 2 : 1);
  const sites = sitesOf(model).reduce((sum, { site }) => sum + 4 * sizeOf(site), 0);
  // The best so far, and the one that is tried.
  const startBytes = sites * Math.min(2, starts.length);
  const searched = labels.flatMap((_, k) => own(k, samples.training).slice(0, SEARCHED));
  // One pass at a time: experts over their own samples, candidates over theirs, judges over what is held out or the other fold.
  const passes = Math.max(
    ...labels.map((_, k) => count(own(k, all)) * (values.hidden > 0 ? 2 : 1)),
    starts.length === 0 ? 0 : count(searched),
    count(samples.heldOut.length > 0 ? samples.heldOut : samples.training),
    trials === 0 ? 0 : Math.ceil(count(samples.training) / 2),
  );
  const longest = all.map((sample) => lengthOf(sample, sequenceLength, values.response_length)).sort((a, b) => b - a);
  const update = longest.slice(0, batch).reduce((sum, length) => sum + length, 0) * (blockCount + 2);
  const bytes = teachers + startBytes + Math.max(passes, update) * row;
  return {
    samples: samples.training.length,
    heldOut: samples.heldOut.length,
    prompts: all.filter(({ open }) => open).length,
    tokens,
    updates: first * (1 + trials) + second,
    temporaryBytes: Math.max(0, Math.ceil(bytes - recipe.maxMemory * (1 - KEPT_PART))),
  };
}
