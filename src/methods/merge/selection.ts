/**
 * Exact selection of the largest magnitudes of a tensor that is only seen in blocks: a radix select on the float32 bit pattern with
 * the sign cleared, which orders like the magnitude. One scan counts the high half of the pattern, a second the low half where it
 * matters. Order: magnitude descending, then flat index ascending, so ties at the threshold go to the elements that come first.
 */
import { vectors } from '../../compute/kernels/vectors.ts';
import type { Stretch } from './stretch.ts';

/** The `k` largest magnitudes: all whose bits exceed `bits`, and the first `ties` elements whose bits equal it. */
export interface Threshold {
  readonly bits: number;
  readonly ties: number;
}

const ABOVE_ALL: Threshold = { bits: 0x7fffffff, ties: 0 };
const MAGNITUDE = 0x7fffffff;

/** Tensors of fewer elements than this have 32-bit counters, which kernels count in. */
const FEW = 2 ** 32;

type Counts = Uint32Array | Float64Array;

export class MagnitudeSelection {
  readonly #length: number;
  #high: Counts | undefined;
  /** Per wanted k: the high half it falls into and how many of that half are still to be taken. */
  #wanted: { high: number; remaining: number }[] = [];
  readonly #low = new Map<number, Counts>();

  /** @param length how many elements the tensor has */
  constructor(length: number) {
    this.#length = length;
  }

  /** First scan: the next `count` elements. */
  countHigh({ values, bits }: Stretch, count: number): void {
    this.#high ??= counters(0x8000, this.#length);
    const counts = this.#high;
    if (counts instanceof Uint32Array) vectors().countHigh(values.subarray(0, count), counts);
    else for (let i = 0; i < count; i++) counts[(bits[i] & MAGNITUDE) >>> 16]++;
  }

  /** Between the scans: how many elements are to be selected, for each of several selections. 0 .. length. */
  choose(counts: readonly number[]): void {
    this.#wanted = counts.map((count) => {
      if (count === 0) return { high: -1, remaining: 0 };
      let remaining = count;
      let high = 0x7fff;
      while (remaining > this.#high![high]) remaining -= this.#high![high--];
      return { high, remaining };
    });
    for (const { high } of this.#wanted) if (high >= 0) this.#low.set(high, counters(0x10000, this.#length));
  }

  /** Second scan. */
  countLow({ values, bits }: Stretch, count: number): void {
    for (const [high, counts] of this.#low) {
      if (counts instanceof Uint32Array) vectors().countLow(values.subarray(0, count), high, counts);
      else for (let i = 0; i < count; i++) if ((bits[i] & MAGNITUDE) >>> 16 === high) counts[bits[i] & 0xffff]++;
    }
  }

  /** After the scans: the threshold of each selection, in the order of `choose`. */
  thresholds(): Threshold[] {
    return this.#wanted.map(({ high, remaining }) => {
      const counts = this.#low.get(high);
      if (!counts) return ABOVE_ALL;
      let ties = remaining;
      let low = 0xffff;
      while (ties > counts[low]) ties -= counts[low--];
      return { bits: high * 0x10000 + low, ties };
    });
  }
}

/** The number whose pattern a threshold holds. */
export function magnitudeOf(threshold: Threshold): number {
  return new Float32Array(Int32Array.of(threshold.bits).buffer)[0];
}

function counters(size: number, length: number): Counts {
  return length < FEW ? vectors().counters(size) : new Float64Array(size);
}
