/** A budget as the user gives it, in bits of whatever it counts, and shared out over a surveyed model. */
import { type BudgetUnit, type Counted, layerSizes, type PartBytes, rotationBits } from '../../artifacts/layer-sizes.ts';
import type { OnnxContainer } from '../../artifacts/onnx/linear-layout.ts';
import { RecipeError } from '../../errors.ts';
import { type Allocation, allocate, type CurvePoint, lossCurve } from '../../methods/quantize/allocation/allocate.ts';
import type { ChoiceSet } from '../../methods/quantize/allocation/hull.ts';
import type { Repair } from '../../methods/quantize/allocation/joint.ts';
import { type FactorStorage, factorBits, factorStorage } from '../../methods/quantize/low-rank.ts';
import { groupCount } from '../../methods/quantize/quantized-linear.ts';
import { type Assignment, type BitAllocation, rotates, type SitePlan } from '../../methods/quantize/quantizer.ts';
import type { LinearSite } from '../../model/model.ts';
import { groupSizesOf, onnxStorageOf, type QuantizeRecipe } from './recipe.ts';
import { choiceLabel, choiceSets, type ModelSurvey } from './survey.ts';

/** Widths files hold at their true size; those a compact ONNX file does; and the widths of a runtime's operands, all or those of `--onnx-container 4`: others take the room of the next of these. */
const ALL_WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8];
const COMPACT_WIDTHS = [1, 2, 3, 4, 8];
const OPERAND_WIDTHS = [2, 4, 8];
const WIDE_OPERANDS = [4, 8];

/** Layers with what is planned for them. */
export type PlannedSites = readonly (readonly [LinearSite, SitePlan])[];

/** Where a budget counts whole files: what is in them beside the layers' constants. */
export interface FileCounts {
  readonly partBytes: PartBytes;
  /** Bytes of all weight files with these plans, and a little for what comes out otherwise once widths are decided anew. */
  bytesOf(plans: PlannedSites): Promise<number>;
}

/** Bits of a branch's parameter in the file that sizes are told of. */
export function branchBits(recipe: QuantizeRecipe): number {
  return factorBits(branchStorage(recipe));
}

/** How its factors are stored there. Operands that are whole in the file have float32 beside them. */
export function branchStorage({ formats, compact, lowrankBits }: QuantizeRecipe): FactorStorage {
  return formats[0] === 'onnx' && !compact ? 'F32' : factorStorage(lowrankBits);
}

/** A budget in bits, and how to say such bits the user's way. */
export interface BitBudget {
  readonly unit: BudgetUnit;
  /** Operands of ONNX files. */
  readonly container: OnnxContainer;
  readonly bits: number;
  /** Absent: only the quantized layers are counted. */
  readonly files?: FileCounts | undefined;
  /** `--bits 2.25` */
  say(bits: number): string;
}

