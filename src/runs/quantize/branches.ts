/** What a quantize run does about low-rank branches: see what ranks would make up for in each layer, share a budget of them out, add them (adapters.md, section 6). */

import type { CalibrationStats } from '../../calibration/statistics.ts';
import type { Matrix } from '../../compute/blas.ts';
import type { Repair as JointRepair } from '../../methods/quantize/allocation/joint.ts';
import { transformColumns, untransformColumns } from '../../methods/quantize/input-transform.ts';
import {
  addBranch,
  type FactorBits,
  factorBits,
  factorStorage,
  type LowRankBranch,
  roundFactor,
  storedBranch,
} from '../../methods/quantize/low-rank.ts';
import { decodeStored, type QuantizedLinear } from '../../methods/quantize/quantized-linear.ts';
import type {
  BitPlan,
  QuantizeContext,
  QuantizeResult,
  Quantizer,
  Remainder,
  SitePlan,
} from '../../methods/quantize/quantizer.ts';
import {
  type Compensation,
  type CompensationVariant,
  compensate,
  errorEnergy,
  errorSpectrum,
  refit,
} from '../../methods/rank/compensation.ts';
import { greedyRanks } from '../../methods/rank/greedy.ts';
import { type SpendableBudget, uniformRank } from '../../methods/rank/rank-budget.ts';
import type { LinearSite } from '../../model/model.ts';
import type { SharedBudget } from './bit-budget.ts';

/** How branches are made. */
export interface BranchOptions {
  readonly variant: CompensationVariant;
  /** Times that codes and branch are made, each for what the other leaves; the best time counts. */
  readonly rounds: number;
  /** How wide factors are stored, where the plan does not say it. */
  readonly bits: FactorBits;
}

/** What a pass over the blocks does about branches: see what each rank would be worth, up to some rank; or add those of the plan. */
export type BranchWork =
  | { readonly kind: 'survey'; readonly mostRank: number }
  | {
      readonly kind: 'add';
      readonly options: BranchOptions;
      /** Where widths are decided anew; absent: the ranks of the plan that is followed. */
      readonly ranks?: ReadonlyMap<string, number> | undefined;
    };

/** What each rank would take off a layer's loss `tr(E H E^T)`. */
export interface RankSpectrum {
  /** Descending. */
  readonly values: readonly number[];
  /** The loss without a branch. */
  readonly total: number;
}

/** A layer that its method is done with. */
export interface QuantizedSite {
  readonly context: QuantizeContext;
  readonly quantizer: Quantizer;
  readonly site: LinearSite;
  /** W (outFeatures, inFeatures). */
  readonly weight: Float32Array;
  readonly stats: CalibrationStats;
  readonly plan: SitePlan;
  readonly result: QuantizeResult;
}

/** Ranks a layer may get: so many times what it would have if all had the same, and at least so many. */
const MOST_OF_MEAN = 8;
/** Output rows that the relative error is measured on, evenly spaced. */
const SAMPLED_ROWS = 256;

/** The most ranks worth asking about. */
export function mostRank(budget: SpendableBudget, sites: readonly LinearSite[]): number {
  return MOST_OF_MEAN * Math.max(1, uniformRank(budget, sites));
}

/** How ranks were shared out, as it is kept for a resumed run. */
export interface SharedRanks {
  /** The widths that were decided in the first pass, with ranks; absent: they are decided anew, within the budget that paid for ranks as well. */
  readonly plan?: BitPlan;
  /** With `--joint`: that budget. */
  readonly joint?: SharedBudget;
  readonly total: number;
  readonly spent: number;
  /** Loss of the model with the codes alone and with these branches as predicted, weighed by sensitivity: in nats where those were measured. */
  readonly predicted: { readonly before: number; readonly after: number };
}

/** A layer after the first pass. */
export interface SurveyedSite {
  readonly site: LinearSite;
  readonly plan: SitePlan;
  readonly spectrum: RankSpectrum;
}

/** Ranks and widths from one budget, `share` being what shares it out. @param rankBits of one parameter, as the budget counts */
export async function shareJointly(
  sites: readonly SurveyedSite[],
  budget: SpendableBudget,
  rankBits: number,
  before: number,
  share: (repairs: ReadonlyMap<string, JointRepair>) => Promise<SharedBudget>,
): Promise<SharedRanks> {
  const repairs = new Map(
    sites.flatMap(({ site, spectrum: { values, total } }): [string, JointRepair][] => {
      if (!(total > 0)) return [];
      const left = [1];
      for (const value of values) left.push(Math.max(0, left[left.length - 1] - value / total));
      return [[site.name, { left, rankSize: rankBits * budget.cost(site) }]];
    }),
  );
  const joint = await share(repairs);
  const spent = sites.reduce((sum, { site }) => sum + budget.cost(site) * (joint.sites[site.name].rank ?? 0), 0);
  return { joint, total: budget.total, spent, predicted: { before, after: joint.predictedLoss } };
}

