/** What an adapter begins with: ranks and first factors, as the method of the recipe finds them on the model and the text. */

import type { Matrix } from '../../compute/blas.ts';
import { leadingQr, type QrFactors } from '../../compute/linalg/qr.ts';
import { type Directions, evaRanks } from '../../methods/rank/eva.ts';
import { allocateExperts } from '../../methods/rank/experts.ts';
import { type GradientStep, goraImportance, goraMostRank, goraRanks, goraSteps, gradientStep } from '../../methods/rank/gora.ts';
import { lamdaRanks } from '../../methods/rank/lamda.ts';
import { type SpendableBudget, uniformRank } from '../../methods/rank/rank-budget.ts';
import { type SolvedRanks, solveRanks } from '../../methods/rank/solve.ts';
import { SURROGATES } from '../../methods/rank/surrogate/index.ts';
import type { AdapterStart } from '../../methods/rank/training/options.ts';
import type { TrainedModule } from '../../methods/rank/training/schedule.ts';
import type { LinearSite, WeightReader } from '../../model/model.ts';
import { rowNorms } from '../../model/row-norms.ts';
import type { Forward } from '../forward.ts';
import type { RunHooks } from '../run.ts';
import { openOriginal } from './original.ts';
import type { AdaptRecipe } from './recipe.ts';
import { type SurrogateReport, surrogateStart } from './surrogate.ts';
import { surveyDirections, surveyErrors, surveyGradients, surveySpectra } from './survey.ts';

