/** `merge`: models of one base in, one checkpoint of the base's shape out, a tensor at a time. */
import { statfs } from 'node:fs/promises';
import { join } from 'node:path';
import { explainDiskError } from '../../artifacts/durable.ts';
import { writeReport } from '../../artifacts/manifest.ts';
import { OutputFolder } from '../../artifacts/output-folder.ts';
import { EnvironmentError } from '../../errors.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import { learnedOf } from '../../methods/merge/learned.ts';
import { MOE } from '../../methods/merge/moe/layouts.ts';
import type { OutputMode } from '../quantize/quantize.ts';
import type { RunHooks } from '../run.ts';
import { countDispositions, writeMergeManifest } from './describe.ts';
import type { LearningReport } from './experts/learner.ts';
import { type LearningCost, prepareLearning } from './experts/prepare.ts';
import { writeModelFiles } from './files.ts';
import { type MergeInputs, openMergeInputs } from './inputs.ts';
import { findLambda, type LambdaCost, type LambdaReport, prepareLambda } from './lambda-search.ts';
import { lambdaRequest } from './lambda-setting.ts';
import { learnedValues, planMerge } from './learned.ts';
import { markInputs } from './marks.ts';
import { produce } from './produce.ts';
import type { MergeRecipe } from './recipe.ts';
import { type MergeSchedule, matrixSeconds, scheduleMerge } from './schedule.ts';
import { sparseInputs } from './sparse.ts';
import { measureStatistics } from './statistics.ts';
import type { TensorResult } from './tensor.ts';

/** What came of a merge, or would come of it. */
export interface MergeOutcome {
  readonly method: string;
  /** `weight`: in the first tensor that is merged; `--set` may give others another. Absent where the method has none. */
  readonly experts: readonly { readonly label: string; readonly kind: string; readonly weight?: number }[];
  readonly base?: string;
  /** Tensors of the result by what was done to them. */
  readonly tensors: Readonly<Record<string, number>>;
  /** Bytes of the result's weight files. */
  readonly bytes: number;
  /** Most bytes to read, every pass counted. */
  readonly readBytes: number;
  readonly threads: number;
  /** Most bytes of buffers at any time. */
  readonly predictedPeakBytes: number;
  readonly notes: readonly string[];
  /** In a dry run: what learning coefficients would take. */
  readonly toLearn?: LearningCost;
  /** In a dry run: what finding lambda would take. */
  readonly toFindLambda?: LambdaCost;
  /** `--set lambda=auto`: the lambda of the result, and all that were tried. */
  readonly lambda?: LambdaReport;
  /** How coefficients were learned, and what came of it. */
  readonly learning?: LearningReport;
  /** What the run did; absent in a dry run. */
  readonly run?: {
    readonly output: string;
    readonly seconds: number;
    /** Of all threads, in the program and in the system. */
    readonly cpuSeconds: number;
    /** Peak resident memory of the process. */
    readonly peakBytes: number;
    /** Tensors that an earlier run had finished. */
    readonly resumed: number;
    /** Largest rounding loss of a tensor, relative to how far it moved from the base. */
    readonly roundingLoss?: { readonly tensor: string; readonly loss: number };
  };
}

/** Core hours that a default may take: a model of a billion parameters, in an hour on two cores. */
const LONG_HOURS = 2;
/** The default where the usual one would take longer: the mean of the experts, which needs no scale. */
const QUICK = 'linear';

/** What a plan is applied by is known when it is learned; until then, and for a sparse model, which only copies: a method that reads everything once. */
const PLACEHOLDER = 'task-arithmetic';

/** Rounding loss above which the result's type is too coarse for the change. */
const LOSS_LIMIT = 0.2;

/**
 * Merges the experts into the folder `outputPath`. Throws RecipeError and UnsupportedError for a request that cannot be met, FormatError
 * for a broken input, EnvironmentError for what the machine lacks; all checks come before the first weight is merged.
 */
