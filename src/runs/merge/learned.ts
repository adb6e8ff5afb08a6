/** From a recipe to a merge plan: learned now, kept by an interrupted run, or read from a file. */
import { readFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { writeDurably } from '../../artifacts/durable.ts';
import { EnvironmentError, FormatError, RecipeError } from '../../errors.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import { completeValues, type LearnedMethod, type LearnedValues } from '../../methods/merge/learned.ts';
import type { MergePlan } from '../../methods/merge/merge-plan.ts';
import type { Declared } from '../../methods/merge/parameters.ts';
import type { RunHooks } from '../run.ts';
import type { LearningPlace } from './experts/ask-experts.ts';
import { learnMerge } from './experts/expert-merging.ts';
import type { LearningReport } from './experts/learner.ts';
import type { PreparedLearning } from './experts/prepare.ts';
import type { MergeInputs } from './inputs.ts';
import type { TensorJob } from './jobs.ts';
import { parametersOf } from './parameters.ts';
import type { MergeRecipe } from './recipe.ts';

export interface PlannedMerge {
  readonly plan: MergePlan;
  /** Absent for a plan that was given. */
  readonly report?: LearningReport;
}

const FILE = 'plan.json';

/** Settings of a learned method. Throws RecipeError for what it does not take. */
export function learnedValues(method: LearnedMethod, recipe: MergeRecipe): LearnedValues {
  return completeValues(method, parametersOf(method as Declared, recipe, [], [])(''), recipe.preset);
}

/**
 * The plan of a learned merge. What is learned is kept in the place, for a run that is interrupted in or after it.
 * @param prepared absent where a plan is given @param jobs of any schedule over the inputs
 */
export async function planMerge(
  prepared: PreparedLearning | undefined,
  inputs: MergeInputs,
  jobs: readonly TensorJob[],
  recipe: MergeRecipe,
  place: LearningPlace,
  hooks: RunHooks,
): Promise<PlannedMerge> {
  if (prepared === undefined) return { plan: await givenPlan(recipe) };
  const path = join(place.folder, FILE);
  const kept = await readFile(path, 'utf8').catch(() => undefined);
  if (kept !== undefined) return JSON.parse(kept) as PlannedMerge;
  const learned = await learnMerge(prepared, inputs, jobs, recipe, place, hooks);
  await place.keep();
  await writeDurably(path, JSON.stringify(learned));
  return learned;
}

/** A start that measures text needs the text again; nothing else does. */
async function givenPlan({ plan: path, calibration }: MergeRecipe): Promise<MergePlan> {
  const plan = await readPlan(path!);
  const { method, measured } = plan.start;
  const measures = mergerOf(method).statistics !== undefined;
  if (!measures && calibration.length > 0) throw new RecipeError('--plan: nothing is learned then; leave --calibration out');
  if (measures && calibration.length === 0)
    throw new RecipeError(
      `--plan: starts from ${method}, which measures every expert on text: give the --calibration that it was learned on`,
    );
  if (measures && measured === undefined) throw new RecipeError(`--plan: does not say on which text its start was measured`);
  return plan;
}

/** Reads a plan file, or the plan in a pcomp.json. Throws RecipeError for a file that has none. */
async function readPlan(path: string): Promise<MergePlan> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `--plan ${path}: cannot be read`, { cause: error });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FormatError(path, 'plan-not-json', `not JSON: ${(error as Error).message}`, { cause: error });
  }
  const plan = isPlan(value) ? value : (value as { plan?: unknown } | null)?.plan;
  if (!isPlan(plan)) throw new RecipeError(`--plan ${basename(path)}: holds no plan of a learned merge`);
  return plan;
}

function isPlan(value: unknown): value is MergePlan {
  const plan = value as MergePlan | null | undefined;
  if (typeof plan !== 'object' || plan === null || !Array.isArray(plan.experts) || typeof plan.start?.method !== 'string')
    return false;
  const numbers = (list: unknown) =>
    Array.isArray(list) && list.every((item) => typeof item === 'number' && Number.isFinite(item));
  return (
    (plan.passive === 'base' || plan.passive === 'mean') &&
    typeof plan.tensors === 'object' &&
    plan.tensors !== null &&
    Object.values(plan.tensors).every(
      ({ bounds, coefficients }) => numbers(bounds) && Array.isArray(coefficients) && coefficients.every(numbers),
    )
  );
}
