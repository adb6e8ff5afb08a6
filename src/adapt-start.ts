/** What an adapter begins with: ranks and first factors, as the method of the recipe finds them on the model and the text. */
import type { AdaptRecipe } from './adapt-recipe.ts';
import { surveyDirections, surveyErrors, surveyGradients, surveySpectra } from './adapt-survey.ts';
import { openModelSource } from './artifacts/model-source.ts';
import { RecipeError } from './errors.ts';
import type { Forward } from './expert-teachers.ts';
import { type Directions, evaRanks } from './methods/rank/eva.ts';
import { type GradientStep, goraImportance, goraMostRank, goraRanks, goraSteps, gradientStep } from './methods/rank/gora.ts';
import { greedyRanks } from './methods/rank/greedy.ts';
import { lamdaRanks } from './methods/rank/lamda.ts';
import { type SpendableBudget, uniformRank } from './methods/rank/rank-budget.ts';
import type { AdapterStart } from './methods/rank/training/options.ts';
import type { TrainedModule } from './methods/rank/training/schedule.ts';
import type { WeightReader } from './model/model.ts';
import type { RunHooks } from './run.ts';

/** A start, and the lengths of its first step that are to be tried on held-out text, where the method takes one; absent: as it is. */
export interface FoundStart extends AdapterStart {
  readonly steps?: readonly number[];
}

export interface StartJob {
  readonly recipe: AdaptRecipe;
  readonly forward: Forward;
  readonly weights: WeightReader;
  readonly modules: readonly TrainedModule[];
  readonly budget: SpendableBudget;
  readonly training: readonly Int32Array[];
  readonly progress: RunHooks['progress'];
}

/** The most ranks that qerror and lamda++ look at, in means of the budget. */
const MOST_OF_MEAN = 8;

/** Undefined for a method that starts from random factors of ranks of its own. Throws RecipeError for a float model that does not fit. */
export async function findStart(job: StartJob): Promise<FoundStart | undefined> {
  const { method, init } = job.recipe;
  if (method === 'gora') return await goraStart(job);
  if (method === 'lamda++') return await lamdaStart(job);
  if (method === 'qerror') return await errorStart(job);
  return method === 'eva' || init === 'eva' ? await evaStart(job) : undefined;
}

/** EVA's ranks and factors, or one rank for all with EVA's factors. */
async function evaStart({ recipe, forward, weights, modules, budget, training, progress }: StartJob): Promise<FoundStart> {
  const found = await surveyDirections(forward, weights, modules, budget, training, progress);
  const layers = modules.map((module) => ({ ...module, ratios: found.get(module.name)!.ratios }));
  const rank = uniformRank(budget, modules);
  const ranks =
    recipe.method === 'eva' ? evaRanks(layers, budget, recipe.preset) : new Map(modules.map(({ name }) => [name, rank]));
  return { ranks, loraA: (name, own) => firstRows(found.get(name)!, own) };
}

/** A layer may have fewer directions than ranks: the rest of it stays at nothing, and learns. */
function firstRows({ directions, ratios }: Directions, rank: number): Float32Array {
  const n = directions.length / Math.max(1, ratios.length);
  const rows = new Float32Array(rank * n);
  rows.set(directions.subarray(0, Math.min(rank, ratios.length) * n));
  return rows;
}

async function goraStart({ recipe, forward, weights, modules, budget, training, progress }: StartJob): Promise<FoundStart> {
  const { preset, seed } = recipe;
  const most = goraMostRank(budget, modules, preset);
  const importance = new Map<string, number>();
  const steps = new Map<string, GradientStep>();
  await surveyGradients(
    forward,
    weights,
    modules,
    training,
    progress,
    async ({ name, outFeatures, inFeatures }, weight, gradient) => {
      importance.set(name, goraImportance(weight, gradient));
      const matrix = { rows: outFeatures, columns: inFeatures, data: gradient };
      steps.set(name, await gradientStep(forward.blas, matrix, most, preset, { seed, name }));
    },
  );
  const layers = modules.map((module) => ({ ...module, importance: importance.get(module.name)! }));
  return {
    ranks: goraRanks(layers, budget, preset),
    loraA: (name, rank) => steps.get(name)!.factors(rank).loraA,
    loraB: (name, rank) => steps.get(name)!.factors(rank).loraB,
    steps: goraSteps(preset),
  };
}

async function lamdaStart({ recipe, forward, weights, modules, budget, progress }: StartJob): Promise<FoundStart> {
  const found = await surveySpectra(forward, weights, modules, mostRank(budget, modules), progress);
  const layers = modules.map((module) => {
    const { ratios } = found.get(module.name)!;
    return {
      ...module,
      most: ratios.length,
      energy: (rank: number) => ratios.slice(0, rank).reduce((sum, value) => sum + value, 0),
    };
  });
  return { ranks: lamdaRanks(layers, budget, recipe.invert), loraA: (name, rank) => firstRows(found.get(name)!, rank) };
}

async function errorStart({ recipe, forward, weights, modules, budget, training, progress }: StartJob): Promise<FoundStart> {
  await using original = await openModelSource(recipe.against!);
  if (original.kind !== 'float')
    throw new RecipeError(`--against ${recipe.against}: is quantized itself (layout ${original.kind}); give the float model`);
  const shapes = new Map(original.model.blocks.flatMap(({ sites }) => sites.map((site) => [site.name, site])));
  for (const { name, outFeatures, inFeatures } of modules) {
    const site = shapes.get(name);
    if (site?.outFeatures === outFeatures && site.inFeatures === inFeatures) continue;
    const other = site ? `${site.outFeatures} x ${site.inFeatures}` : 'not there';
    throw new RecipeError(`--against ${recipe.against}: "${name}" is ${outFeatures} x ${inFeatures}, but ${other} in it`);
  }
  const most = mostRank(budget, modules);
  const found = await surveyErrors(forward, weights, original.weights, modules, most, training, progress);
  const choices = modules.map((module) => ({
    name: module.name,
    cost: budget.cost(module),
    gains: found.get(module.name)!.gains,
  }));
  return {
    ranks: greedyRanks(choices, budget.total),
    loraA: (name, rank) => {
      const { gains, loraA } = found.get(name)!;
      return firstRows({ directions: loraA, ratios: gains }, rank);
    },
    loraB: (name, rank) => {
      const { gains, loraB } = found.get(name)!;
      const m = loraB.length / Math.max(1, gains.length);
      const columns = new Float32Array(m * rank);
      for (let i = 0; i < m; i++) {
        columns.set(loraB.subarray(i * gains.length, i * gains.length + Math.min(rank, gains.length)), i * rank);
      }
      return columns;
    },
  };
}

function mostRank(budget: SpendableBudget, modules: readonly TrainedModule[]): number {
  const mean = budget.total / modules.reduce((sum, module) => sum + budget.cost(module), 0);
  return Math.max(1, Math.round(MOST_OF_MEAN * mean));
}
