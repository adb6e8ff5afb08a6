/** Inner products of the inputs over a whole tensor: all that methods of norms and angles need to know before they combine (merging.md 2.2). */
import { vectors } from '../../compute/kernels/vectors.ts';
import { SpanSums } from './span-sum.ts';
import { stretchLength } from './stretch.ts';

export class GramScan {
  readonly #size: number;
  /** Two vectors: their three products side by side. More: one sum for each pair, (0,0), (1,0), (1,1), (2,0) ... */
  #sums: SpanSums[];
  readonly #length = stretchLength(undefined);
  readonly #taskVectors: Float32Array[] = [];

  /** @param size how many vectors */
  constructor(size: number) {
    this.#size = size;
    this.#sums = zeros(size);
  }

  /** Forgets what was added. */
  clear(): void {
    this.#sums = zeros(this.#size);
  }

  /** Scans the next elements of all vectors. */
  add(xs: readonly Float32Array[]): void {
    for (let from = 0; from < xs[0].length; from += this.#length)
      this.#addStretch(xs.map((x) => x.subarray(from, from + this.#length)));
  }

  /** Scans the experts of a block, or their task vectors where there is a base. */
  addExperts(experts: readonly Float32Array[], base: Float32Array | undefined): void {
    if (!base) {
      this.add(experts);
      return;
    }
    while (this.#taskVectors.length < this.#size) this.#taskVectors.push(vectors().floats(this.#length));
    for (let from = 0; from < base.length; from += this.#length) {
      const part = base.subarray(from, from + this.#length);
      const own = this.#taskVectors.map((taskVector) => taskVector.subarray(0, part.length));
      for (let k = 0; k < this.#size; k++) vectors().subtract(experts[k].subarray(from, from + part.length), part, own[k]);
      this.#addStretch(own);
    }
  }

  #addStretch(xs: readonly Float32Array[]): void {
    if (this.#size === 2) {
      this.#sums[0].addGram(xs[0], xs[1]);
      return;
    }
    let pair = 0;
    for (let i = 0; i < this.#size; i++) for (let j = 0; j <= i; j++) this.#sums[pair++].addProducts(xs[i], xs[j]);
  }

  /** `<x_i, x_j>`, (size, size) row-major. */
  matrix(): Float64Array {
    const n = this.#size;
    const result = new Float64Array(n * n);
    let pair = 0;
    for (let i = 0; i < n; i++)
      for (let j = 0; j <= i; j++) {
        const total = n === 2 ? this.#sums[0].total(pair) : this.#sums[pair].total();
        result[i * n + j] = total;
        result[j * n + i] = total;
        pair++;
      }
    return result;
  }
}

function zeros(size: number): SpanSums[] {
  return size === 2 ? [new SpanSums(3)] : Array.from({ length: (size * (size + 1)) / 2 }, () => new SpanSums());
}

/** Cosine of two vectors from their Gram entries; undefined when one of them is not longer than `tiny`. */
export function cosineOf(product: number, square0: number, square1: number, tiny = 0): number | undefined {
  const norm0 = Math.sqrt(square0);
  const norm1 = Math.sqrt(square1);
  if (norm0 <= tiny || norm1 <= tiny) return undefined;
  return Math.max(-1, Math.min(1, product / norm0 / norm1));
}

/** What the great circle at angle `phi` takes of its two ends at position `t`. */
export function arc(t: number, phi: number): [number, number] {
  const sine = Math.sin(phi);
  return [Math.sin((1 - t) * phi) / sine, Math.sin(t * phi) / sine];
}
