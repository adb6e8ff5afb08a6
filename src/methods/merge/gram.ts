/** Inner products of the inputs over a whole tensor: all that methods of norms and angles need to know before they combine (merging.md 2.2). */
import { SpanSum } from './span-sum.ts';
import { allocateStretch, readTaskVector, stretchLength } from './stretch.ts';

export class GramScan {
  readonly #size: number;
  #sums: SpanSum[];
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
  add(vectors: readonly Float32Array[]): void {
    for (let from = 0; from < vectors[0].length; from += this.#length)
      this.#addStretch(vectors, from, Math.min(this.#length, vectors[0].length - from));
  }

  /** Scans the experts of a block, or their task vectors where there is a base. */
  addExperts(experts: readonly Float32Array[], base: Float32Array | undefined): void {
    if (!base) {
      this.add(experts);
      return;
    }
    while (this.#taskVectors.length < this.#size) this.#taskVectors.push(allocateStretch(this.#length).values);
    for (let from = 0; from < base.length; from += this.#length) {
      const count = Math.min(this.#length, base.length - from);
      for (let k = 0; k < this.#size; k++) readTaskVector(experts[k], base, from, count, this.#taskVectors[k]);
      this.#addStretch(this.#taskVectors, 0, count);
    }
  }

  #addStretch(vectors: readonly Float32Array[], from: number, count: number): void {
    let pair = 0;
    for (let i = 0; i < this.#size; i++)
      for (let j = 0; j <= i; j++) this.#sums[pair++].addProducts(vectors[i], vectors[j], from, count);
  }

  /** `<x_i, x_j>`, (size, size) row-major. */
  matrix(): Float64Array {
    const n = this.#size;
    const result = new Float64Array(n * n);
    let pair = 0;
    for (let i = 0; i < n; i++)
      for (let j = 0; j <= i; j++) {
        result[i * n + j] = this.#sums[pair].total;
        result[j * n + i] = this.#sums[pair++].total;
      }
    return result;
  }
}

function zeros(size: number): SpanSum[] {
  return Array.from({ length: (size * (size + 1)) / 2 }, () => new SpanSum());
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
