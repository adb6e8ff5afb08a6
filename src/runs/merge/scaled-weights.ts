/** A merge by another lambda, as a forward pass reads it: `base + lambda (merged - base)`, of a merge by lambda 1. */
import type { LinearSite, WeightReader } from '../../model/model.ts';

export class ScaledWeights implements WeightReader {
  readonly #base: WeightReader;
  readonly #merged: WeightReader;
  readonly #lambda: number;

  /** @param merged the whole model by lambda 1, in float32 */
  constructor(base: WeightReader, merged: WeightReader, lambda: number) {
    this.#base = base;
    this.#merged = merged;
    this.#lambda = lambda;
  }

  load(name: string): Promise<Float32Array> {
    return this.#scaled((weights) => weights.load(name));
  }

  loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    return this.#scaled((weights) => weights.loadRows(name, start, end));
  }

  loadSite(site: LinearSite): Promise<Float32Array> {
    return this.#scaled((weights) => weights.loadSite(site));
  }

  info(name: string) {
    return this.#base.info(name);
  }

  async #scaled(load: (weights: WeightReader) => Promise<Float32Array>): Promise<Float32Array> {
    const [base, merged] = [await load(this.#base), await load(this.#merged)];
    // A difference of float32 is exact in float64, and the sum is rounded once.
    return base.map((value, i) => value + this.#lambda * (merged[i] - value));
  }
}
