/** `--max-loss`: the smallest artifact whose perplexity on held-out text rises by no more, by quantizing and evaluating a few times. */
import type { PartDetails, PartStore } from '../../artifacts/parts.ts';
import { RecipeError } from '../../errors.ts';
import { dequantize } from '../../methods/quantize/quantized-linear.ts';
import type { BitPlan } from '../../methods/quantize/quantizer.ts';
import type { WeightReader } from '../../model/model.ts';
import type { Score } from '../evaluate/scoring.ts';
import type { RunHooks } from '../run.ts';
import { type BitBudget, budgetCurve, candidateWidths, fileUnit, type SharedBudget, shareBudget } from './bit-budget.ts';
import { decoded } from './blocks.ts';
import { predictSizes } from './estimate.ts';
import type { QuantizeJob } from './job.ts';
import { MAX_ROUNDS, searchStep } from './loss-search.ts';
import { onnxStorageOf, type QuantizeRecipe } from './recipe.ts';
import type { ModelSurvey } from './survey.ts';

/** One artifact that was made and evaluated. */
export interface LossRound {
  /** All stored bits of the quantized layers over their weights. */
  readonly bitsPerWeight: number;
  readonly averageBits: number;
  /** What its quantized modules take in the weight files. */
  readonly quantizedBytes: number;
  /** On the held-out text. */
  readonly perplexity: number;
  /** Part by which the perplexity rose. */
  readonly rise: number;
}

/** What a search measured. */
export interface LossSearch {
  readonly maxLoss: number;
  /** Scored tokens that were held out of the calibration text. */
  readonly heldOutTokens: number;
  /** The float model's, on the held-out text. */
  readonly perplexity: number;
  /** In the order they were made. */
  readonly rounds: readonly LossRound[];
  /** Index of the round that became the artifact. */
  readonly kept: number;
}

/** What a search needs of the run it is in. */
export interface LossBudgetRun {
  readonly job: QuantizeJob;
  /** Where findings and rounds are stored. */
  readonly parts: PartStore;
  readonly survey: ModelSurvey;
  readonly hooks: RunHooks;
  /** Quantizes what `parts` does not have yet. */
  readonly quantize: (parts: PartStore, shared: SharedBudget, hooks: RunHooks) => Promise<void>;
  /** Of a model with these weights, on the held-out windows. */
  readonly evaluate: (weights: WeightReader) => Promise<Score>;
  readonly onStored: () => Promise<void>;
}

/** A round as it is stored. */
interface StoredRound extends LossRound {
  /** Bits it was given. */
  readonly size: number;
  readonly nll: number;
}

/** Searches. Throws RecipeError with the nearest feasible part when even the widest widths lose more. */
export async function searchLossBudget(
  run: LossBudgetRun,
): Promise<{ readonly parts: PartStore; readonly shared: SharedBudget; readonly search: LossSearch }> {
  const { job, parts, survey, hooks } = run;
  const { source, recipe } = job;
  const maxLoss = recipe.maxLoss!;
  const curve = budgetCurve(survey, candidateWidths(recipe), roundBudget(recipe, 0));
  const original = await remembered<Score>(run, 'original', () => run.evaluate(source.weights));
  const rounds: StoredRound[] = [];
  for (;;) {
    const measured = rounds.map(({ size, nll }) => ({ size, rise: nll - original.nll }));
    const step = searchStep(curve, Math.log1p(maxLoss), measured);
    if ('size' in step) {
      const index = rounds.length;
      rounds.push(await remembered(run, `round-${index}`, () => makeRound(run, index, step.size, original)));
      const { bitsPerWeight, rise } = rounds[index];
      hooks.note?.(`round ${index + 1}: ${bitsPerWeight.toFixed(3)} bits a weight, perplexity ${percent(rise)} up`);
      await dropBeaten(parts, rounds, maxLoss);
      continue;
    }
    if (step.kept === undefined) throw outOfReach(maxLoss, rounds);
    if (rounds[step.kept].size === curve[0].size) {
      hooks.note?.(
        `--max-loss ${percent(maxLoss)}: met by the smallest artifact there is, which loses ${percent(rounds[step.kept].rise)}`,
      );
    }
    const kept = await parts.round(step.kept);
    const shared = kept.allocation as unknown as SharedBudget;
    const reported = rounds.map(({ size: _, nll: __, ...round }) => round);
    const { perplexity, tokens } = original;
    return { parts: kept, shared, search: { maxLoss, heldOutTokens: tokens, perplexity, rounds: reported, kept: step.kept } };
  }
}