export async function merge(
  expertPaths: readonly string[],
  outputPath: string,
  asked: MergeRecipe,
  mode: OutputMode,
  hooks: RunHooks = {},
): Promise<MergeOutcome> {
  const started = performance.now();
  const notes: string[] = [];
  const note = (message: string): void => {
    notes.push(message);
    hooks.note?.(message);
  };
  const request = { path: outputPath, overwrite: mode.overwrite, resume: mode.resume, inPlace: true };
  // What is in the way is found before any work; whether a partial run is of this recipe is judged when the inputs are known.
  if (!mode.dryRun) {
    await OutputFolder.check({ ...request, resume: false, overwrite: mode.overwrite || mode.resume, recipeHash: '' });
  }
  await using opened = await openMergeInputs(expertPaths, asked);
  await using sparse = asked.method === MOE ? await sparseInputs(opened, asked, hooks) : undefined;
  const inputs = sparse?.inputs ?? opened;
  const recipe = affordable(inputs, asked, note);
  if (recipe.chosen === 'default' && recipe.plan === undefined)
    note(`merging by ${recipe.method}, the default ${defaultReason(recipe)}`);
  for (const message of inputs.notes) note(message);
  const learned = learnedOf(recipe.method);
  const lambda = lambdaRequest(recipe);
  // What is learned is settled by the plan: nothing is left for the method that applies it. What is found makes no difference to the work.
  const applied = learned ? { ...recipe, set: [], weights: [] } : (lambda?.at(1) ?? recipe);
  const expected = scheduleMerge(inputs, applied, mergerOf(learned || sparse ? PLACEHOLDER : recipe.method));
  const values = learned && learnedValues(learned, recipe);
  const marks = await markInputs(inputs, recipe);
  const prepared =
    learned && values && recipe.plan === undefined ? await prepareLearning(learned, values, inputs, recipe, note) : undefined;
  const search = lambda && (await prepareLambda(lambda, inputs, recipe, note));
  if (mode.dryRun) {
    if (prepared) note('bytes, memory and tensors are those of applying the plan, once it is learned');
    if (search)
      note('bytes, memory and tensors are those of the merge once lambda is found; another one, by lambda 1, comes before');
    return {
      ...outlineOf(inputs, recipe, expected, notes),
      ...(prepared ? { toLearn: prepared.cost } : {}),
      ...(search ? { toFindLambda: search.cost } : {}),
    };
  }
  await using output = await OutputFolder.open({ ...request, recipeHash: marks.hash });
  try {
    await requireSpace(output, expected.writtenBytes + (search?.cost.mergedBytes ?? 0));
    const keep = () => output.keepForResume();
    const place = { folder: output.partsPath, keep };
    const planned = learned && (await planMerge(prepared, inputs, expected.jobs, recipe, place, { ...hooks, note }));
    const method = learned || sparse ? undefined : mergerOf(recipe.method);
    const measuring = planned ? mergerOf(planned.plan.start.method) : method;
    const statistics =
      measuring?.statistics &&
      (await measureStatistics(
        measuring,
        inputs,
        expected.jobs,
        recipe,
        place,
        { ...hooks, note },
        recipe.threads,
        planned?.plan.start.measured,
      ));
    const found = search && (await findLambda(search, inputs, recipe, output, { ...hooks, note }));
    const schedule = planned
      ? scheduleMerge(inputs, applied, mergerOf(planned.plan.start.method), { plan: planned.plan, statistics })
      : sparse
        ? expected
        : scheduleMerge(inputs, lambda && found ? lambda.at(found.value) : recipe, mergerOf(recipe.method), { statistics });
    const outline = outlineOf(inputs, recipe, schedule, notes, planned?.report);
    const { results, resumed } = await produce({
      recipe,
      schedule,
      statistics,
      output,
      folder: output.artifactPath,
      journal: join(output.partsPath, 'journal.ndjson'),
      phase: 'merge',
      hooks: { ...hooks, note },
    });
    hooks.signal?.throwIfAborted();
    const files = await writeModelFiles(output.artifactPath, inputs, recipe, schedule, { planned, lambda: found }, note);
    const plan = planned?.plan;
    await writeMergeManifest(output.artifactPath, { recipe, inputs, schedule, plan, lambda: found, marks, results, files });
    const roundingLoss = warnOfLoss(results, note);
    const outcome: MergeOutcome = {
      ...outline,
      ...(found ? { lambda: found } : {}),
      run: {
        output: outputPath,
        seconds: (performance.now() - started) / 1000,
        cpuSeconds: cpuSeconds(),
        peakBytes: process.resourceUsage().maxRSS * 1024,
        resumed,
        ...(roundingLoss ? { roundingLoss } : {}),
      },
    };
    await writeReport(output.artifactPath, { ...outcome, tensors: outline.tensors, roundingLosses: lossesOf(results) });
    await output.finalize();
    return outcome;
  } catch (error) {
    throw explainDiskError(error, output.path);
  }
}

