/** A budget as the user gives it, in bits of whatever it counts, and shared out over a surveyed model. */
import { type BudgetUnit, groupBits } from './artifacts/group-bits.ts';
import { RecipeError } from './errors.ts';
import { type Allocation, allocate } from './methods/quantize/allocation/allocate.ts';
import { BudgetError } from './methods/quantize/allocation/frontier.ts';
import type { Repair } from './methods/quantize/allocation/joint.ts';
import type { BitAllocation, SitePlan, TransformKind } from './methods/quantize/quantizer.ts';
import type { LinearSite } from './model/model.ts';
import { choiceSets, type ModelSurvey } from './quantize-survey.ts';
import type { QuantizeRecipe } from './recipe.ts';
import { formatSize } from './size.ts';

/** Part of a budget that counts files, kept for the padding of rows. */
const PADDING = 0.002;

/** Widths files hold at their true size; those a compact ONNX file does; and the widths of a runtime's operands, all or those of `--onnx-container 4`: others take the room of the next of these. */
const ALL_WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8];
const COMPACT_WIDTHS = [1, 2, 3, 4, 8];
const OPERAND_WIDTHS = [2, 4, 8];
const WIDE_OPERANDS = [4, 8];

/** A budget in bits, and how to say such bits the user's way. */
export interface BitBudget {
  readonly unit: BudgetUnit;
  readonly bits: number;
  /** `--bits 2.25` */
  say(bits: number): string;
}

/** What is paid whatever the widths are, in bytes: float tensors and quantized embeddings. */
export interface FixedCosts {
  /** Weights to be quantized. */
  readonly weights: number;
  /** Bytes of the weight files that do not depend on the widths. */
  readonly fileBytes: number;
  /** Bytes of operands outside the blocks, as the runtime holds them. */
  readonly runtimeBytes: number;
}

/** Widths the allocator may choose from: those that do not waste room in what the budget counts. */
export function candidateWidths({ formats, compact, runtimeMemory, onnxContainer }: QuantizeRecipe): readonly number[] {
  if (!formats.includes('onnx')) return ALL_WIDTHS;
  if (compact && runtimeMemory === undefined) return COMPACT_WIDTHS;
  return onnxContainer === '4' ? WIDE_OPERANDS : OPERAND_WIDTHS;
}

/** What files are counted by: the first format asked for. */
export function fileUnit({ formats, compact }: QuantizeRecipe): BudgetUnit {
  if (formats[0] !== 'onnx') return 'planes';
  return compact ? 'onnx' : 'onnx-plain';
}

/** The budget of a recipe that has one in bits or bytes. */
export function bitBudget(recipe: QuantizeRecipe, fixed: FixedCosts): BitBudget {
  const { weights } = fixed;
  if (recipe.bits !== undefined) {
    return { unit: 'code', bits: recipe.bits * weights, say: (bits) => `--bits ${ceil4(bits / weights)}` };
  }
  const unit = fileUnit(recipe);
  if (recipe.bpw !== undefined) {
    const say = (bits: number) => `--bpw ${ceil4(bits / (1 - PADDING) / weights)}`;
    return { unit, bits: recipe.bpw * weights * (1 - PADDING), say };
  }
  if (recipe.size !== undefined) {
    const bits = 8 * (recipe.size - fixed.fileBytes) * (1 - PADDING);
    return { unit, bits, say: (value) => `--size ${Math.ceil(fixed.fileBytes + value / (1 - PADDING) / 8)}` };
  }
  const memory = recipe.runtimeMemory;
  if (memory === undefined) throw new Error('the recipe has no budget in bits or bytes');
  const bits = 8 * (memory - fixed.runtimeBytes);
  return { unit: 'runtime', bits, say: (value) => `--runtime-memory ${Math.ceil(fixed.runtimeBytes + value / 8)}` };
}

/** Four digits, rounded so that the printed value is feasible. */
function ceil4(value: number): string {
  return (Math.ceil(value * 1e4) / 1e4).toString();
}

interface SiteShare {
  readonly transform: TransformKind;
  /** For its codes. */
  readonly budget: number;
  /** Where ranks are paid from the same budget and it got some. */
  readonly rank?: number;
}

/** A shared-out budget, as it is kept for a resumed run. */
export interface SharedBudget {
  readonly unit: BudgetUnit;
  readonly widths: readonly number[];
  readonly sites: Readonly<Record<string, SiteShare>>;
  /** What the survey predicts, in nats where sensitivities were measured. */
  readonly predictedLoss: number;
  /** No allocation of this budget could be predicted to lose less. */
  readonly bound: number;
  /** What a unit of each site's loss costs the model. */
  readonly sensitivities: Readonly<Record<string, number>>;
}