/** A start, and the lengths of its first step that are to be tried on held-out text, where the method takes one; absent: as it is. */
export interface FoundStart extends AdapterStart {
  /** How well ranks were shared out by gains, where they were. */
  readonly solved?: Omit<SolvedRanks, 'ranks'>;
  readonly steps?: readonly number[];
  /** What stands in for training, where nothing is trained. */
  readonly surrogate?: SurrogateReport;
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

/** Experts of the quarters of the depth: more in the middle, as the last version of MoLA's paper has it; TMoE has four everywhere. */
const USUAL_PROFILES = { topk: [2, 8, 8, 2], soft: [4] } as const;
const USUAL_TOP_K = 2;

/** The most ranks that qerror and lamda++ look at, in means of the budget. */
const MOST_OF_MEAN = 8;

/** Undefined for a method that starts from random factors of ranks of its own. Throws RecipeError for a float model that does not fit. */
export async function findStart(job: StartJob): Promise<FoundStart | undefined> {
  const { init, dora } = job.recipe;
  const found = await methodStart(job);
  if (init === 'pissa' || init === 'olora' || init === 'loftq') return await weightStart(job, init, found?.ranks);
  if (!dora) return found;
  const norms = new Map<string, Float32Array>();
  for await (const [site, weight] of weightsOf(job)) norms.set(site.name, Float32Array.from(rowNorms(weight, site.outFeatures)));
  return { ranks: alike(job), ...found, magnitude: (name) => norms.get(name)!.slice() };
}

async function methodStart(job: StartJob): Promise<FoundStart | undefined> {
  const { method, init, steps } = job.recipe;
  if (steps === 0 && isSurrogate(method)) return await surrogateStart(job, method, SURROGATES[method]);
  if (method === 'gora') return await goraStart(job);
  if (method === 'lamda++' || method === 'lamda') return await lamdaStart(job);
  if (method === 'qerror') return await errorStart(job);
  if (method === 'mola') return await expertStart(job);
  return method === 'eva' || init === 'eva' ? await evaStart(job) : undefined;
}

function isSurrogate(method: string): method is keyof typeof SURROGATES {
  return method in SURROGATES;
}

/** One rank for all layers. */
function alike({ budget, modules }: Pick<StartJob, 'budget' | 'modules'>): Map<string, number> {
  const rank = uniformRank(budget, modules);
  return new Map(modules.map(({ name, outFeatures, inFeatures }) => [name, Math.min(rank, outFeatures, inFeatures)]));
}

async function* weightsOf({ forward, weights, modules }: StartJob): AsyncGenerator<[LinearSite, Float32Array]> {
  const wanted = new Set(modules.map(({ name }) => name));
  for (const { sites } of forward.model.blocks) {
    forward.signal?.throwIfAborted();
    for (const site of sites) if (wanted.has(site.name)) yield [site, await weights.loadSite(site)];
  }
}

/**
 * Factors out of the weights themselves, one rank for all or the ranks that the method found. PiSSA (arXiv 2404.02948): U sqrt(S) and sqrt(S) V^T of the
 * weight. OLoRA (arXiv 2406.01775): the first columns of Q and rows of R. LoftQ (arXiv 2310.08659), one round on the base as it is: as PiSSA, of what
 * quantization lost, which is added and not taken out.
 */
async function weightStart(
  job: StartJob,
  init: 'pissa' | 'olora' | 'loftq',
  found: ReadonlyMap<string, number> | undefined,
): Promise<FoundStart> {
  const { recipe, forward, weights, modules, progress } = job;
  const ranks = found ?? alike(job);
  const most = Math.max(1, ...ranks.values());
  if (init === 'olora') {
    const factors = new Map<string, QrFactors>();
    for await (const [{ name, outFeatures, inFeatures }, data] of weightsOf(job))
      factors.set(name, leadingQr({ rows: outFeatures, columns: inFeatures, data }, ranks.get(name)!));
    return {
      ranks,
      subtracted: true,
      loraA: (name) => factors.get(name)!.r.slice(),
      loraB: (name) => factors.get(name)!.q.slice(),
    };
  }
  await using original = init === 'loftq' ? await openOriginal(recipe.against!, modules) : undefined;
  const spectra = await surveySpectra(forward, weights, modules, most, progress, original?.weights);
  return {
    ranks,
    subtracted: init === 'pissa',
    loraA: (name, rank) => {
      const { values } = spectra.get(name)!;
      const n = modules.find((module) => module.name === name)!.inFeatures;
      return firstRows(spectra.get(name)!, rank).map((value, i) => value * Math.sqrt(values[Math.floor(i / n)] ?? 0));
    },
    loraB: (name, rank) => {
      const { values, left } = spectra.get(name)!;
      return firstColumns(left, rank).map((value, i) => value * Math.sqrt(values[i % rank] ?? 0));
    },
  };
}

/** EVA's ranks and factors, or one rank for all with EVA's factors. */
async function evaStart({ recipe, forward, weights, modules, budget, training, progress }: StartJob): Promise<FoundStart> {
  const found = await surveyDirections(forward, weights, modules, budget, training, progress);
  const layers = modules.map((module) => ({ ...module, ratios: found.get(module.name)!.ratios }));
  const loraA = (name: string, own: number) => firstRows(found.get(name)!, own);
  if (recipe.method !== 'eva') return { ranks: alike({ budget, modules }), loraA };
  if (recipe.preset === 'paper') return { ranks: evaRanks(layers, budget), loraA };
  const gains = new Map(layers.map(({ name, ratios }) => [name, ratios]));
  return { ...shared({ recipe, forward, modules, budget }, gains), loraA };
}

/** Ranks by what each of them gains, by the rules of the recipe. */
function shared(
  { recipe, forward, modules, budget }: Pick<StartJob, 'recipe' | 'forward' | 'modules' | 'budget'>,
  gains: ReadonlyMap<string, ArrayLike<number>>,
): Pick<FoundStart, 'ranks' | 'solved'> {
  const { rMin: least, rMax: most, rankMultiple: multiple, solver, tieInputs } = recipe;
  const inputs = new Map(forward.model.blocks.flatMap(({ sites }) => sites.map(({ name, input }) => [name, input])));
  const choices = modules.map((module) => ({
    name: module.name,
    cost: budget.cost(module),
    gains: gains.get(module.name)!,
    ...(tieInputs ? { tie: inputs.get(module.name)! } : {}),
  }));
  const { ranks, ...solved } = solveRanks(choices, budget.total, { least, most, multiple, solver });
  return { ranks, solved };
}

/** A layer may have fewer directions than ranks: the rest of it stays at nothing, and learns. */
function firstRows({ directions, ratios }: Directions, rank: number): Float32Array {
  const n = directions.length / Math.max(1, ratios.length);
  const rows = new Float32Array(rank * n);
  rows.set(directions.subarray(0, Math.min(rank, ratios.length) * n));
  return rows;
}

function firstColumns({ rows, columns, data }: Matrix, rank: number): Float32Array {
  const kept = new Float32Array(rows * rank);
  for (let i = 0; i < rows; i++) kept.set(data.subarray(i * columns, i * columns + Math.min(rank, columns)), i * rank);
  return kept;
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
    async ({ name, outFeatures, inFeatures }, gradient, weight) => {
      importance.set(name, goraImportance(await weight(), gradient));
      const matrix = { rows: outFeatures, columns: inFeatures, data: gradient };
      steps.set(name, await gradientStep(forward.blas, matrix, most, preset, { seed, name }));
    },
  );
  const layers = modules.map((module) => ({ ...module, importance: importance.get(module.name)! }));
  return {
    ranks: goraRanks(layers, budget, preset, { least: recipe.rMin, most: recipe.rMax }),
    loraA: (name, rank) => steps.get(name)!.factors(rank).loraA,
    loraB: (name, rank) => steps.get(name)!.factors(rank).loraB,
    steps: goraSteps(preset),
  };
}

