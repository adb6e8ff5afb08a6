/**
 * Exact selection of the largest magnitudes of a tensor that is only seen in blocks: a radix select on the float32 bit pattern with
 * the sign cleared, which orders like the magnitude. One scan counts the high half of the pattern, a second the low half where it
 * matters; where a look at some of the elements has told where that will be, the first scan counts both. Order: magnitude descending, then
 * flat index ascending, so ties at the threshold go to the elements that come first.
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

/** High halves. Kernels count each in one of two counters, this far from each other. */
const HIGHS = 0x8000;
const LOWS = 0x10000;
/** High halves to either side of a guess: a step is a change of the magnitude by 1 in 128 to 256. */
const SLACK = 1;

/** Most bytes of counters of one selection with two ends: high halves, and low ones, guessed and missed. */
export const SELECTION_BYTES = 4 * (2 * HIGHS + 2 * (2 * SLACK + 2) * LOWS);

type Counts = Uint32Array | Float64Array;

/** Counters of every pattern with these high halves. */
interface Window {
  readonly high: number;
  readonly counts: Counts;
}

export class MagnitudeSelection {
  readonly #length: number;
  #high: Counts | undefined;
  /** Per wanted k: the high half it falls into and how many of that half are still to be taken. */
  #wanted: { high: number; remaining: number }[] = [];
  /** Counted with the high halves. */
  readonly #guessed: Window[] = [];
  /** Counted by a scan of their own. */
  readonly #missing: Window[] = [];

  /** @param length how many elements the tensor has */
  constructor(length: number) {
    this.#length = length;
  }

  /** First scan: the next `count` elements. */
  countHigh(stretch: Stretch, count: number): void {
    const { values, bits } = stretch;
    this.#high ??= counters(2 * HIGHS, this.#length);
    const counts = this.#high;
    if (counts instanceof Uint32Array) vectors().countHigh(values.subarray(0, count), counts);
    else for (let i = 0; i < count; i++) counts[(bits[i] & MAGNITUDE) >>> 16]++;
    for (const window of this.#guessed) countIn(window, stretch, count);
  }

  /**
   * After `countHigh` of some elements that stand for all, before it sees all: forgets them, and from now on counts low halves too, where selections of
   * so many of all elements are likely to end.
   */
  guess(counts: readonly number[]): void {
    if (!this.#high) return;
    let seen = 0;
    for (let high = 0; high < HIGHS; high++) seen += this.#highCount(high);
    const likely = counts
      .filter((count) => count > 0)
      .map((count) => this.#find(Math.max(1, Math.round((count / this.#length) * seen))));
    for (const { high } of likely) {
      if (this.#guessed.some((window) => holds(window, high))) continue;
      const first = Math.max(0, high - SLACK);
      const end = Math.min(HIGHS, high + SLACK + 1);
      this.#guessed.push({ high: first, counts: counters((end - first) * LOWS, this.#length) });
    }
    this.#high.fill(0);
  }

  /** Between the scans: how many elements are to be selected, for each of several selections. 0 .. length. */
  choose(counts: readonly number[]): void {
    this.#wanted = counts.map((count) => (count === 0 ? { high: -1, remaining: 0 } : this.#find(count)));
    for (const { high } of this.#wanted) {
      if (high < 0 || this.#windowOf(high)) continue;
      this.#missing.push({ high, counts: counters(LOWS, this.#length) });
    }
  }

  /** After `choose`: whether the second scan may be left out. */
  get complete(): boolean {
    return this.#missing.length === 0;
  }

  /** Second scan. */
  countLow(stretch: Stretch, count: number): void {
    for (const window of this.#missing) countIn(window, stretch, count);
  }

  /** After the scans: the threshold of each selection, in the order of `choose`. */
  thresholds(): Threshold[] {
    return this.#wanted.map(({ high, remaining }) => {
      const window = high < 0 ? undefined : this.#windowOf(high);
      if (!window) return ABOVE_ALL;
      const first = (high - window.high) * LOWS;
      let ties = remaining;
      let low = LOWS - 1;
      while (ties > window.counts[first + low]) ties -= window.counts[first + low--];
      return { bits: high * LOWS + low, ties };
    });
  }

  #highCount(high: number): number {
    return this.#high![high] + this.#high![high + HIGHS];
  }

  /** The high half of the element of this rank, from 1 for the largest, and its rank among those that share it. */
  #find(rank: number): { high: number; remaining: number } {
    let remaining = rank;
    let high = HIGHS - 1;
    while (remaining > this.#highCount(high)) remaining -= this.#highCount(high--);
    return { high, remaining };
  }

  #windowOf(high: number): Window | undefined {
    return [...this.#guessed, ...this.#missing].find((window) => holds(window, high));
  }
}

function holds({ high: first, counts }: Window, high: number): boolean {
  return high >= first && high < first + counts.length / LOWS;
}

function countIn({ high, counts }: Window, { values, bits }: Stretch, count: number): void {
  const first = high * LOWS;
  if (counts instanceof Uint32Array) {
    vectors().countWithin(values.subarray(0, count), first, counts);
    return;
  }
  for (let i = 0; i < count; i++) {
    const place = (bits[i] & MAGNITUDE) - first;
    if (place >= 0 && place < counts.length) counts[place]++;
  }
}

/** The number whose pattern a threshold holds. */
export function magnitudeOf(threshold: Threshold): number {
  return new Float32Array(Int32Array.of(threshold.bits).buffer)[0];
}

function counters(size: number, length: number): Counts {
  return length < FEW ? vectors().counters(size) : new Float64Array(size);
}
