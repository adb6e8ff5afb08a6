/** What every weight quantizer offers: decide where bits go (a small plan), then follow the plan. Free of side effects. */
import type { BlockObjective } from '../../calibration/block-objective.ts';
import type { CalibrationStats } from '../../calibration/statistics.ts';
import type { Blas } from '../../compute/blas.ts';
import type { AsyncKernels } from '../../compute/kernels/kernels.ts';
import type { LinearSite } from '../../model/model.ts';
import type { LayerSizes } from './allocation/frontier.ts';
import type { BestStep } from './best/steps.ts';
import type { QuantizedLinear } from './quantized-linear.ts';

/** How a site's input is changed (slim-llm 5.3): sorted by importance; that, and rotated in each group; or rotated as a whole. */
export const TRANSFORMS = ['none', 'perm', 'perm-had', 'had'] as const;
export type TransformKind = (typeof TRANSFORMS)[number];

/** Whether groups then lie by importance, so that widths need not rise from one to the next. */
export function sorts(transform: TransformKind): boolean {
  return transform === 'perm' || transform === 'perm-had';
}

/** Whether inputs are multiplied with a matrix. */
export function rotates(transform: TransformKind): boolean {
  return transform === 'perm-had' || transform === 'had';
}

/** Widths of one site's groups, in stored column order. */
export interface SitePlan {
  readonly groupSize: number;
  readonly bits: readonly number[];
  /** The same for all sites that read one input; absent: none, stored order is natural order. */
  readonly transform?: Exclude<TransformKind, 'none'>;
  /** Rank of the branch beside the codes; absent: none. The run adds it, whatever the method. */
  readonly rank?: number;
  /** Bits of its factors; absent: 16. */
  readonly rankBits?: 8 | 4;
}

/** What bits were spent on: module name -> widths. Saved in pcomp.json, reusable with --plan. */
export interface BitPlan {
  readonly modules: Readonly<Record<string, SitePlan>>;
}

/** The validated options quantizers read; each documents which it uses. */
export interface QuantizeOptions {
  readonly preset: 'paper' | 'best';
  /** Mean code bits, an integer under preset `paper`. */
  readonly bits: number;
  readonly groupSize: number;
  /** Methods that allocate: sizes a layer's groups may have, descending; absent: `groupSize` alone. */
  readonly groupSizes?: readonly number[];
  /** Damping added to the Hessian's diagonal, as a fraction of its mean. */
  readonly dampening: number;
  /** gptq: visit columns by descending Hessian diagonal. */
  readonly actOrder: boolean;
  /** gptq with act-order: fit every group's grid before any column moves (always so with actOrder, to keep groups in natural order). */
  readonly staticGroups: boolean;
  /** Zero point fixed at 2^(b-1). */
  readonly symmetric: boolean;
  /** slim-llm: weight of salient elements in the grid search (paper: 1, which makes the mask void). */
  readonly lambdaSalience: number;
  /** slim-llm: denominator of the salience, see slim-llm 4.4. */
  readonly salience: 'code' | 'inverse-diag';
  /** best: steps to leave out. */
  readonly without?: readonly BestStep[];
  /** best: part of the drift correction to take; absent: the best on held-out tokens. */
  readonly alpha?: number;
  /** `auto`: what predicts the least loss; `free`: the same of what costs no operation at run time. */
  readonly transform?: TransformKind | 'auto' | 'free';
  /** Methods that learn: steps a block; absent: the method's own number. */
  readonly steps?: number;
  /** Methods that learn: which windows a step sees. Preset best: the signs of a rotation. */
  readonly seed?: number;
}

/** One site under one transform of its input. */
export interface SiteCosts {
  readonly site: LinearSite;
  /** Predicted loss of each group (stored order) at each candidate width. */
  readonly costs: readonly Float64Array[];
  /** `tr(W H W^T)`: the energy of the output, which losses are parts of. */
  readonly energy: number;
}

/** All sites of one input under one transform, in groups of one size. */
export interface TransformCosts {
  readonly transform: TransformKind;
  /** Its order of columns costs nothing, in files or at run time. */
  readonly free: boolean;
  readonly groupSize: number;
  readonly sites: readonly SiteCosts[];
}

/** A site with an error like the one quantization will make, to see what such an error does to the model. */
export interface Trial {
  /** W with the error, (outFeatures, inFeatures). */
  readonly weight: Float32Array;
  /** `tr(E H E^T)`, in the unit of the costs. */
  readonly loss: number;
}

/** What was seen of one input's sites. */
export interface InputSurvey {
  readonly transforms: readonly TransformCosts[];
  /** By site name. */
  readonly trials: ReadonlyMap<string, Trial>;
}