function roundBudget(recipe: QuantizeRecipe, bits: number): BitBudget {
  return { unit: fileUnit(recipe), container: onnxStorageOf(recipe).container, bits, say: (value) => `${value} bits` };
}

async function makeRound(run: LossBudgetRun, index: number, size: number, original: Score): Promise<StoredRound> {
  const { job, survey, hooks } = run;
  const { source, recipe } = job;
  const parts = await run.parts.round(index);
  let shared = parts.allocation as unknown as SharedBudget | undefined;
  if (shared === undefined) {
    shared = await shareBudget(survey, candidateWidths(recipe), roundBudget(recipe, size));
    await parts.addAllocation(shared as unknown as PartDetails);
  }
  const phase = `round ${index + 1} of at most ${MAX_ROUNDS}`;
  const progress: RunHooks['progress'] = (event) => hooks.progress?.({ ...event, phase: `${phase}: ${event.phase}` });
  await run.quantize(parts, shared, { ...hooks, progress });
  const { nll, perplexity } = await run.evaluate(asMade(source.weights, parts, job));
  const plans = planOf(job, parts);
  const linears = new Map([...job.expected.keys()].map((site) => [site, plans.modules[site.name]]));
  const sizes = predictSizes(source, linears, job.expectedEmbeddings, recipe.formats[0], onnxStorageOf(recipe));
  const { averageBits, bitsPerWeight, quantizedBytes } = sizes;
  return { size, nll, perplexity, rise: perplexity / original.perplexity - 1, averageBits, bitsPerWeight, quantizedBytes };
}

/** Widths of the finished blocks. */
function planOf({ source }: QuantizeJob, parts: PartStore): BitPlan {
  const blocks = source.model.blocks.map(
    ({ index }) => parts.blockDetails(index) as { sites: Record<string, { plan: BitPlan['modules'][string] }> },
  );
  return {
    modules: Object.fromEntries(blocks.flatMap(({ sites }) => Object.entries(sites).map(([name, { plan }]) => [name, plan]))),
  };
}

/** What was found under that name before a resume, else what `find` finds. */
async function remembered<T extends object>(run: LossBudgetRun, name: string, find: () => Promise<T>): Promise<T> {
  const known = run.parts.finding(name);
  if (known !== undefined) return known as T;
  const found = await find();
  await run.parts.addFinding(name, found as PartDetails);
  await run.onStored();
  return found;
}

/** Keeps the weights of the smallest round that met the tolerance only. */
async function dropBeaten(parts: PartStore, rounds: readonly StoredRound[], maxLoss: number): Promise<void> {
  const best = Math.min(...rounds.filter(({ rise }) => rise <= maxLoss).map(({ size }) => size));
  for (const [index, { size, rise }] of rounds.entries()) {
    if (rise > maxLoss || size > best) await parts.dropRound(index);
  }
}

/** The model as an artifact of `parts` is: quantized layers and tables decoded. */
function asMade(weights: WeightReader, parts: PartStore, { source, expectedEmbeddings }: QuantizeJob): WeightReader {
  const tables = new Set([...expectedEmbeddings.keys()].map(({ name }) => `${name}.weight`));
  const sites = decoded(weights, parts);
  // Rows are asked for a few at a time.
  let last: { readonly name: string; readonly data: Promise<Float32Array> } | undefined;
  const table = (name: string) => {
    if (last?.name !== name) last = { name, data: parts.read(name.slice(0, -'.weight'.length)).then(dequantize) };
    return last.data;
  };
  return {
    ...sites,
    load: (name) => (tables.has(name) ? table(name) : sites.load(name)),
    loadRows: async (name, start, end) => {
      if (!tables.has(name)) return await sites.loadRows(name, start, end);
      const { hiddenSize } = source.model.shape;
      return (await table(name)).subarray(start * hiddenSize, end * hiddenSize);
    },
  };
}

function outOfReach(maxLoss: number, rounds: readonly LossRound[]): RecipeError {
  const [{ rise, bitsPerWeight }] = rounds.toSorted((a, b) => a.rise - b.rise);
  const nearest = Math.ceil(rise * 1e4) / 100;
  return new RecipeError(
    `--max-loss ${percent(maxLoss)}: even ${bitsPerWeight.toFixed(2)} bits a weight lose ${percent(rise)} on the held-out text; the nearest that can be met is --max-loss ${nearest}%`,
  );
}

/** `4.27 %` */
export function percent(part: number): string {
  return `${Number((100 * part).toPrecision(3))} %`;
}
