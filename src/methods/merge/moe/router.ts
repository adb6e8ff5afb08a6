/** Rows of routers from what a base makes of each expert's prompts (merging.md 6b). */
import { eigh } from '../../../compute/linalg/eigh.ts';

export const GATES = ['hidden', 'hidden-avg', 'embed', 'random'] as const;
export type Gate = (typeof GATES)[number];

/** Mean of what is added. */
export class MeanVector {
  readonly #sum: Float64Array;
  #count = 0;

  constructor(length: number) {
    this.#sum = new Float64Array(length);
  }

  get isEmpty(): boolean {
    return this.#count === 0;
  }

  /** Adds row `index` of rows as long as the vector. */
  add(rows: Float32Array, index: number): void {
    const { length } = this.#sum;
    for (let j = 0; j < length; j++) this.#sum[j] += rows[index * length + j];
    this.#count++;
  }

  get mean(): Float64Array {
    return this.#sum.map((value) => value / Math.max(1, this.#count));
  }
}

/** The mean over positive prompts less that over negative ones, of length 1. A difference of nothing stays nothing. */
export function routerRow(positive: Float64Array, negative: Float64Array | undefined): Float32Array {
  const row = negative ? positive.map((value, j) => value - negative[j]) : positive;
  const length = Math.hypot(...row);
  return Float32Array.from(row, (value) => (length > 0 ? value / length : 0));
}

/** Largest singular value of the rows over the smallest: how nearly they point the same way. */
export function conditionOf(rows: readonly Float32Array[]): number {
  const count = rows.length;
  const gram = new Float64Array(count * count);
  for (let i = 0; i < count; i++)
    for (let j = 0; j < count; j++) gram[i * count + j] = rows[i].reduce((sum, value, k) => sum + value * rows[j][k], 0);
  const { values } = eigh(gram, count);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  return least <= 0 ? Number.POSITIVE_INFINITY : Math.sqrt(most / least);
}
