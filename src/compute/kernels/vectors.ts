/**
 * Inner loops over long vectors of float32, for merges: WASM SIMD (assembly/vectors/) with one memory for each thread. Results are those of the plain
 * loops they stand for, bit for bit; test/compute/kernels/vectors.test.ts has those. Arrays may lie anywhere; those made here are used where
 * they lie, others are copied in and out a piece at a time.
 */
import { KernelMemory } from './kernel-memory.ts';
import { VECTORS_WASM } from './vectors.generated.ts';
import { instantiate } from './wasm.ts';

/** Addresses and counts; what each does is said in assembly/vectors/. */
interface VectorExports {
  memoryStart(): number;
  areFinite(values: number, n: number): number;
  widenBf16(codes: number, out: number, n: number): number;
  widenF16(codes: number, out: number, n: number): number;
  narrowBf16(values: number, base: number, codes: number, n: number, loss: number): number;
  narrowF16(values: number, base: number, codes: number, n: number, loss: number): number;
  weightedSum(vectors: number, coefficients: number, count: number, out: number, n: number): void;
  addTaskVectors(base: number, vectors: number, coefficients: number, count: number, out: number, n: number): void;
  addScaled(base: number, vectors: number, factors: number, count: number, scale: number, out: number, n: number): void;
  subtract(x: number, y: number, out: number, n: number): void;
  electSigns(
    base: number,
    vectors: number,
    factors: number,
    weights: number,
    count: number,
    scale: number,
    mean: number,
    least: number,
    out: number,
    n: number,
  ): void;
  countHigh(values: number, n: number, counts: number): void;
  countWithin(values: number, n: number, first: number, length: number, counts: number): void;
  countEqual(values: number, n: number, bits: number): number;
  keepBetween(values: number, n: number, above: number, below: number): void;
  fillUniform(out: number, quad: number, quads: number, key0: number, key1: number): void;
  keepBelow(x: number, uniform: number, limit: number, out: number, n: number): void;
  divide(x: number, divisor: number, n: number): void;
  sumMagnitudes(x: number, n: number, sums: number): void;
  sumMagnitudePairs(x: number, y: number, n: number, sums: number): void;
  sumProducts(x: number, y: number, n: number, sums: number): void;
  sumGram(x: number, y: number, n: number, sums: number): void;
}

/** 16-bit floats. */
export type HalfDType = 'BF16' | 'F16';

/** What a sum of agreeing signs is divided by: nothing, or the sum of their weights, which may be known to have no negative one. */
export type ElectionMean = 'none' | 'positive weights' | 'any weights';
const MEANS = { none: 0, 'positive weights': 1, 'any weights': 2 } as const satisfies Record<ElectionMean, number>;

/** Elements of a piece: a few of them fit the first cache. */
const PIECE = 4096;
const MOST_VECTORS = 4096;
/** Bytes of the two areas for elements on their way between a file and float32. */
const TRANSIT_BYTES = 256 * 1024;

let own: Vectors | undefined;

/** The calling thread's. */
export function vectors(): Vectors {
  own ??= new Vectors();
  return own;
}

class Vectors {
  readonly #exports: VectorExports;
  readonly #memory = new KernelMemory();
  readonly #pointers: Uint32Array;
  readonly #factors: Float64Array;
  readonly #weights: Float64Array;
  readonly #results: Float64Array;
  /** For bytes that were just read. */
  readonly incoming: Uint8Array;
  /** For bytes that are about to be written. */
  readonly outgoing: Uint8Array;

