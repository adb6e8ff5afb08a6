/** The factor U of a damped Hessian, `H^-1 = U^T U`, computed once per site input and shared by the sites that read it. */
import type { CalibrationStats } from '../../calibration/statistics.ts';
import { type Matrix, NotPositiveDefiniteError, type UpperFactor } from '../../compute/blas.ts';
import { UnsupportedError } from '../../errors.ts';
import type { LinearSite } from '../../model/model.ts';
import { columnRange } from './columns.ts';
import type { QuantizeContext } from './quantizer.ts';

/** More damping after a failed factorization, as a fraction of the mean diagonal (slim-llm, section 9). */
const DAMPENING_STEP = 0.01;
/** With as much damping as the mean diagonal any true Hessian factors; beyond it the matrix is not one. */
const DAMPENING_LIMIT = 1;
/** Columns transposed together, so that the cache lines written to are filled. */
const TILE = 32;

/** Upper triangular U of the columns in visiting order, as float32, row after row without the zeros: half the memory of a square. */
export class DampedFactor {
  /** Columns of W in the order they are visited. */
  readonly order: Uint32Array;
  /** Columns whose input is always zero: their weights are taken as zero (slim-llm 4.1). */
  readonly dead: ReadonlySet<number>;
  /** Damping that was needed. */
  readonly dampening: number;
  readonly #packed: Float32Array;

