/** What every merge method offers: a declaration of what it needs, and pure arithmetic on one tensor, taken a block of rows at a time. */
import type { Blas } from '../../compute/blas.ts';

/**
 * How a method reads a tensor (merging.md 2.2), which decides how often its bytes are read and what must be held:
 * `elementwise` and `row` once; `gram`, `norms` and `selection` scan it first; `matrix` gets it whole.
 */
export type AccessClass = 'elementwise' | 'row' | 'gram' | 'norms' | 'selection' | 'matrix';

/** What a tensor is to the network: methods on matrices leave the rest to the mean of the task vectors. */
export type TensorRole = 'matrix' | 'embedding' | 'head' | 'vector';

interface Documented {
  /** One line for --help. */
  readonly summary: string;
  /** One value per expert; `--set label.name=value` sets one. */
  readonly perExpert?: boolean;
}

export interface NumberParameter extends Documented {
  readonly type: 'number';
  /** Absent: the user must give it. */
  readonly default?: number;
  /** Default under preset `paper`, where it differs. */
  readonly paper?: number;
  readonly min?: number;
  readonly max?: number;
  /** `min` itself is refused. */
  readonly above?: number;
  readonly integer?: boolean;
}

export interface BooleanParameter extends Documented {
  readonly type: 'boolean';
  readonly default: boolean;
  readonly paper?: boolean;
}

export interface ChoiceParameter<C extends string = string> extends Documented {
  readonly type: 'choice';
  readonly choices: readonly C[];
  readonly default: C;
  readonly paper?: C;
}

export type Parameter = NumberParameter | BooleanParameter | ChoiceParameter;
export type Parameters = Readonly<Record<string, Parameter>>;

type Scalar<P extends Parameter> = P extends NumberParameter
  ? number
  : P extends BooleanParameter
    ? boolean
    : P extends ChoiceParameter<infer C>
      ? C
      : never;

/** Validated values for one tensor: a scalar each, or one per expert in expert order. */
export type ParameterValues<D extends Parameters> = {
  readonly [K in keyof D]: D[K] extends { readonly perExpert: true } ? readonly Scalar<D[K]>[] : Scalar<D[K]>;
};

/** The tensor being merged; `shape` is as stored, or [out, in] for the transposed layouts, which the caller turns. */
export interface MergeTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly role: TensorRole;
  /** Expert labels, in expert order. */
  readonly experts: readonly string[];
}

/** Consecutive whole rows of one tensor (last axis = columns), the same rows of every input. float32, never modified by a method. */
export interface MergeBlock {
  /** Flat index of the first element. */
  readonly start: number;
  readonly length: number;
  /** Absent when the method is given no base. */
  readonly base: Float32Array | undefined;
  readonly experts: readonly Float32Array[];
  /** `experts[k] - base`, computed once when first asked for. */
  readonly taskVectors: readonly Float32Array[];
  /** What was measured on calibration text for this tensor, per expert, in the form the method declares; absent where nothing was. */
  readonly statistics?: readonly Float32Array[];
  /** Memory for what `merge` returns, of `length`. */
  readonly output: Float32Array;
}

export interface MergeContext {
  readonly seed: number;
  readonly blas: Blas;
  /** L2 norm of each expert's statistics over all tensors of the model, for methods that balance the experts by it. */
  readonly statisticNorms?: readonly number[];
  /** Restores mergekit's results where pcomp differs on purpose (merging.md 4.4). */
  readonly compat?: 'mergekit';
  /** Something a reader of the report should know. */
  note(tensor: MergeTensor, message: string): void;
}

/** A pass over a tensor that only looks. What it finds must not depend on where blocks end. */
export interface Scan {
  /** Looks at one block in so many, evenly over the tensor, for what is only a guess; absent: at all. */
  readonly every?: number;
  /** Asked before the pass: whether there still is something to find out. Absent: there is. */
  needed?(): boolean;
  look(block: MergeBlock): void;
}

/** One tensor under way. Scans run first, each over the blocks in order; then `merge` on all blocks in order. */
export interface TensorMerge {
  readonly scans: readonly Scan[];
  /** The merged rows, float32, good until the next block: the block's `output`, or memory of the method's own, or one of the inputs unchanged. */
  merge(block: MergeBlock): Float32Array | Promise<Float32Array>;
}

export interface Merger<D extends Parameters = Parameters> {
  /** Name on the command line, kebab-case. */
  readonly name: string;
  /** One line for --help: the formula. */
  readonly formula: string;
  /** Paper (arXiv number) or project. */
  readonly reference: string;
  readonly access: AccessClass;
  /** `optional`: works on task vectors when there is one, on the weights themselves otherwise. */
  readonly base: 'required' | 'optional' | 'unused';
  /** The side of the square matrices that a method on matrices works in: the columns; absent: the smaller. */
  readonly side?: 'columns';
  readonly experts: { readonly min: number; readonly max?: number };
  /** What must be measured first on calibration text: the Gram matrix of each expert's inputs, or its Fisher diagonal. */
  readonly statistics?: 'gram' | 'fisher';
  readonly parameters: D;
  /** Throws RecipeError for values that are wrong together or wrong for this tensor. */
  prepare(tensor: MergeTensor, values: ParameterValues<D>, context: MergeContext): TensorMerge;
}

/** For type inference of a method's own parameters. */
export function defineMerger<const D extends Parameters>(merger: Merger<D>): Merger<D> {
  return merger;
}