/**
 * Buys ranks where they take off most for their cost.
 * @param sensitivities what a unit of a layer's loss costs the model; absent: the same everywhere
 */
export function shareRanks(
  sites: readonly SurveyedSite[],
  budget: SpendableBudget,
  sensitivities: Readonly<Record<string, number>> = {},
): SharedRanks {
  const choices = sites.map(({ site, spectrum }) => {
    const weight = sensitivities[site.name] ?? 1;
    return { name: site.name, cost: budget.cost(site), gains: spectrum.values.map((value) => weight * value), weight, spectrum };
  });
  const ranks = greedyRanks(choices, budget.total);
  const modules: Record<string, SitePlan> = {};
  for (const { site, plan } of sites) {
    const { rank: _, ...widths } = plan;
    const rank = ranks.get(site.name)!;
    modules[site.name] = rank === 0 ? widths : { ...widths, rank };
  }
  const before = choices.reduce((sum, { weight, spectrum }) => sum + weight * spectrum.total, 0);
  const gained = choices.reduce(
    (sum, { name, gains }) => sum + gains.slice(0, ranks.get(name)).reduce((all, gain) => all + gain, 0),
    0,
  );
  const spent = choices.reduce((sum, { name, cost }) => sum + cost * ranks.get(name)!, 0);
  return { plan: { modules }, total: budget.total, spent, predicted: { before, after: before - gained } };
}

/** What ranks would be worth in a layer. */
export async function surveyRanks(done: QuantizedSite, most: number): Promise<RankSpectrum> {
  const { error, gram } = remainderOf(done);
  const { values, total } = await errorSpectrum(done.context.blas, matrix(done, error), gram, most);
  return { values: [...values], total };
}

/** One time of codes and branch. */
interface Round {
  /** `tr(E H E^T)` of what both leave. */
  readonly left: number;
  readonly result: QuantizeResult;
  readonly branch: LowRankBranch | undefined;
  /** What the codes left out of their target. */
  readonly before: LowRankBranch | undefined;
}

/** The layer with the branch of its plan's rank. The relative error is that of codes and branch together. */
export async function addBranchTo(done: QuantizedSite, { variant, rounds, ...options }: BranchOptions): Promise<QuantizeResult> {
  const { context, quantizer, site, weight, stats, plan } = done;
  const { rank = 0, rankBits: bits = options.bits } = plan;
  if (rank === 0) return done.result;
  let best: Round | undefined;
  let branch: LowRankBranch | undefined;
  let { result } = done;
  for (let round = 1; round <= rounds; round++) {
    const before = branch;
    const target = branch ? less(done, branch) : weight;
    if (branch) result = await quantizer.apply(context, site, target, stats, plan);
    const { error, gram } = remainderOf({ ...done, weight: target, result });
    // What the codes were not asked for is the branch's as well.
    if (branch) addBranch(error, site.outFeatures, site.inFeatures, inStoredOrder(done, result, branch));
    const repair = { error: matrix(done, error), gram, variant };
    const found = await compensate(context.blas, repair.error, gram, rank, variant);
    branch = found.rank === 0 ? undefined : await roundBranch({ ...done, result }, repair, found, bits);
    if (branch) addBranch(error, site.outFeatures, site.inFeatures, negated(inStoredOrder(done, result, branch)));
    const left = await errorEnergy(context.blas, matrix(done, error), gram);
    if (best === undefined || left < best.left) best = { left, result, branch, before };
    if (branch === undefined) break;
  }
  const { result: codes, branch: kept, before } = best!;
  // Later codes are of what a branch leaves: theirs is another error.
  const { relativeError: alone } = done.result;
  if (kept === undefined) return codes;
  const share = factorBits(kept.dtype) / bits;
  if (share > 1) context.note(site, `its branch does not fit ${bits} bits and takes ${share} times its share of the budget`);
  const quantized = withBias(done, { ...codes.quantized, lowRank: kept }, before);
  return {
    quantized,
    relativeError: await relativeError(done, codes, kept),
    details: {
      ...codes.details,
      rank: kept.rank,
      ...(alone === undefined ? {} : { relativeErrorOfCodes: alone }),
    },
  };
}

interface Repair {
  /** What is left of the weight, in stored order. */
  readonly error: Matrix;
  readonly gram: Float64Array;
  readonly variant: CompensationVariant;
}