  constructor(upper: UpperFactor, order: Uint32Array, dead: ReadonlySet<number>, dampening: number) {
    const n = order.length;
    this.order = order;
    this.dead = dead;
    this.dampening = dampening;
    this.#packed = new Float32Array((n * (n + 1)) / 2);
    for (let j = 0; j < n; j++) upper.readRow(j, this.#packed.subarray(this.#rowStart(j), this.#rowStart(j + 1)));
  }

  get features(): number {
    return this.order.length;
  }

  /** U of visited columns [start, end) among themselves, (end - start, end - start). */
  diagonalBlock(start: number, end: number): Float32Array {
    const width = end - start;
    const block = new Float32Array(width * width);
    for (let j = start; j < end; j++) {
      const row = this.#rowStart(j);
      block.set(this.#packed.subarray(row, row + end - j), (j - start) * width + j - start);
    }
    return block;
  }

  /** U of visited columns [start, end) against later ones [from, to), transposed: (to - from, end - start). */
  laterBlock(start: number, end: number, from: number, to: number): Matrix {
    const columns = end - start;
    const data = new Float32Array((to - from) * columns);
    for (let tile = from; tile < to; tile += TILE) {
      const tileEnd = Math.min(tile + TILE, to);
      for (let j = start; j < end; j++) {
        const row = this.#rowStart(j) - j;
        for (let k = tile; k < tileEnd; k++) data[(k - from) * columns + j - start] = this.#packed[row + k];
      }
    }
    return { rows: to - from, columns, data };
  }

  /** Rows [start, end) of U from column `start` on, dense: (end - start, features - start). */
  rowStrip(start: number, end: number): Matrix {
    const columns = this.features - start;
    const data = new Float32Array((end - start) * columns);
    for (let j = start; j < end; j++) {
      const row = this.#rowStart(j);
      data.set(this.#packed.subarray(row, row + this.features - j), (j - start) * columns + j - start);
    }
    return { rows: end - start, columns, data };
  }

  /** `U_jj^2`, by visited column: the reciprocal of what later inputs cannot explain of input j. */
  squaredDiagonal(): Float64Array {
    return Float64Array.from({ length: this.features }, (_, j) => this.#packed[this.#rowStart(j)] ** 2);
  }

  /** `[H^-1]_jj = sum_k U_kj^2`, by visited column. */
  inverseDiagonal(): Float64Array {
    const diagonal = new Float64Array(this.features);
    for (let k = 0; k < this.features; k++) {
      const row = this.#rowStart(k);
      for (let j = k; j < this.features; j++) diagonal[j] += this.#packed[row + j - k] ** 2;
    }
    return diagonal;
  }

  /** Where U_jj lies. */
  #rowStart(j: number): number {
    return j * this.features - (j * (j - 1)) / 2;
  }
}

// Entries live as long as the statistics they come from: a block's factors go when its measurements go.
const shared = new WeakMap<CalibrationStats, Map<string, Promise<DampedFactor>>>();

/**
 * The factor for `context.options.dampening`, in natural column order or by descending Hessian diagonal. Computed on first use; a retry
 * with more damping is noted for the site that asked first.
 */
export function dampedFactor(
  context: QuantizeContext,
  site: LinearSite,
  stats: CalibrationStats,
  order: 'natural' | 'descending',
): Promise<DampedFactor> {
  let factors = shared.get(stats);
  if (!factors) {
    factors = new Map();
    shared.set(stats, factors);
  }
  const key = `${order} ${context.options.dampening}`;
  let factor = factors.get(key);
  if (!factor) {
    factor = computeFactor(context, site, stats, order);
    factors.set(key, factor);
  }
  return factor;
}

async function computeFactor(
  context: QuantizeContext,
  site: LinearSite,
  stats: CalibrationStats,
  orderName: 'natural' | 'descending',
): Promise<DampedFactor> {
  const n = stats.features;
  const diagonal = Float64Array.from({ length: n }, (_, j) => stats.hessian[j * n + j]);
  const broken = diagonal.findIndex((value) => !Number.isFinite(value) || value < 0);
  if (broken >= 0) {
    throw new UnsupportedError(
      `${site.name}: channel ${broken} of its calibration activations has mean square ${diagonal[broken]}; it must be finite.`,
    );
  }
  const order = columnRange(0, n);
  if (orderName === 'descending') order.sort((a, b) => diagonal[b] - diagonal[a] || a - b);
  const dead = new Set<number>(order.filter((j) => diagonal[j] === 0));
  const hessian = stats.hessian;
  const damp = orderName === 'natural' ? withDiagonal : withPermutedDiagonal;
  for (let dampening = context.options.dampening; ; dampening += DAMPENING_STEP) {
    try {
      const upper = await damp(hessian, order, dampedDiagonal(diagonal, dampening), (damped) =>
        context.blas.inverseFactor(damped, n),
      );
      return new DampedFactor(upper, order, dead, dampening);
    } catch (error) {
      if (!(error instanceof NotPositiveDefiniteError)) throw error;
      if (dampening > DAMPENING_LIMIT) {
        throw new UnsupportedError(
          `${site.name}: its Hessian cannot be factored with damping up to ${DAMPENING_LIMIT}: ${error.message}.`,
        );
      }
      const more = (dampening + DAMPENING_STEP).toFixed(3);
      context.note(site, `Hessian of ${stats.input} is not positive definite; damping raised to ${more}`);
    }
  }
}

/** Diagonal of the matrix to factor: dead columns get 1, then all get `dampening` times the mean (slim-llm 4.1). */
function dampedDiagonal(diagonal: Float64Array, dampening: number): Float64Array {
  const live = diagonal.map((value) => (value === 0 ? 1 : value));
  const mean = live.reduce((sum, value) => sum + value, 0) / live.length;
  return live.map((value) => value + dampening * mean);
}

/** What is done with H while it has another diagonal. */
type UseHessian = (damped: Float64Array) => Promise<UpperFactor>;

/**
 * H itself, its diagonal exchanged while it is used: for 11008 inputs a copy would be another 969 MB at the moment of highest memory.
 * Nobody else computes with the statistics of an input while one of its sites is being quantized.
 */
async function withDiagonal(
  hessian: Float64Array,
  order: Uint32Array,
  diagonal: Float64Array,
  use: UseHessian,
): Promise<UpperFactor> {
  const n = order.length;
  const original = Float64Array.from({ length: n }, (_, j) => hessian[j * n + j]);
  const write = (values: Float64Array) => {
    for (let j = 0; j < n; j++) hessian[j * n + j] = values[j];
  };
  write(diagonal);
  try {
    return await use(hessian);
  } finally {
    write(original);
  }
}

/** A copy of H with rows and columns in visiting order. */
function withPermutedDiagonal(
  hessian: Float64Array,
  order: Uint32Array,
  diagonal: Float64Array,
  use: UseHessian,
): Promise<UpperFactor> {
  const n = order.length;
  const damped = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    const source = order[i] * n;
    for (let j = 0; j < n; j++) damped[i * n + j] = hessian[source + order[j]];
    damped[i * n + i] = diagonal[order[i]];
  }
  return use(damped);
}