/** Experts by a profile over the blocks, or by what gradients say of them. */
async function expertStart({ recipe, forward, weights, modules, budget, training, progress }: StartJob): Promise<FoundStart> {
  const blocks = forward.model.blocks.length;
  const { router: routing = 'topk', topK = USUAL_TOP_K, expertRank: rank } = recipe;
  const profile = recipe.profile ?? USUAL_PROFILES[routing];
  const importance = new Array<number>(blocks).fill(0);
  if (profile === 'auto') {
    await surveyGradients(forward, weights, modules, training, progress, async (module, gradient, weight) => {
      importance[module.block] += goraImportance(await weight(), gradient);
    });
  }
  const options = { blocks, routing, topK, rank, budget };
  const shapes = allocateExperts(
    modules,
    profile === 'auto' ? { ...options, profile: [1], importance } : { ...options, profile },
  );
  return {
    ranks: new Map([...shapes].map(([name, { experts, rank: own }]) => [name, experts * own])),
    routed: (name) => shapes.get(name)!,
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
  return {
    ranks: recipe.method === 'lamda' ? alike({ budget, modules }) : lamdaRanks(layers, budget, recipe.invert),
    loraA: (name, own) => firstRows(found.get(name)!, own),
    // Untrained, the left directions would change the model.
    ...(recipe.steps > 0 ? { loraB: (name: string, own: number) => firstColumns(found.get(name)!.left, own) } : {}),
  };
}

async function errorStart({ recipe, forward, weights, modules, budget, training, progress }: StartJob): Promise<FoundStart> {
  await using original = await openOriginal(recipe.against!, modules);
  const most = mostRank(budget, modules);
  const found = await surveyErrors(forward, weights, original.weights, modules, most, training, progress);
  const gains = new Map(modules.map(({ name }) => [name, found.get(name)!.gains]));
  return {
    ...shared({ recipe, forward, modules, budget }, gains),
    loraA: (name, rank) => {
      const { gains, loraA } = found.get(name)!;
      return firstRows({ directions: loraA, ratios: gains }, rank);
    },
    loraB: (name, rank) => {
      const { gains, loraB } = found.get(name)!;
      return firstColumns({ rows: loraB.length / Math.max(1, gains.length), columns: gains.length, data: loraB }, rank);
    },
  };
}

function mostRank(budget: SpendableBudget, modules: readonly TrainedModule[]): number {
  const mean = budget.total / modules.reduce((sum, module) => sum + budget.cost(module), 0);
  return Math.max(1, Math.round(MOST_OF_MEAN * mean));
}
