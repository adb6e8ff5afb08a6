/**
 * Closed-form low-rank compensation (adapters.md, section 6): the C of rank k with the least `E |(E - C) x|^2` is `U_k U_k^T E`, U_k being the
 * top eigenvectors of `E R E^T`. No root, no inverse, no damping; R may be singular, and fewer ranks are a part of more.
 */
import { type Blas, type Matrix, NotPositiveDefiniteError } from '../../compute/blas.ts';
import { choleskyLower } from '../../compute/linalg/cholesky.ts';
import { eigh } from '../../compute/linalg/eigh.ts';
import { gramOfRows, multiply, transposed } from '../../compute/linalg/products.ts';
import { Random } from '../../compute/random.ts';

/**
 * What inputs are taken for: `exact`, what they are (QERA-exact and EoRA have the same solution); `qera-approx`, as loud as they are and independent;
 * `zeroquant`, all alike, which is the plain singular value decomposition of E.
 */
export const COMPENSATION_VARIANTS = ['exact', 'qera-approx', 'zeroquant'] as const;
export type CompensationVariant = (typeof COMPENSATION_VARIANTS)[number];

/** How much of an error a branch of each rank makes up for. */
export interface ErrorSpectrum {
  /** Largest eigenvalues of `E R E^T`, descending and none negative: rank k takes the first k off the loss. */
  readonly values: Float64Array;
  /** `tr(E R E^T)`: the loss without a branch. */
  readonly total: number;
}

/** A branch `loraB loraA`, its factors balanced: component k has the same norm in both. */
export interface Compensation extends ErrorSpectrum {
  /** At most what was asked for: components that would be nothing are left out. */
  readonly rank: number;
  /** (rank, n). */
  readonly loraA: Float32Array;
  /** (m, rank). */
  readonly loraB: Float32Array;
}

/** Sizes (the smaller side of E) up to which the eigenvectors are exact; beyond, by iteration on a block of vectors. */
const EXACT_SIZE = 1024;
/** Singular values of E below this part of the largest are rounding. */
const NOTHING = 1e-7;
/** Vectors beside those asked for, and passes over the error. */
const EXTRA = 10;
const PASSES = 4;
/** Rows of R that are float32 at a time. */
const STRIP = 512;
/** Components with less of the largest eigenvalue are rounding. */
const RANK_GUARD = 1e-12;

/** The `count` largest eigenvalues; `error` is (m, n), `gram` R (n, n). */
export async function errorSpectrum(blas: Blas, error: Matrix, gram: Float64Array, count: number): Promise<ErrorSpectrum> {
  const { values, total } = await leading(blas, error, gram, count);
  return { values, total };
}

/**
 * The best branch of rank `rank` for an error (m, n) of a weight whose input has second moments `gram` (n, n); without them, inputs are all alike. Deterministic.
 */
export async function compensate(
  blas: Blas,
  error: Matrix,
  gram: Float64Array | undefined,
  rank: number,
  variant: CompensationVariant = 'exact',
): Promise<Compensation> {
  const { rows: m, columns: n } = error;
  const { values, vectors, total } = await leading(blas, error, momentsOf(variant, gram, n), rank);
  let kept = 0;
  while (kept < values.length && values[kept] > RANK_GUARD * values[0]) kept++;
  const top = { rows: kept, columns: m, data: Float32Array.from(vectors.subarray(0, kept * m)) };
  const projected = kept === 0 ? new Float32Array(0) : (await blas.gemm(top, error)).data;
  const loraA = new Float32Array(kept * n);
  const loraB = new Float32Array(m * kept);
  for (let k = 0; k < kept; k++) {
    const row = projected.subarray(k * n, (k + 1) * n);
    const norm = Math.sqrt(row.reduce((sum, value) => sum + value * value, 0));
    const balance = norm > 0 ? Math.sqrt(norm) : 1;
    for (let j = 0; j < n; j++) loraA[k * n + j] = row[j] / balance;
    for (let i = 0; i < m; i++) loraB[i * kept + k] = vectors[k * m + i] * balance;
  }
  return { rank: kept, loraA, loraB, values: values.slice(0, kept), total };
}

/** Part of the mean diagonal that keeps `A R A^T` invertible where rows of A are nothing or nearly the same. */
const REFIT_DAMPING = 1e-6;

