/**
 * Finds lambda on text (`--set lambda=auto`): merges once by lambda 1, beside the unfinished result, and takes the lambda whose model is nearest to
 * all experts, each on its own samples (merging.md 5 and 6.3).
 */
import { mkdir, readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { openCheckpoint } from '../../../formats/checkpoint.ts';
import { writeDurably } from '../../artifacts/durable.ts';
import type { OutputFolder } from '../../artifacts/output-folder.ts';
import { SourceWeights } from '../../artifacts/source-weights.ts';
import { Spool } from '../../calibration/state-store.ts';
import { createEngine } from '../../compute/ort.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { UnsupportedError } from '../../errors.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import { LAMBDAS } from '../../methods/merge/lambda-search.ts';
import type { Forward } from '../forward.ts';
import type { RunHooks } from '../run.ts';
import { askExperts } from './experts/ask-experts.ts';
import { distances, meanKl } from './experts/distances.ts';
import { type PreparedText, prepareText, requireTemporarySpace, tokensOf } from './experts/prepare.ts';
import type { MergeInputs } from './inputs.ts';
import type { LambdaRequest } from './lambda-setting.ts';
import { produce } from './produce.ts';
import type { MergeRecipe } from './recipe.ts';
import { ScaledWeights } from './scaled-weights.ts';
import { type MergeSchedule, scheduleMerge } from './schedule.ts';
import { MergeWeights } from './weights.ts';

export interface TriedLambda {
  readonly lambda: number;
  /** Mean over experts of the mean KL(expert || merged) of its samples, in nats. */
  readonly kl: number;
}

export interface LambdaReport {
  /** The result's. */
  readonly value: number;
  readonly tried: readonly TriedLambda[];
}

/** What the search takes. */
export interface LambdaCost {
  readonly lambdas: number;
  /** Of all experts, once for every lambda. */
  readonly samples: number;
  /** Prompts whose responses the experts write. */
  readonly prompts: number;
  /** Of all samples; a response that is to be written at its longest. */
  readonly tokens: number;
  /** Activations that do not fit into memory. */
  readonly temporaryBytes: number;
  /** Of the merge by lambda 1, beside the unfinished result until lambda is found. */
  readonly mergedBytes: number;
}

export interface PreparedLambda {
  readonly request: LambdaRequest;
  readonly text: PreparedText;
  /** Of the merge by lambda 1. */
  readonly schedule: MergeSchedule;
  readonly cost: LambdaCost;
}

/** Reads samples and counts. Throws RecipeError for text that nothing can be found on. */
export async function prepareLambda(
  request: LambdaRequest,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  note: (message: string) => void,
): Promise<PreparedLambda> {
  const { values } = request;
  const text = await prepareText('--set lambda=auto', values, false, inputs, recipe, note);
  const inOneFile: MergeRecipe = { ...request.at(1), dtype: 'f32', shardSize: Number.MAX_SAFE_INTEGER };
  const schedule = scheduleMerge(inputs, inOneFile, mergerOf(recipe.method));
  const { training } = text.samples;
  const tokens = tokensOf(training, text, values);
  // Every expert's states before its head, and those of the model that is judged.
  const states = 2 * tokens * 4 * text.model.shape.hiddenSize;
  const cost: LambdaCost = {
    lambdas: LAMBDAS.length,
    samples: training.length,
    prompts: training.filter(({ open }) => open).length,
    tokens,
    temporaryBytes: Math.max(0, states - recipe.maxMemory),
    mergedBytes: schedule.writtenBytes,
  };
  return { request, text, schedule, cost };
}

/** Goes on from the lambdas that an interrupted run had judged. */
export async function findLambda(
  { request, text, schedule, cost }: PreparedLambda,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  output: OutputFolder,
  hooks: RunHooks,
): Promise<LambdaReport> {
  const progress = await LambdaProgress.open(join(output.partsPath, 'lambda.json'), output, recipe.threads);
  if (progress.tried.length < LAMBDAS.length) {
    await requireTemporarySpace(cost);
    const folder = join(output.partsPath, 'by-lambda-1');
    await mkdir(folder, { recursive: true });
    // What a method has to say of a tensor, it says when the result is merged.
    const { note: _, ...quiet } = hooks;
    const journal = join(output.partsPath, 'by-lambda-1.ndjson');
    await produce({ recipe, schedule, statistics: undefined, output, folder, journal, phase: 'merge by lambda 1', hooks: quiet });
    await judge({ request, text, schedule, folder, progress }, inputs, recipe, output, hooks);
    await rm(folder, { recursive: true });
  }
  const { tried } = progress;
  const best = tried.reduce((least, other) => (other.kl < least.kl ? other : least));
  if (!Number.isFinite(best.kl))
    throw new UnsupportedError(`--set lambda=auto: the merged model is ${best.kl} from its experts; give a lambda instead`);
  const others = tried.map(({ lambda, kl }) => `${lambda}: ${kl.toPrecision(3)}`).join(', ');
  hooks.note?.(`lambda ${best.lambda} is nearest to the experts on their texts; mean KL in nats by lambda: ${others}`);
  return { value: best.lambda, tried };
}

interface Judged {
  readonly request: LambdaRequest;
  readonly text: PreparedText;
  readonly schedule: MergeSchedule;
  /** Of the merge by lambda 1. */
  readonly folder: string;
  readonly progress: LambdaProgress;
}

async function judge(
  { request, text, schedule, folder, progress }: Judged,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  output: OutputFolder,
  hooks: RunHooks,
): Promise<void> {
  await using engine = await createEngine({ threads: progress.threads, onNote: (note) => hooks.note?.(note) });
  await using spool = new Spool({ ramBytes: recipe.maxMemory });
  using weights = new MergeWeights(inputs, schedule.jobs, 0);
  await using source = await openCheckpoint(folder);
  const merged = new SourceWeights(source);
  const { model, folder: path, labels } = text;
  const forward: Forward = { model, engine, blas: createBlas(engine), spool, path, signal: hooks.signal };
  await using teachers = await askExperts(forward, weights, {
    text,
    values: request.values,
    middle: false,
    recipe,
    memoryBytes: recipe.maxMemory,
    place: { folder: output.partsPath, keep: () => output.keepForResume() },
    hooks,
  });
  for (const lambda of LAMBDAS) {
    if (progress.tried.some((known) => known.lambda === lambda)) continue;
    hooks.signal?.throwIfAborted();
    hooks.progress?.({ phase: `lambda ${lambda}`, done: progress.tried.length, total: LAMBDAS.length });
    const scaled = new ScaledWeights(weights.base, merged, lambda);
    await progress.add({ lambda, kl: meanKl(await distances(forward, teachers, teachers.lessons, labels.length, scaled)) });
  }
}

interface State {
  /** Of the engine: another number would round products otherwise. */
  readonly threads: number;
  readonly tried: readonly TriedLambda[];
}

/** What has been judged, kept beside the unfinished result. */
class LambdaProgress {
  readonly #path: string;
  readonly #output: OutputFolder;
  #state: State;

  private constructor(path: string, output: OutputFolder, state: State) {
    this.#path = path;
    this.#output = output;
    this.#state = state;
  }

  /** @param threads of a run that begins here */
  static async open(path: string, output: OutputFolder, threads: number): Promise<LambdaProgress> {
    const kept = await readFile(path, 'utf8').catch(() => undefined);
    return new LambdaProgress(path, output, kept === undefined ? { threads, tried: [] } : (JSON.parse(kept) as State));
  }

  get threads(): number {
    return this.#state.threads;
  }

  get tried(): readonly TriedLambda[] {
    return this.#state.tried;
  }

  async add(tried: TriedLambda): Promise<void> {
    this.#state = { ...this.#state, tried: [...this.#state.tried, tried] };
    await this.#output.keepForResume();
    await writeDurably(this.#path, JSON.stringify(this.#state));
  }
}