function cpuSeconds(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
}

function defaultReason({ calibration, base }: MergeRecipe): string {
  if (calibration.length > 0) return 'with --calibration';
  if (base === undefined) return 'without a --base';
  return 'with a --base; text for every expert (--calibration) would let pcomp learn how much of each to take';
}

/**
 * Singular vectors of a large model's matrices take hours to days on a CPU: nobody gets that by default, and who asks for it is told. The rule
 * looks at the model alone, so that a recipe means the same on every machine.
 */
function affordable(inputs: MergeInputs, recipe: MergeRecipe, note: (message: string) => void): MergeRecipe {
  if (
    recipe.method === MOE ||
    learnedOf(recipe.method) ||
    mergerOf(recipe.method).access !== 'matrix' ||
    mergerOf(recipe.method).statistics
  )
    return recipe;
  const hours = matrixSeconds(inputs, mergerOf(recipe.method).side) / 3600;
  if (hours <= LONG_HOURS) return recipe;
  const cost = `${recipe.method} takes the singular vectors of every matrix, here about ${Math.ceil(hours)} core hours`;
  if (recipe.chosen === 'default') {
    note(`${cost}: merging by ${QUICK} instead; --method ${recipe.method} insists`);
    return { ...recipe, method: QUICK };
  }
  note(`${cost}; --method ${QUICK}, ties or task-arithmetic takes minutes`);
  return recipe;
}

function outlineOf(
  inputs: MergeInputs,
  recipe: MergeRecipe,
  schedule: MergeSchedule,
  notes: readonly string[],
  learning?: LearningReport,
): Omit<MergeOutcome, 'run'> {
  return {
    method: `${recipe.method}, preset ${recipe.preset}`,
    experts: inputs.experts.map(({ label, place }, k) => ({
      label,
      kind: place.kind,
      ...(learnedOf(recipe.method) ? {} : weightOf(schedule, k)),
    })),
    ...(inputs.base ? { base: inputs.base.label } : {}),
    tensors: countDispositions(schedule),
    bytes: schedule.writtenBytes,
    readBytes: schedule.readBytes,
    threads: schedule.threads,
    predictedPeakBytes: schedule.peakBytes,
    notes,
    ...(learning ? { learning } : {}),
  };
}

/** The weight of expert `k` in the first tensor that is merged. */
function weightOf({ jobs }: MergeSchedule, k: number): { weight?: number } {
  const first = jobs.find((job) => job.kind === 'merge');
  const weights = first?.kind === 'merge' ? first.values['weight'] : undefined;
  return Array.isArray(weights) ? { weight: weights[k] as number } : {};
}

async function requireSpace(output: OutputFolder, bytes: number): Promise<void> {
  if (output.resumed) return;
  const { bavail, bsize } = await statfs(output.artifactPath);
  if (bavail * bsize >= bytes) return;
  throw new EnvironmentError(
    'DISK_FULL',
    `${output.path}: the result takes ${bytes} bytes, but the disk has ${bavail * bsize} left`,
  );
}

function lossesOf(results: ReadonlyMap<string, TensorResult>): Record<string, number> {
  const losses = [...results.values()].flatMap(({ tensor, roundingLoss }) =>
    roundingLoss === undefined ? [] : [[tensor, roundingLoss] as const],
  );
  return Object.fromEntries(losses.sort(([a], [b]) => (a < b ? -1 : 1)));
}

function warnOfLoss(
  results: ReadonlyMap<string, TensorResult>,
  note: (message: string) => void,
): { tensor: string; loss: number } | undefined {
  const losses = Object.entries(lossesOf(results)).sort(([, a], [, b]) => b - a);
  if (losses.length === 0) return undefined;
  const large = losses.filter(([, loss]) => loss > LOSS_LIMIT);
  const [tensor, loss] = losses[0];
  if (large.length > 0) {
    note(
      `rounding takes more than ${LOSS_LIMIT} of the change of ${large.length} tensors, most (${loss.toPrecision(2)}) of ${tensor}; --dtype f32 keeps it`,
    );
  }
  return { tensor, loss };
}
