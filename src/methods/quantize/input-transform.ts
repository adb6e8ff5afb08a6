/**
 * What is done to a linear layer's input so that its weights quantize better (slim-llm 5.3). Sites that read one input share it, so it
 * costs a runtime a few small operations per input.
 */
import { hadamardScale, hadamardWeightScale, rotateRuns } from './hadamard.ts';

/** `x -> H (s * x[order])`: a permutation of the columns, their signs, then a Hadamard matrix over every whole run of `hadamard` of them. */
export interface InputTransform {
  /** Stored column k reads input `order[k]`; (inFeatures). Absent: columns stay where they are. */
  readonly order?: Uint32Array;
  /** 1 where the sign of a column (after ordering) is turned, else 0; (inFeatures). Absent: none is. */
  readonly signs?: Uint8Array;
  /** 0 for none; else an order that there is a matrix of. A last run that is shorter stays as it is. */
  readonly hadamard: number;
}

/** What a transform consists of, without its numbers: what layouts and sizes depend on. */
export interface TransformShape {
  /** Columns are gathered in another order. */
  readonly permuted: boolean;
  /** Some have their sign turned. */
  readonly signed: boolean;
  /** As `InputTransform` has it. */
  readonly hadamard: number;
}

export function shapeOfTransform({ order, signs, hadamard }: InputTransform): TransformShape {
  return { permuted: order !== undefined, signed: signs !== undefined, hadamard };
}

/** Length of the runs that `perm-had` rotates: a group, where that is a power of two and the input has one; else 0. */
export function rotatedRun(groupSize: number, features: number): number {
  return groupSize > 1 && groupSize <= features && Number.isInteger(Math.log2(groupSize)) ? groupSize : 0;
}

/** W (rows, columns) in natural order -> stored order. Sums of a rotation are fp64, rounded once. */
export function transformColumns(transform: InputTransform, weight: Float32Array, rows: number, columns: number): Float32Array {
  const stored = new Float32Array(rows * columns);
  const scale = transform.hadamard > 0 ? hadamardWeightScale(transform.hadamard) : 1;
  const row = new Float64Array(columns);
  for (let r = 0; r < rows; r++) {
    const at = r * columns;
    transformRow(transform, weight.subarray(at, at + columns), row, scale);
    stored.set(row, at);
  }
  return stored;
}

/** The reverse, for weights: `y = untransform(W) x` is what `W` makes of the transformed input. */
export function untransformColumns(transform: InputTransform, stored: Float32Array, rows: number, columns: number): Float32Array {
  const weight = new Float32Array(rows * columns);
  const row = new Float64Array(columns);
  for (let r = 0; r < rows; r++) {
    const at = r * columns;
    row.set(stored.subarray(at, at + columns));
    untransformRow(transform, row, weight.subarray(at, at + columns));
  }
  return weight;
}

/** What a transform does to an activation, in place of `to`. */
export function transformActivation(transform: InputTransform, from: ArrayLike<number>, to: Float64Array): void {
  transformRow(transform, from, to, transform.hadamard > 0 ? hadamardScale(transform.hadamard) : 1);
}

function transformRow(
  { order, signs, hadamard }: InputTransform,
  from: ArrayLike<number>,
  to: Float64Array,
  scale: number,
): void {
  const columns = to.length;
  if (order) for (let k = 0; k < columns; k++) to[k] = from[order[k]];
  else to.set(from);
  if (signs) turnSigns(to, signs);
  if (hadamard > 0) rotateRuns(to, hadamard, scale);
}

/** A row of stored weights in natural order; `row` is used up. */
export function untransformRow({ order, signs, hadamard }: InputTransform, row: Float64Array, natural: Float32Array): void {
  // The matrix is symmetric: its own transpose.
  if (hadamard > 0) rotateRuns(row, hadamard, hadamardScale(hadamard));
  if (signs) turnSigns(row, signs);
  if (order) for (let k = 0; k < row.length; k++) natural[order[k]] = row[k];
  else natural.set(row);
}

function turnSigns(values: Float64Array, signs: Uint8Array): void {
  for (let k = 0; k < values.length; k++) if (signs[k] === 1) values[k] = -values[k];
}

/** `M -> T M T^T` in place for a symmetric (n, n) matrix, T being what the transform does to an activation. */
export function transformSymmetric({ order, signs, hadamard }: InputTransform, matrix: Float64Array, n: number): void {
  if (order) permuteSymmetric(matrix, order);
  if (signs) {
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) if (signs[i] !== signs[j]) matrix[i * n + j] = -matrix[i * n + j];
    }
  }
  if (hadamard === 0) return;
  const scale = hadamardScale(hadamard);
  for (let i = 0; i < n; i++) rotateRuns(matrix.subarray(i * n, (i + 1) * n), hadamard, scale);
  rotateRuns(matrix, hadamard, scale, n);
}

/** `matrix[i, j] <- matrix[order[i], order[j]]`, following the cycles of the permutation: one row of extra memory. */
function permuteSymmetric(matrix: Float64Array, order: Uint32Array): void {
  const n = order.length;
  const row = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    const at = i * n;
    for (let j = 0; j < n; j++) row[j] = matrix[at + order[j]];
    matrix.set(row, at);
  }
  const done = new Uint8Array(n);
  for (let first = 0; first < n; first++) {
    if (done[first] !== 0) continue;
    row.set(matrix.subarray(first * n, (first + 1) * n));
    let to = first;
    for (let from = order[to]; from !== first; from = order[to]) {
      matrix.copyWithin(to * n, from * n, (from + 1) * n);
      done[to] = 1;
      to = from;
    }
    matrix.set(row, to * n);
    done[to] = 1;
  }
}