/**
 * The B (m, rank) that makes the best of an A (rank, n) which is no longer what it was: `E R A^T (A R A^T)^-1`. Undefined where the moments of A are
 * too close to singular.
 */
export async function refit(
  blas: Blas,
  error: Matrix,
  gram: Float64Array,
  { rank, loraA }: { readonly rank: number; readonly loraA: Float32Array },
  variant: CompensationVariant = 'exact',
): Promise<Float32Array | undefined> {
  const { rows: m, columns: n } = error;
  const a = { rows: rank, columns: n, data: loraA };
  const weighed = momentsOf(variant, gram, n);
  const moments = weighed ? await timesMoments(blas, a, weighed) : a;
  const square = Float64Array.from((await blas.gemm(moments, a, { transposeB: true })).data);
  const right = (await blas.gemm(moments, error, { transposeB: true })).data;
  let diagonal = 0;
  for (let k = 0; k < rank; k++) diagonal += square[k * rank + k] / rank;
  for (let k = 0; k < rank; k++) square[k * rank + k] += REFIT_DAMPING * diagonal;
  const factor = symmetric(square, rank);
  try {
    choleskyLower(factor, rank);
  } catch (failure) {
    if (failure instanceof NotPositiveDefiniteError) return undefined;
    throw failure;
  }
  const loraB = new Float32Array(m * rank);
  const x = new Float64Array(rank);
  for (let i = 0; i < m; i++) {
    for (let k = 0; k < rank; k++) {
      let sum = right[k * m + i];
      for (let l = 0; l < k; l++) sum -= factor[k * rank + l] * x[l];
      x[k] = sum / factor[k * rank + k];
    }
    for (let k = rank - 1; k >= 0; k--) {
      let sum = x[k];
      for (let l = k + 1; l < rank; l++) sum -= factor[l * rank + k] * x[l];
      x[k] = sum / factor[k * rank + k];
      loraB[i * rank + k] = x[k];
    }
  }
  return loraB;
}

/** Undefined for the identity, which leaves out products with it. */
function momentsOf(variant: CompensationVariant, gram: Float64Array | undefined, n: number): Float64Array | undefined {
  if (variant === 'zeroquant') return undefined;
  if (variant === 'exact' || gram === undefined) return gram;
  const diagonal = new Float64Array(n * n);
  for (let j = 0; j < n; j++) diagonal[j * n + j] = gram[j * n + j];
  return diagonal;
}

interface Leading extends ErrorSpectrum {
  /** Row k is the eigenvector of `values[k]`, of length 1; (values.length, m). */
  readonly vectors: Float64Array;
}

/** `tr(E R E^T)`: what an error (m, n) of a weight costs. */
export async function errorEnergy(blas: Blas, error: Matrix, gram: Float64Array): Promise<number> {
  return traceWith(error, await timesMoments(blas, error, gram));
}

/** `tr(A E^T)`, none negative. */
function traceWith(error: Matrix, product: Matrix): number {
  let total = 0;
  for (let i = 0; i < product.data.length; i++) total += product.data[i] * error.data[i];
  return Math.max(0, total);
}

async function leading(blas: Blas, error: Matrix, gram: Float64Array | undefined, wanted: number): Promise<Leading> {
  const { rows: m, columns: n } = error;
  const count = Math.min(wanted, m, n);
  const product = gram ? await timesMoments(blas, error, gram) : error;
  const total = traceWith(error, product);
  if (Math.min(m, n) > EXACT_SIZE) return { ...(await iterate(blas, error, product, count)), total };
  if (n < m) return { ...tall(error, gram, count), total };
  const square = Float64Array.from((await blas.gemm(product, error, { transposeB: true })).data);
  const { values, vectors } = eigh(symmetric(square, m), m);
  return { values: values.slice(0, count).map(positive), vectors: vectors.slice(0, count * m), total };
}

function positive(value: number): number {
  return Math.max(0, value);
}

