/** Weights that are read again and again: those that fit stay in memory. */
import type { LinearSite, WeightReader } from '../model/model.ts';

export class KeptWeights implements WeightReader {
  readonly #weights: WeightReader;
  readonly #kept = new Map<string, Float32Array>();
  #room: number;

  /** @param bytes most that is kept */
  constructor(weights: WeightReader, bytes: number) {
    this.#weights = weights;
    this.#room = bytes;
  }

  load(name: string): Promise<Float32Array> {
    return this.#get(name, () => this.#weights.load(name));
  }

  loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    return this.#weights.loadRows(name, start, end);
  }

  loadSite(site: LinearSite): Promise<Float32Array> {
    return this.#get(`site ${site.name}`, () => this.#weights.loadSite(site));
  }

  info(name: string) {
    return this.#weights.info(name);
  }

  async #get(key: string, read: () => Promise<Float32Array>): Promise<Float32Array> {
    const known = this.#kept.get(key);
    if (known) return known;
    const values = await read();
    if (values.byteLength <= this.#room) {
      this.#room -= values.byteLength;
      this.#kept.set(key, values);
    }
    return values;
  }
}