  constructor() {
    const memory = this.#memory;
    this.#exports = instantiate(VECTORS_WASM, memory.memory);
    memory.begin(this.#exports.memoryStart());
    const at = [4, 8, 8].map((width) => memory.reserve(width * MOST_VECTORS));
    const [results, incoming, outgoing] = [64, TRANSIT_BYTES, TRANSIT_BYTES].map((bytes) => memory.reserve(bytes));
    const { buffer } = memory.memory;
    this.#pointers = new Uint32Array(buffer, at[0], MOST_VECTORS);
    this.#factors = new Float64Array(buffer, at[1], MOST_VECTORS);
    this.#weights = new Float64Array(buffer, at[2], MOST_VECTORS);
    this.#results = new Float64Array(buffer, results, 8);
    this.incoming = new Uint8Array(buffer, incoming, TRANSIT_BYTES);
    this.outgoing = new Uint8Array(buffer, outgoing, TRANSIT_BYTES);
  }

  /** Begins a piece of work. What is lent during it goes back when it ends, or with the last of those that overlap. */
  open(): Disposable {
    return this.#memory.open();
  }

  /** Memory that kernels use where it lies, not cleared; ordinary memory for a long array, or outside any piece of work. */
  floats(length: number): Float32Array {
    return this.#memory.floats(length);
  }

  /** Counters at zero, during a piece of work. */
  counters(length: number): Uint32Array {
    return this.#memory.counters(length);
  }

  areFinite(values: Float32Array): boolean {
    let finite = true;
    this.#pieces(values.length, 1, (from, count) => {
      finite = this.#exports.areFinite(this.#memory.input(values, from, count), count) !== 0 && finite;
    });
    return finite;
  }

  /** Widens codes; returns whether all are finite. @param codes at a multiple of two bytes, one code for each float of `out` */
  widen(dtype: HalfDType, codes: Uint8Array, out: Float32Array): boolean {
    const kernel = dtype === 'BF16' ? this.#exports.widenBf16 : this.#exports.widenF16;
    const words = new Uint16Array(codes.buffer, codes.byteOffset, out.length);
    let finite = true;
    this.#pieces(out.length, 2, (from, count) => {
      const to = this.#memory.room(out, from, count);
      finite = kernel(this.#memory.input(words, from, count), to.at, count) !== 0 && finite;
      to.finish();
    });
    return finite;
  }

  /**
   * Rounds to nearest even. Where a value or a code is not finite, returns so, and codes mean nothing.
   * @param codes room for the codes, at a multiple of two bytes @param loss gets the sums of `(stored - value)^2` and `(value - base)^2` added
   */
  narrow(
    dtype: HalfDType,
    values: Float32Array,
    codes: Uint8Array,
    base?: Float32Array,
    loss?: { error: number; change: number },
  ): boolean {
    const kernel = dtype === 'BF16' ? this.#exports.narrowBf16 : this.#exports.narrowF16;
    const words = new Uint16Array(codes.buffer, codes.byteOffset, values.length);
    let finite = true;
    this.#pieces(values.length, 3, (from, count) => {
      const to = this.#memory.room(words, from, count);
      const beside = base ? this.#memory.input(base, from, count) : 0;
      finite = kernel(this.#memory.input(values, from, count), beside, to.at, count, this.#results.byteOffset) !== 0 && finite;
      to.finish();
      if (!loss) return;
      loss.error += this.#results[0];
      loss.change += this.#results[1];
    });
    return finite;
  }

  /** `out = sum c_k x_k`, in float64, rounded once. */
  weightedSum(xs: readonly Float32Array[], coefficients: readonly number[], out: Float32Array): void {
    this.#factors.set(coefficients);
    this.#pieces(out.length, xs.length + 1, (from, count) => {
      this.#point(xs, from, count);
      const to = this.#memory.room(out, from, count);
      this.#exports.weightedSum(this.#pointers.byteOffset, this.#factors.byteOffset, xs.length, to.at, count);
      to.finish();
    });
  }

  /** `out = base + sum c_k (x_k - base)`, in float64, rounded once. */
  addTaskVectors(base: Float32Array, xs: readonly Float32Array[], coefficients: readonly number[], out: Float32Array): void {
    this.#factors.set(coefficients);
    this.#pieces(out.length, xs.length + 2, (from, count) => {
      this.#point(xs, from, count);
      const to = this.#memory.room(out, from, count);
      const [pointers, factors] = [this.#pointers.byteOffset, this.#factors.byteOffset];
      this.#exports.addTaskVectors(this.#memory.input(base, from, count), pointers, factors, xs.length, to.at, count);
      to.finish();
    });
  }

  /** `out = base + scale sum f_k x_k`, in float64, rounded once. All have the length of `base`, or are longer. */
  addScaled(base: Float32Array, xs: readonly Float32Array[], factors: readonly number[], scale: number, out: Float32Array): void {
    this.#factors.set(factors);
    this.#pieces(base.length, xs.length + 2, (from, count) => {
      this.#point(xs, from, count);
      const to = this.#memory.room(out, from, count);
      const beside = this.#memory.input(base, from, count);
      const [pointers, at] = [this.#pointers.byteOffset, this.#factors.byteOffset];
      this.#exports.addScaled(beside, pointers, at, xs.length, scale, to.at, count);
      to.finish();
    });
  }

  /**
   * `out = base + scale N / Z`: N the sum of `f_k x_k` and Z that of `w_k` over the experts whose `f_k x_k` has the sign of the sum of all, a sum
   * of 0 counting as positive and a zero as neither; `mean` says what stands for Z, which counts as 1 when smaller than `least`.
   */
  electSigns(
    base: Float32Array,
    xs: readonly Float32Array[],
    { factors, weights }: { readonly factors: readonly number[]; readonly weights: readonly number[] },
    { scale, mean, least }: { readonly scale: number; readonly mean: ElectionMean; readonly least: number },
    out: Float32Array,
  ): void {
    this.#factors.set(factors);
    this.#weights.set(weights);
    this.#pieces(base.length, xs.length + 2, (from, count) => {
      this.#point(xs, from, count);
      const to = this.#memory.room(out, from, count);
      this.#exports.electSigns(
        this.#memory.input(base, from, count),
        this.#pointers.byteOffset,
        this.#factors.byteOffset,
        this.#weights.byteOffset,
        xs.length,
        scale,
        MEANS[mean],
        least,
        to.at,
        count,
      );
      to.finish();
    });
  }

  /** `out = x - y`, each rounded. */
  subtract(x: Float32Array, y: Float32Array, out: Float32Array): void {
    this.#pieces(x.length, 3, (from, count) => {
      const to = this.#memory.room(out, from, count);
      this.#exports.subtract(this.#memory.input(x, from, count), this.#memory.input(y, from, count), to.at, count);
      to.finish();
    });
  }

  /** Counts the high halves of the magnitudes' bits, each in one of two counters. @param counts 2 x 2^15 of `counters` */
  countHigh(values: Float32Array, counts: Uint32Array): void {
    this.#pieces(values.length, 1, (from, count) => {
      this.#exports.countHigh(this.#memory.input(values, from, count), count, counts.byteOffset);
    });
  }

  /** Counts the magnitudes whose bits are `first` or up to a counter's place above it. @param counts of `counters` */
  countWithin(values: Float32Array, first: number, counts: Uint32Array): void {
    this.#pieces(values.length, 1, (from, count) => {
      const at = this.#memory.input(values, from, count);
      this.#exports.countWithin(at, count, first, counts.length, counts.byteOffset);
    });
  }

  /** How many magnitudes have these bits. */
  countEqual(values: Float32Array, bits: number): number {
    let total = 0;
    this.#pieces(values.length, 1, (from, count) => {
      total += this.#exports.countEqual(this.#memory.input(values, from, count), count, bits);
    });
    return total;
  }

  /** Zeros what has not magnitude bits above `above` and below `below`. */
  keepBetween(values: Float32Array, above: number, below: number): void {
    this.#pieces(values.length, 1, (from, count) => {
      const to = this.#memory.room(values, from, count, true);
      this.#exports.keepBetween(to.at, count, above, below);
      to.finish();
    });
  }

  /** The uniform numbers, 0 .. 2^24 - 1, of the elements `at .. at + out.length` of a tensor under a key of two words. */
  fillUniform(key: Uint32Array, at: number, out: Uint32Array): void {
    this.#pieces(out.length, 1, (from, count) => {
      const numbers = this.#uniform(key, at + from, count);
      out.set(new Uint32Array(this.#memory.memory.buffer, numbers, count), from);
    });
  }

  /** `out = x` where the element's uniform number is below `limit`, else 0; `at` is the index of the first in the tensor. */
  keepRandomly(x: Float32Array, key: Uint32Array, at: number, limit: number, out: Float32Array): void {
    this.#pieces(x.length, 3, (from, count) => {
      const numbers = this.#uniform(key, at + from, count);
      const to = this.#memory.room(out, from, count);
      this.#exports.keepBelow(this.#memory.input(x, from, count), numbers, limit, to.at, count);
      to.finish();
    });
  }

  /** `x /= divisor`, in float64, rounded. */
  divide(x: Float32Array, divisor: number): void {
    this.#pieces(x.length, 1, (from, count) => {
      const to = this.#memory.room(x, from, count, true);
      this.#exports.divide(to.at, divisor, count);
      to.finish();
    });
  }

  /** Adds `|x|` to the first sum, in the order of the elements. */
  sumMagnitudes(x: Float32Array, sums: Float64Array): void {
    this.#sum(x.length, sums, (from, count, at) => this.#exports.sumMagnitudes(this.#memory.input(x, from, count), count, at));
  }

  /** Adds `|x|` to the first sum and `|y|` to the second. */
  sumMagnitudePairs(x: Float32Array, y: Float32Array, sums: Float64Array): void {
    this.#sum(x.length, sums, (from, count, at) =>
      this.#exports.sumMagnitudePairs(this.#memory.input(x, from, count), this.#memory.input(y, from, count), count, at),
    );
  }

  /** Adds `x y` to the first sum. */
  sumProducts(x: Float32Array, y: Float32Array, sums: Float64Array): void {
    this.#sum(x.length, sums, (from, count, at) =>
      this.#exports.sumProducts(this.#memory.input(x, from, count), this.#memory.input(y, from, count), count, at),
    );
  }

  /** Adds `x x`, `x y` and `y y` to three sums. */
  sumGram(x: Float32Array, y: Float32Array, sums: Float64Array): void {
    this.#sum(x.length, sums, (from, count, at) =>
      this.#exports.sumGram(this.#memory.input(x, from, count), this.#memory.input(y, from, count), count, at),
    );
  }

  #sum(length: number, sums: Float64Array, add: (from: number, count: number, at: number) => void): void {
    this.#results.set(sums);
    this.#pieces(length, 2, (from, count) => add(from, count, this.#results.byteOffset));
    sums.set(this.#results.subarray(0, sums.length));
  }

  /** Address of the uniform numbers of `count` elements from `at`; quads of elements share a counter. */
  #uniform(key: Uint32Array, at: number, count: number): number {
    const skipped = at % 4;
    const quads = Math.ceil((skipped + count) / 4);
    const quad = Math.floor(at / 4);
    if (quad + quads + 4 > 2 ** 32) throw new RangeError(`element ${at} has no random number`);
    const numbers = this.#memory.stage(16 * (quads + 3));
    this.#exports.fillUniform(numbers, quad, quads, key[0], key[1]);
    return numbers + 4 * skipped;
  }

  /** Cuts a length into pieces that leave room for `arrays` of them to be copied in. */
  #pieces(length: number, arrays: number, work: (from: number, count: number) => void): void {
    const most = this.#memory.pieceLength(arrays, PIECE);
    for (let from = 0; from < length; from += most) {
      this.#memory.restage();
      work(from, Math.min(most, length - from));
    }
  }

  #point(xs: readonly Float32Array[], from: number, count: number): void {
    if (xs.length > MOST_VECTORS) throw new RangeError(`${xs.length} vectors: at most ${MOST_VECTORS} are summed`);
    for (let k = 0; k < xs.length; k++) this.#pointers[k] = this.#memory.input(xs[k], from, count);
  }
}
