/** The work of a merge, cut into jobs of one tensor: plain data that a worker gets by message, with everything it needs to know. */
import type { TensorPlace } from '../../../formats/safetensors/placed-files.ts';
import type { DType } from '../../../formats/tensor.ts';
import { LARGEST } from '../../compute/linalg/tridiagonal.ts';
import { UnsupportedError } from '../../errors.ts';
import type { TensorCoefficients } from '../../methods/merge/merge-plan.ts';
import type { AccessClass, Merger, MergeTensor, Parameters, ParameterValues } from '../../methods/merge/merger.ts';
import { SELECTION_BYTES } from '../../methods/merge/selection.ts';

/** A tensor of an input, where its bytes are. */
export interface StoredTensor {
  /** Number of the input: experts in label order, then the base. */
  readonly input: number;
  /** Its name in that input. */
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly path: string;
  /** First byte, counted from the file's start. */
  readonly position: number;
  readonly byteLength: number;
}

/** Where one expert's version of a tensor comes from: `TensorOrigin` with tensors in place of names. */
export type StoredOrigin =
  | { readonly kind: 'stored'; readonly tensor: StoredTensor }
  | { readonly kind: 'base' }
  | { readonly kind: 'added'; readonly tensor: StoredTensor; readonly scale: number }
  | {
      readonly kind: 'low-rank';
      readonly a: StoredTensor;
      readonly b: StoredTensor;
      readonly e?: StoredTensor;
      readonly magnitude?: StoredTensor;
      readonly scale: number;
      readonly transposed: boolean;
    };

/** What every job of a run has in common. */
export interface MergeSetup {
  readonly seed: number;
  readonly compat?: 'mergekit';
  readonly allowNonfinite: boolean;
  /** Of each expert's statistics, over the whole model. */
  readonly statisticNorms?: readonly number[];
  /** Folder of the files that are written. */
  readonly folder: string;
}

interface Job {
  /** Name of the result. */
  readonly name: string;
  /** Where the result goes: twice where a tied head is stored too. */
  readonly places: readonly TensorPlace[];
}

export interface CopyJob extends Job {
  readonly kind: 'copy';
  readonly tensor: StoredTensor;
}

export interface MergeJob extends Job {
  readonly kind: 'merge';
  readonly method: string;
  /** Added to what the method makes. */
  readonly coefficients?: TensorCoefficients;
  /** As the method sees it. */
  readonly tensor: MergeTensor;
  readonly values: ParameterValues<Parameters>;
  /** Element type of the result. */
  readonly dtype: DType;
  /** Rows and columns as stored; a tensor is merged in runs of whole rows. */
  readonly rows: number;
  readonly columns: number;
  /** Stored (in, out), while the method takes (out, in). */
  readonly turned: boolean;
  /** Matrices in a stack, merged one by one; 1 for anything else. */
  readonly stack: number;
  readonly base?: StoredTensor;
  /** Whether the method is given the base; without, it only carries the experts' changes of it. */
  readonly usesBase: boolean;
  readonly experts: readonly StoredOrigin[];
  /** What was measured on each expert's text. */
  readonly statistics?: readonly StoredTensor[];
  /** Rows in a block; all of them where the tensor must be taken whole. */
  readonly blockRows: number;
}

export type TensorJob = CopyJob | MergeJob;

/** Elements of a block: few enough for a core's caches, enough that reading and writing them is not all beginnings. */
const BLOCK_ELEMENTS = 1 << 16;

export interface Sizing {
  readonly name: string;
  readonly rows: number;
  readonly columns: number;
  readonly experts: number;
  readonly access: AccessClass;
  /** Of the method. */
  readonly side?: Merger['side'];
  /** Whether the method finds eigenvectors of its square matrices. */
  readonly decomposes: boolean;
  /** Must be taken whole: stored rows are not the method's rows, or the method needs the matrix. */
  readonly whole: boolean;
  /** Reading a block again costs no more than a copy: it is on the disk, and most likely still in memory. An adapter's would be computed again. */
  readonly stored: boolean;
  /** Bytes for this job's buffers. */
  readonly budget: number;
}

/** Bytes of buffers for an element of a block: float32 of every input and its task vector, the result in float32 and as stored, bytes just read. */
function bytesPerElement(experts: number): number {
  return 8 * (experts + 1) + 24;
}

/** Bytes of buffers for an element of a matrix that is taken whole: float32 of every input, task vector and result; no bytes on their way. */
function bytesPerMatrixElement(experts: number): number {
  return 8 * experts + 12;
}

/**
 * Bytes that a method on matrices works in: task vectors and factors in float64, and a square matrix while its eigenvectors are found, which are seven of
 * its size. A method that works on the columns keeps those of all experts.
 */
function matrixBytes({ rows, columns, experts, side }: Pick<Sizing, 'rows' | 'columns' | 'experts' | 'side'>): number {
  const square = squareOf(rows, columns, side);
  return 8 * (experts + 2) * rows * columns + 8 * (side === 'columns' ? experts + 7 : 7) * square * square;
}

function squareOf(rows: number, columns: number, side: Sizing['side']): number {
  return side === 'columns' ? columns : Math.min(rows, columns);
}

/** Bytes that a method counts magnitudes in, whatever the size of a block. */
function counterBytes({ access, experts }: Pick<Sizing, 'access' | 'experts'>): number {
  return access === 'selection' ? experts * SELECTION_BYTES : 0;
}

/** Bytes of buffers of a block, and of what goes with it. */
export function blockBytes(sizing: Omit<Sizing, 'name' | 'budget' | 'stored' | 'decomposes'>): number {
  const { rows, columns, experts, access, whole } = sizing;
  if (whole && access === 'matrix') return rows * columns * bytesPerMatrixElement(experts) + matrixBytes(sizing);
  return rows * columns * bytesPerElement(experts) + counterBytes(sizing);
}

/**
 * Rows of a block. Methods that scan first get a tensor whole where it fits and reading it again would cost more than memory.
 * @throws UnsupportedError naming the tensor and the bytes needed, when it does not fit, or is larger than eigenvectors can be found of
 */
export function blockRowsFor(sizing: Sizing): number {
  const { name, rows, columns, experts, access, side, decomposes, whole, stored, budget } = sizing;
  const square = squareOf(rows, columns, side);
  if (access === 'matrix' && decomposes && square > LARGEST)
    throw new UnsupportedError(
      `tensor "${name}": eigenvectors of a (${square}, ${square}) matrix are needed, and those of at most ${LARGEST} rows can be found; take a method without`,
    );
  const needed = blockBytes(sizing);
  if (whole && needed > budget) throw tooLarge(name, needed, budget);
  const once = !stored && access !== 'elementwise' && access !== 'row';
  if (whole || (once && needed <= budget)) return Math.max(1, rows);
  const rowBytes = columns * bytesPerElement(experts);
  const left = budget - counterBytes(sizing);
  if (rowBytes > left) throw tooLarge(name, rowBytes + counterBytes(sizing), budget);
  return Math.max(1, Math.min(rows, Math.floor(left / Math.max(1, rowBytes)), Math.ceil(BLOCK_ELEMENTS / Math.max(1, columns))));
}

function tooLarge(name: string, needed: number, budget: number): UnsupportedError {
  return new UnsupportedError(
    `tensor "${name}" needs ${needed} bytes of buffers at once, but a thread has ${budget}; raise --max-memory or lower --threads`,
  );
}
