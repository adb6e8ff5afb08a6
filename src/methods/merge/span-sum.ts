/**
 * Sums over a tensor that is seen in blocks, the same to the last bit however it is cut: partial sums over fixed spans of 65,536
 * elements, in float64, added in the order of the spans (merging.md 2.2).
 */
const SPAN = 65_536;

export class SpanSum {
  #total = 0;
  #partial = 0;
  #room = SPAN;

  /** Adds `|x|` of the next `count` elements, `x[from ..]`. */
  addMagnitudes(x: Float32Array, from: number, count: number): void {
    const end = from + count;
    for (let at = from; at < end; ) {
      const stop = Math.min(end, at + this.#room);
      this.#room -= stop - at;
      let sum = this.#partial;
      for (; at < stop; at++) sum += Math.abs(x[at]);
      this.#close(sum);
    }
  }

  /** Adds `x y` of the next `count` elements. */
  addProducts(x: Float32Array, y: Float32Array, from: number, count: number): void {
    const end = from + count;
    for (let at = from; at < end; ) {
      const stop = Math.min(end, at + this.#room);
      this.#room -= stop - at;
      let sum = this.#partial;
      for (; at < stop; at++) sum += x[at] * y[at];
      this.#close(sum);
    }
  }

  #close(partial: number): void {
    this.#partial = partial;
    if (this.#room > 0) return;
    this.#total += partial;
    this.#partial = 0;
    this.#room = SPAN;
  }

  /** Of everything added so far. */
  get total(): number {
    return this.#total + this.#partial;
  }
}