/** Times a plan that turned out too large is made again. */
const ROUNDS = 6;

/** Shares a budget out; `sizeOf` tells in bits what a plan takes in all, in the unit of the budget; absent: padding is not counted; `repairs`: ranks may be bought from it too. Throws RecipeError with the nearest feasible budget. */
export function shareBudget(
  survey: ModelSurvey,
  widths: readonly number[],
  groupSize: number,
  budget: BitBudget,
  sizeOf?: (plan: ReadonlyMap<string, SitePlan>) => number,
  repairs?: ReadonlyMap<string, Repair>,
): SharedBudget {
  // What rows and words are padded with depends on all widths together: what a plan really takes is only known when there is one.
  let bits = budget.bits;
  for (let round = 0; ; round++) {
    const { shared, plan } = shareOnce(survey, widths, groupSize, { ...budget, bits }, repairs);
    const excess = budget.unit === 'code' || !sizeOf ? 0 : sizeOf(plan) - budget.bits;
    if (excess <= 0 || round === ROUNDS) return shared;
    bits -= excess + PADDING * budget.bits;
  }
}

function shareOnce(
  survey: ModelSurvey,
  widths: readonly number[],
  groupSize: number,
  budget: BitBudget,
  repairs: ReadonlyMap<string, Repair> | undefined,
): { shared: SharedBudget; plan: Map<string, SitePlan> } {
  const sets = choiceSets(survey, widths, groupSize, budget.unit, repairs);
  let allocation: Allocation;
  try {
    allocation = allocate(sets, budget.bits);
  } catch (error) {
    if (!(error instanceof BudgetError)) throw error;
    throw outOfReach(budget, groupSize, error.least, error.most);
  }
  const sites: Record<string, SiteShare> = {};
  const plan = new Map<string, SitePlan>();
  for (const { label, members } of allocation.sets) {
    const transform = label as TransformKind;
    for (const { name, size, bits, rank: own } of members) {
      const rank = own === 0 ? {} : { rank: own };
      sites[name] = { transform, budget: size, ...rank };
      plan.set(name, { groupSize, bits, ...(transform === 'none' ? {} : { transform }), ...rank });
    }
  }
  const { loss: predictedLoss, bound } = allocation;
  const sensitivities = Object.fromEntries(survey.sensitivities);
  return { shared: { unit: budget.unit, widths, sites, predictedLoss, bound, sensitivities }, plan };
}

/** As methods take it. */
export function allocationOf({ unit, widths, sites }: SharedBudget): BitAllocation {
  return {
    widths,
    sizeOf: (rows, columns, bits) => groupBits(unit, rows, columns, bits),
    sites: new Map(Object.entries(sites)),
  };
}

/** Refuses before any work what no widths can reach. @param sites layers to quantize */
export function checkBudget(recipe: QuantizeRecipe, fixed: FixedCosts, sites: readonly LinearSite[]): void {
  if (recipe.maxLoss !== undefined) return;
  if (recipe.size !== undefined && recipe.size <= fixed.fileBytes) {
    throw new RecipeError(
      `--size ${recipe.size}: what stays in float takes ${Math.ceil(fixed.fileBytes)} bytes (${formatSize(fixed.fileBytes)}) alone; --embeddings 4 or 8 makes that smaller`,
    );
  }
  const budget = bitBudget(recipe, fixed);
  const widths = candidateWidths(recipe);
  const total = (width: number): number => {
    let bits = 0;
    for (const { inFeatures, outFeatures } of sites) {
      for (let start = 0; start < inFeatures; start += recipe.groupSize) {
        bits += groupBits(budget.unit, outFeatures, Math.min(recipe.groupSize, inFeatures - start), width);
      }
    }
    return bits;
  };
  const [least, most] = [total(widths[0]), total(widths[widths.length - 1])];
  if (budget.bits < least) throw outOfReach(budget, recipe.groupSize, least, most);
}

function outOfReach(budget: BitBudget, groupSize: number, least: number, most: number): RecipeError {
  return new RecipeError(
    `${budget.say(budget.bits)}: below what groups of ${groupSize} can reach; the smallest is ${budget.say(least)}, and beyond ${budget.say(most)} nothing is gained`,
  );
}