/** A branch as it is stored. With codes A is rounded first, B is made anew for what A has become, and rounded then. */
async function roundBranch(
  { context, site, result }: QuantizedSite,
  { error, gram, variant }: Repair,
  { rank, loraA, loraB }: Compensation,
  bits: FactorBits,
): Promise<LowRankBranch> {
  const { transform } = result.quantized;
  const natural = transform ? untransformColumns(transform, loraA, rank, site.inFeatures) : loraA;
  if (bits === 16) return storedBranch(rank, natural, loraB);
  const a = roundFactor(natural, rank, bits, { step: site.inFeatures, stride: 1 });
  if (!a) return storedBranch(rank, natural, loraB);
  const stored = transform ? transformColumns(transform, a.values, rank, site.inFeatures) : a.values;
  const fitted = await refit(context.blas, error, gram, { rank, loraA: stored }, variant);
  const b = roundFactor(fitted ?? loraB, rank, bits, { step: 1, stride: rank });
  if (!b) return storedBranch(rank, natural, loraB);
  return { rank, dtype: factorStorage(bits), loraA: a.values, loraB: b.values, scales: { a: a.scales, b: b.scales } };
}

function remainderOf({ site, weight, stats, result }: QuantizedSite): Remainder {
  if (result.remainder) return result.remainder();
  const { transform } = result.quantized;
  const { outFeatures, inFeatures } = site;
  const error = transform ? transformColumns(transform, weight, outFeatures, inFeatures) : weight.slice();
  const decoded = decodeStored(result.quantized);
  for (let i = 0; i < error.length; i++) error[i] -= decoded[i];
  return { error, gram: stats.hessian };
}

/** W less a branch. */
function less({ site, weight }: QuantizedSite, branch: LowRankBranch): Float32Array {
  const rest = weight.slice();
  addBranch(rest, site.outFeatures, site.inFeatures, negated(branch));
  return rest;
}

function negated(branch: LowRankBranch): LowRankBranch {
  return { ...branch, loraB: branch.loraB.map((value) => -value) };
}

function inStoredOrder({ site }: QuantizedSite, { quantized }: QuantizeResult, branch: LowRankBranch): LowRankBranch {
  const { transform } = quantized;
  if (!transform) return branch;
  return { ...branch, loraA: transformColumns(transform, branch.loraA, branch.rank, site.inFeatures) };
}

/**
 * A bias that makes up for the mean of what codes lose of their target, `b + (W - before) E[x'] - Wq E[x]`, makes up for that of the whole layer:
 * `+ before E[x'] - B A E[x]`, x' being the input in the float model.
 */
function withBias(
  { context, stats, site }: QuantizedSite,
  quantized: QuantizedLinear,
  before: LowRankBranch | undefined,
): QuantizedLinear {
  const { bias, lowRank } = quantized;
  const means = stats.drift?.means;
  if (!bias || !lowRank || !means) return quantized;
  const moved = bias.slice();
  addProduct(moved, lowRank, means.actual, -1);
  if (before) addProduct(moved, before, means.float, 1);
  return { ...quantized, bias: context.roundBias ? context.roundBias(site, moved) : moved };
}

/** `bias += factor B (A x)`. */
function addProduct(bias: Float32Array, { rank, loraA, loraB }: LowRankBranch, x: Float64Array, factor: number): void {
  const n = x.length;
  const inner = Array.from({ length: rank }, (_, k) => x.reduce((sum, value, j) => sum + value * loraA[k * n + j], 0));
  for (let row = 0; row < bias.length; row++) {
    bias[row] += factor * inner.reduce((sum, each, k) => sum + loraB[row * rank + k] * each, 0);
  }
}

/** `tr(dW H dW^T) / tr(W H W^T)` of codes and branch, on evenly spaced rows, by the moments that the method worked with. */
async function relativeError(done: QuantizedSite, codes: QuantizeResult, branch: LowRankBranch): Promise<number> {
  const { site, weight, context } = done;
  const { transform } = codes.quantized;
  const { outFeatures: rows, inFeatures: columns } = site;
  const { gram } = remainderOf({ ...done, result: codes });
  const stored = transform ? transformColumns(transform, weight, rows, columns) : weight;
  const error = decodeStored(codes.quantized);
  addBranch(error, rows, columns, inStoredOrder(done, codes, branch));
  for (let i = 0; i < error.length; i++) error[i] -= stored[i];
  const count = Math.min(rows, SAMPLED_ROWS);
  const sampled = (values: Float32Array) => {
    const data = new Float32Array(count * columns);
    for (let i = 0; i < count; i++) {
      const row = Math.floor((i * rows) / count);
      data.set(values.subarray(row * columns, (row + 1) * columns), i * columns);
    }
    return { rows: count, columns, data };
  };
  const energy = await errorEnergy(context.blas, sampled(stored), gram);
  return energy > 0 ? (await errorEnergy(context.blas, sampled(error), gram)) / energy : 0;
}

function matrix({ site }: QuantizedSite, data: Float32Array) {
  return { rows: site.outFeatures, columns: site.inFeatures, data };
}
