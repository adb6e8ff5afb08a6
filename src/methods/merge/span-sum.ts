/**
 * Sums over a tensor that is seen in blocks, the same to the last bit however it is cut: partial sums over fixed spans of 65,536
 * elements, in float64 and in the order of the elements, added in the order of the spans (merging.md 2.2).
 */
import { vectors } from '../../compute/kernels/vectors.ts';

const SPAN = 65_536;

/** Several sums that are added to together: one addition waits for the last, but not for those of other sums. */
export class SpanSums {
  readonly #totals: Float64Array;
  readonly #partials: Float64Array;
  #room = SPAN;

  constructor(count = 1) {
    this.#totals = new Float64Array(count);
    this.#partials = new Float64Array(count);
  }

  /** Adds `|x|` of the next elements to the first sum. */
  addMagnitudes(x: Float32Array): void {
    this.#add(x.length, (from, to, sums) => vectors().sumMagnitudes(x.subarray(from, to), sums));
  }

  /** Adds `|x|` of the next elements to the first sum, `|y|` to the second. */
  addMagnitudePairs(x: Float32Array, y: Float32Array): void {
    this.#add(x.length, (from, to, sums) => vectors().sumMagnitudePairs(x.subarray(from, to), y.subarray(from, to), sums));
  }

  /** Adds `x y` of the next elements to the first sum. */
  addProducts(x: Float32Array, y: Float32Array): void {
    this.#add(x.length, (from, to, sums) => vectors().sumProducts(x.subarray(from, to), y.subarray(from, to), sums));
  }

  /** Adds `x x`, `x y` and `y y` of the next elements to three sums. */
  addGram(x: Float32Array, y: Float32Array): void {
    this.#add(x.length, (from, to, sums) => vectors().sumGram(x.subarray(from, to), y.subarray(from, to), sums));
  }

  #add(count: number, add: (from: number, to: number, sums: Float64Array) => void): void {
    for (let from = 0; from < count; ) {
      const to = Math.min(count, from + this.#room);
      add(from, to, this.#partials);
      this.#room -= to - from;
      from = to;
      if (this.#room > 0) continue;
      for (const [i, partial] of this.#partials.entries()) this.#totals[i] += partial;
      this.#partials.fill(0);
      this.#room = SPAN;
    }
  }

  /** Of everything added so far. */
  total(sum = 0): number {
    return this.#totals[sum] + this.#partials[sum];
  }
}