/** For more outputs than inputs: with `E = W S V^T`, `E R E^T = W (S V^T R V S) W^T`, and the middle is (n, n) at most. */
function tall({ rows: m, columns: n, data }: Matrix, gram: Float64Array | undefined, count: number): Omit<Leading, 'total'> {
  const columns = transposed(Float64Array.from(data), m, n);
  const { values: squares, vectors: right } = eigh(gramOfRows(columns, n, m), n);
  let rank = 0;
  while (rank < n && squares[rank] > NOTHING ** 2 * squares[0]) rank++;
  const basis = right.slice(0, rank * n);
  const kept = Math.min(count, rank);
  // Rows of W^T, from E = W S V^T.
  const left = multiply(basis, columns, rank, n, m).map((value, i) => value / Math.sqrt(squares[Math.floor(i / m)]));
  if (gram === undefined) return { values: squares.slice(0, kept).map(positive), vectors: left.slice(0, kept * m) };
  const scaled = basis.map((value, i) => value * Math.sqrt(squares[Math.floor(i / n)]));
  const middle = multiply(multiply(scaled, gram, rank, n, n), transposed(scaled, rank, n), rank, n, rank);
  const { values, vectors } = eigh(symmetric(middle, rank), rank);
  return { values: values.slice(0, kept).map(positive), vectors: multiply(vectors.slice(0, kept * rank), left, kept, rank, m) };
}

/** Subspace iteration with `E R E^T = (E R) E^T`, ended by the eigenvectors within the subspace. */
async function iterate(blas: Blas, error: Matrix, product: Matrix, count: number): Promise<Omit<Leading, 'total'>> {
  const m = error.rows;
  const width = Math.min(count + EXTRA, m);
  const random = new Random(0, 'low-rank compensation');
  let rows: Float64Array = Float64Array.from({ length: width * m }, () => random.nextFloat() - 0.5);
  const times = async (vectors: Float64Array): Promise<Float64Array> => {
    const block = { rows: width, columns: m, data: Float32Array.from(vectors) };
    const inner = await blas.gemm(block, product);
    return Float64Array.from((await blas.gemm(inner, error, { transposeB: true })).data);
  };
  for (let pass = 0; pass < PASSES; pass++) rows = orthonormal(await times(rows), width, m);
  const within = multiply(rows, transposed(await times(rows), width, m), width, m, width);
  const { values, vectors } = eigh(symmetric(within, width), width);
  return {
    values: values.slice(0, count).map(positive),
    vectors: multiply(vectors.slice(0, count * width), rows, count, width, m),
  };
}

/** `E R`, a strip of R at a time. */
async function timesMoments(blas: Blas, error: Matrix, gram: Float64Array): Promise<Matrix> {
  const { rows: m, columns: n } = error;
  const out = new Float32Array(m * n);
  for (let start = 0; start < n; start += STRIP) {
    const end = Math.min(start + STRIP, n);
    const strip = { rows: end - start, columns: n, data: Float32Array.from(gram.subarray(start * n, end * n)) };
    // R is symmetric: its rows are its columns.
    const { data } = await blas.gemm(error, strip, { transposeB: true });
    for (let i = 0; i < m; i++) out.set(data.subarray(i * (end - start), (i + 1) * (end - start)), i * n + start);
  }
  return { rows: m, columns: n, data: out };
}

/** Exactly symmetric, in place. */
function symmetric(matrix: Float64Array, n: number): Float64Array {
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < i; j++) {
      const mean = (matrix[i * n + j] + matrix[j * n + i]) / 2;
      matrix[i * n + j] = mean;
      matrix[j * n + i] = mean;
    }
  }
  return matrix;
}

/** Rows made orthonormal in order, each twice; what depends on earlier ones becomes zero. In place. */
function orthonormal(rows: Float64Array, count: number, m: number): Float64Array {
  for (let k = 0; k < count; k++) {
    const row = rows.subarray(k * m, (k + 1) * m);
    const before = Math.sqrt(dot(row, row));
    for (let round = 0; round < 2; round++) {
      for (let j = 0; j < k; j++) {
        const other = rows.subarray(j * m, (j + 1) * m);
        const along = dot(row, other);
        for (let i = 0; i < m; i++) row[i] -= along * other[i];
      }
    }
    const norm = Math.sqrt(dot(row, row));
    const scale = norm > 1e-10 * before ? 1 / norm : 0;
    for (let i = 0; i < m; i++) row[i] *= scale;
  }
  return rows;
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