/** What is paid whatever the widths are, in bytes: float tensors and quantized embeddings. */
export interface FixedCosts {
  /** Weights to be quantized. */
  readonly weights: number;
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

/** The budget of a recipe that has one in bits or bytes. @param files where it has one in bytes of files */
export function bitBudget(recipe: QuantizeRecipe, fixed: FixedCosts, files: FileCounts | undefined): BitBudget {
  const { weights } = fixed;
  const { container } = onnxStorageOf(recipe);
  if (recipe.bits !== undefined) {
    return { unit: 'code', container, bits: recipe.bits * weights, say: (bits) => `--bits ${ceil4(bits / weights)}` };
  }
  const unit = fileUnit(recipe);
  if (recipe.bpw !== undefined) {
    return { unit, container, bits: recipe.bpw * weights, say: (bits) => `--bpw ${ceil4(bits / weights)}` };
  }
  if (recipe.size !== undefined) {
    return { unit, container, bits: 8 * recipe.size, files, say: (bits) => `--size ${Math.ceil(bits / 8)}` };
  }
  const memory = recipe.runtimeMemory;
  if (memory === undefined) throw new Error('the recipe has no budget in bits or bytes');
  const bits = 8 * (memory - fixed.runtimeBytes);
  return { unit: 'runtime', container, bits, say: (value) => `--runtime-memory ${Math.ceil(fixed.runtimeBytes + value / 8)}` };
}

/** Four digits, rounded so that the printed value is feasible. */
function ceil4(value: number): string {
  return (Math.ceil(value * 1e4) / 1e4).toString();
}

/** A shared-out budget, as it is kept for a resumed run. */
export interface SharedBudget extends Counted {
  readonly widths: readonly number[];
  /** `rank`: where ranks are paid from the same budget and it got some. */
  readonly sites: Readonly<Record<string, Assignment & { readonly rank?: number }>>;
  /** What the survey predicts, in nats where sensitivities were measured. */
  readonly predictedLoss: number;
  /** No allocation of this budget could be predicted to lose less. */
  readonly bound: number;
  /** What a unit of each site's loss costs the model. */
  readonly sensitivities: Readonly<Record<string, number>>;
}

/** Times that what an allocation left over, or took too much, is given to the next; and the part of a budget that is not worth another. */
const ROUNDS = 8;
const CLOSE = 2e-4;

/** Shares a budget out; `repairs`: ranks may be bought from it too. Throws RecipeError with the nearest feasible budget. */
export async function shareBudget(
  survey: ModelSurvey,
  widths: readonly number[],
  budget: BitBudget,
  repairs?: ReadonlyMap<string, Repair>,
): Promise<SharedBudget> {
  const { unit, container, files } = budget;
  const counted: Counted = { unit, container, ...(files && { partBytes: files.partBytes }) };
  const sizesOf = layerSizesOf(counted, widths);
  const sets = choiceSets(survey, widths, sizesOf, unit, { repairs, transformBytes: files?.partBytes.transforms });
  // What layers share, and what is beside them in a file, is known when their plans are.
  const take = async (allocation: Allocation): Promise<Taken> => {
    const sites = plannedSites(survey, allocation);
    const taken = files ? 8 * (await files.bytesOf(sites)) : allocation.size + rotationBits(unit, sites);
    return { allocation, sites, left: budget.bits - taken };
  };
  let best = await spend(sets, budget.bits, take);
  // Matrices that rotate inputs may take more than they are worth, or than there is.
  if (best.left < 0 || rotationBits(unit, best.sites) > CLOSE * budget.bits) {
    const still = await spend(unrotated(survey, sets), budget.bits, take);
    if (better(still, best)) best = still;
  }
  const { allocation, sites, left } = best;
  if (left < 0) {
    const groupSizes = survey.inputs.flatMap(({ survey: { transforms } }) => transforms.map(({ groupSize }) => groupSize));
    const smallest = budget.bits - left;
    throw outOfReach(budget, groupSizes, smallest, smallest + allocation.most - allocation.least);
  }
  return {
    ...counted,
    widths,
    sites: sharesOf(allocation, sites),
    predictedLoss: allocation.loss,
    bound: allocation.bound,
    sensitivities: Object.fromEntries(survey.sensitivities),
  };
}

/** An allocation, what it comes to, and what it leaves of the budget. */
interface Taken {
  readonly allocation: Allocation;
  readonly sites: PlannedSites;
  readonly left: number;
}

function better(one: Taken, other: Taken): boolean {
  if (other.left < 0) return one.left > other.left;
  return one.left >= 0 && one.allocation.loss < other.allocation.loss;
}

/** The least loss within a budget, or, with less than nothing left, the smallest allocation. */
async function spend(
  sets: readonly ChoiceSet[],
  budget: number,
  take: (allocation: Allocation) => Promise<Taken>,
): Promise<Taken> {
  const curve = lossCurve(sets);
  const [least, most] = [curve[0].size, curve[curve.length - 1].size];
  let best = await take(allocate(sets, least));
  // What is offered to the layers: `low` fits, `high` does not.
  let low = least;
  let high = best.left < 0 ? least : Infinity;
  let next = least + best.left;
  for (let round = 0; round < ROUNDS && high - low > 1; round++) {
    const offered = next > low && next < high ? next : Math.floor((low + Math.min(high, most)) / 2);
    const found = await take(allocate(sets, offered));
    if (found.left < 0) high = offered;
    else {
      low = offered;
      if (found.allocation.loss < best.allocation.loss) best = found;
      if (found.left <= CLOSE * budget || offered >= most) break;
    }
    next = found.allocation.size + found.left;
  }
  return best;
}

/** The sets of a survey less all choices that rotate an input, where it has others. */
function unrotated({ inputs }: ModelSurvey, sets: readonly ChoiceSet[]): ChoiceSet[] {
  return sets.map((set, i) => {
    const choices = set.choices.filter((_, k) => !rotates(inputs[i].survey.transforms[k].transform));
    return choices.length > 0 ? { ...set, choices } : set;
  });
}

/**
 * Budgets of files that `shareBudget` can meet, and what it may be predicted to lose with them: no more than this, for matrices of rotations, which
 * all inputs share, are paid for here only where there is no choice without.
 */
export function budgetCurve(
  survey: ModelSurvey,
  widths: readonly number[],
  { unit, container }: Omit<BitBudget, 'bits'>,
): CurvePoint[] {
  const sets = unrotated(survey, choiceSets(survey, widths, layerSizesOf({ unit, container }, widths), unit));
  const curve = lossCurve(sets);
  const shared = rotationBits(unit, plannedSites(survey, allocate(sets, curve[0].size)));
  return curve.map(({ size, loss }) => ({ size: size + shared, loss }));
}

/** What an allocation comes to, in the order of its members. */
function plannedSites(survey: ModelSurvey, allocation: Allocation): PlannedSites {
  return allocation.sets.flatMap(({ label, members }, i) => {
    const { transform, groupSize, sites } = survey.inputs[i].survey.transforms.find((one) => choiceLabel(one) === label)!;
    return members.map(({ bits, rank }, k): [LinearSite, SitePlan] => [
      sites[k].site,
      { groupSize, bits, ...(transform !== 'none' && { transform }), ...(rank > 0 && { rank }) },
    ]);
  });
}

function sharesOf(allocation: Allocation, sites: PlannedSites): SharedBudget['sites'] {
  const members = allocation.sets.flatMap((set) => set.members);
  return Object.fromEntries(
    sites.map(([{ name }, { transform, groupSize, rank }], i): [string, SharedBudget['sites'][string]] => [
      name,
      { transform: transform ?? 'none', groupSize, budget: members[i].size, ...(rank !== undefined && { rank }) },
    ]),
  );
}

/** As methods take it. */
export function allocationOf(shared: SharedBudget): BitAllocation {
  return { widths: shared.widths, sizesOf: layerSizesOf(shared, shared.widths), sites: new Map(Object.entries(shared.sites)) };
}

/** What layers take of a budget. */
export function layerSizesOf(counted: Counted, widths: readonly number[]): BitAllocation['sizesOf'] {
  return (site, groupSize) => layerSizes(counted, site, groupSize, widths);
}

/** Refuses before any work what no widths can reach. @param sites layers to quantize */
export async function checkBudget(
  recipe: QuantizeRecipe,
  fixed: FixedCosts,
  sites: readonly LinearSite[],
  files: FileCounts | undefined,
): Promise<void> {
  if (recipe.maxLoss !== undefined) return;
  const budget = bitBudget(recipe, fixed, files);
  const widths = candidateWidths(recipe);
  const groupSizes = groupSizesOf(recipe);
  const total = async (width: number): Promise<number> => {
    const plans = sites.map((site): [LinearSite, SitePlan] => {
      const sizes = groupSizes.map((size) => uniformBits(budget, site, size, width));
      const groupSize = groupSizes[sizes.indexOf(Math.min(...sizes))];
      return [site, { groupSize, bits: new Array<number>(groupCount(site.inFeatures, groupSize)).fill(width) }];
    });
    if (files) return 8 * (await files.bytesOf(plans));
    return plans.reduce((sum, [site, { groupSize }]) => sum + uniformBits(budget, site, groupSize, width), 0);
  };
  const least = await total(widths[0]);
  if (budget.bits < least) throw outOfReach(budget, groupSizes, least, await total(widths[widths.length - 1]));
}

function uniformBits(counted: Counted, site: LinearSite, groupSize: number, width: number): number {
  const { sizes, rest } = layerSizes(counted, site, groupSize, [width]);
  return sizes.reduce((sum, size) => sum + size[0], 0) + (rest?.(sizes.map(() => width)) ?? 0);
}

function outOfReach(budget: BitBudget, groupSizes: readonly number[], least: number, most: number): RecipeError {
  const hint = budget.files ? '. What stays in float is a part of it; --embeddings 4 or 8 makes that smaller' : '';
  const sizes = [...new Set(groupSizes)].sort((a, b) => b - a).join(', ');
  return new RecipeError(
    `${budget.say(budget.bits)}: below what groups of ${sizes} can reach; the smallest is ${budget.say(least)}, and beyond ${budget.say(most)} nothing is gained${hint}`,
  );
}