/** What a site may spend, and how. */
export interface Assignment {
  readonly transform: TransformKind;
  readonly groupSize: number;
  /** In the unit of `BitAllocation.sizesOf`. */
  readonly budget: number;
}

/** The budget of the whole model, shared out. */
export interface BitAllocation {
  /** Candidate widths, ascending. */
  readonly widths: readonly number[];
  /** What a layer takes in groups of `groupSize`, in bits of whatever the budget counts. */
  sizesOf(site: LinearSite, groupSize: number): LayerSizes;
  readonly sites: ReadonlyMap<string, Assignment>;
}

/** What a method is given besides its inputs. */
export interface QuantizeContext {
  readonly blas: Blas;
  /** Inner loops; absent: on the calling thread. */
  readonly kernels?: AsyncKernels;
  readonly options: QuantizeOptions;
  /** Something a reader of the report should know: a retry, a fall-back. */
  note(site: LinearSite, message: string): void;
  /** The bias of a site that has one, (outFeatures). slim-llm compares whole outputs, bias included, and needs it where `hasBias`. */
  loadBias?(site: LinearSite): Promise<Float32Array>;
  /** A corrected bias as it will be stored. */
  roundBias?(site: LinearSite, bias: Float32Array): Float32Array;
  /** Methods that learn: called after each step of a block. */
  onStep?(done: number, total: number): void;
  /** Methods that allocate: what the survey gave each site. */
  readonly allocation?: BitAllocation;
  /** Whether the columns of an input may be sorted without an operation at run time; absent: of none. */
  sortsFreely?(input: string): boolean;
}

/** How a run measures inputs for a method. */
export interface Measuring {
  /** One input after the other, each behind the sites quantized before it. */
  readonly sequential: boolean;
  /** Against what the float model makes of the same text. */
  readonly drift: boolean;
  /** Activations are read again after the Hessian is complete. */
  readonly replay: boolean;
  /** Quantized blocks are refined against the float block: on the float model's inputs, or with `dual` on both models' inputs. */
  readonly learns?: 'plain' | 'dual';
}

/** A site of a block that is quantized and may still be learned. */
export interface SiteToLearn {
  readonly site: LinearSite;
  /** (outFeatures, inFeatures) float32, not modified. */
  readonly weight: Float32Array;
  readonly quantized: QuantizedLinear;
}

export interface LearnedBlock {
  /** By site name; the start itself where learning gave nothing. */
  readonly quantized: ReadonlyMap<string, QuantizedLinear>;
  /** Mean squared error of the block's output on held-out windows, of the start and of what was kept. */
  readonly lossBefore: number;
  readonly lossAfter: number;
  /** Step that was kept; 0: the start. */
  readonly step: number;
}

/** `weight` is (outFeatures, inFeatures) float32 and is not modified. `stats` is absent for data-free methods. */
export interface Quantizer {
  readonly name: string;
  /** One line for --help. */
  readonly summary: string;
  /** Whether decide/apply read `stats`. */
  readonly needsCalibration: boolean;
  /** Absent for methods that read no text. */
  measuring?(options: QuantizeOptions): Measuring;
  /**
   * Before anything is decided, one look at every input of the float model: what its sites would lose under each transform in groups of each size at each width.
   * `stats` are used up. Methods without it get no allocation.
   */
  survey?(
    context: QuantizeContext,
    sites: readonly LinearSite[],
    loadSite: (site: LinearSite) => Promise<Float32Array>,
    stats: CalibrationStats | undefined,
    widths: readonly number[],
  ): Promise<InputSurvey>;
  decide(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    stats: CalibrationStats | undefined,
  ): Promise<SitePlan>;
  apply(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    stats: CalibrationStats | undefined,
    plan: SitePlan,
  ): Promise<QuantizeResult>;
  /** Methods whose `measuring` says that they learn: other codes and grids, of the same widths, for all sites of a block together. */
  refine?(context: QuantizeContext, sites: readonly SiteToLearn[], objective: BlockObjective): Promise<LearnedBlock>;
}

export interface QuantizeResult {
  readonly quantized: QuantizedLinear;
  /** Relative output error `tr(dW H dW^T) / tr(W H W^T)`, when the method knows H. */
  readonly relativeError?: number;
  /** What else a report should have of it. */
  readonly details?: Readonly<Record<string, number>>;
  /** For a method whose codes stand for something else than the weight, or that uses the statistics up; absent: W less what it decodes to, by the statistics. */
  remainder?(): Remainder;
}

/** What codes leave of what they stand for, and the second moments of what it multiplies; both in stored order, which is that of the codes. */
export interface Remainder {
  /** (outFeatures, inFeatures). */
  readonly error: Float32Array;
  /** (inFeatures, inFeatures), symmetric. */
  readonly gram: Float64Array;
}
