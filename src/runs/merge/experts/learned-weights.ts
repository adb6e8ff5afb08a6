/** The model that is being learned, as a forward pass reads it: base + start + the experts' task vectors by their coefficients. */
import type { StateStore } from '../../../calibration/state-store.ts';
import { addScaled, type Coefficients } from '../../../methods/merge/expert-merging/coefficients.ts';
import type { LinearSite, WeightReader } from '../../../model/model.ts';
import type { MergeWeights } from '../weights.ts';

/** Norms, embeddings and all else that is not learned: the base's, or moved by the mean task vector. */
export type Passive = 'base' | 'mean';

/** Merged task vectors by site name, (outFeatures, inFeatures); undefined: none, the base is the start. */
export type StartUpdates = ReadonlyMap<string, StateStore>;

export interface LearnedWeightsOptions {
  readonly weights: MergeWeights;
  readonly expertCount: number;
  readonly updates: StartUpdates | undefined;
  readonly scale: number;
  readonly passive: Passive;
  /** Absent: the start itself. */
  readonly coefficients?: Coefficients | undefined;
}

export class LearnedWeights implements WeightReader {
  readonly #options: LearnedWeightsOptions;
  readonly #base: WeightReader;
  /** Site weight -> its place among the coefficients. */
  readonly #learned: ReadonlyMap<string, number>;
  readonly #passive = new Map<string, Promise<Float32Array>>();

  constructor(options: LearnedWeightsOptions) {
    this.#options = options;
    this.#base = options.weights.base;
    this.#learned = new Map(options.coefficients?.tensors.map(({ name }, index) => [name, index]));
  }

  async loadSite(site: LinearSite): Promise<Float32Array> {
    const { weights, expertCount, coefficients } = this.#options;
    const weight = await this.#start(site);
    const index = this.#learned.get(site.name);
    if (coefficients === undefined || index === undefined) return weight;
    const { bounds } = coefficients.tensors[index];
    for (let k = 0; k < expertCount; k++) addScaled(weight, bounds, coefficients.of(index, k), weights.taskVector(k, site));
    return weight;
  }

  /** `theta(alpha) - theta_0` of a site, (outFeatures, inFeatures). */
  async update(site: LinearSite): Promise<Float32Array> {
    const base = await this.#base.loadSite(site);
    return (await this.loadSite(site)).map((value, i) => value - base[i]);
  }

  async #start(site: LinearSite): Promise<Float32Array> {
    const { updates, scale } = this.#options;
    const weight = await this.#base.loadSite(site);
    const store = updates?.get(site.name);
    if (store) {
      const update = await store.read(0, site.outFeatures);
      for (let i = 0; i < weight.length; i++) weight[i] += scale * update[i];
    }
    return weight;
  }

  load(name: string): Promise<Float32Array> {
    const known = this.#passive.get(name) ?? this.#moved(name);
    // Norms and biases are small and read again and again; tables are neither.
    if ((this.info(name)?.shape.length ?? 2) < 2) this.#passive.set(name, known);
    return known;
  }

  async loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    const rows = await this.#base.loadRows(name, start, end);
    if (this.#options.passive === 'base') return rows;
    const { weights, expertCount } = this.#options;
    for (let k = 0; k < expertCount; k++) {
      const expert = await weights.expert(k).loadRows(name, start, end);
      const own = await this.#base.loadRows(name, start, end);
      for (let i = 0; i < rows.length; i++) rows[i] += (expert[i] - own[i]) / expertCount;
    }
    return rows;
  }

  info(name: string) {
    return this.#base.info(name);
  }

  async #moved(name: string): Promise<Float32Array> {
    const values = await this.#base.load(name);
    const { weights, expertCount, passive } = this.#options;
    if (passive === 'base') return values;
    for (let k = 0; k < expertCount; k++) {
      const taskVector = weights.namedTaskVector(k, name);
      for (let i = 0; i < values.length; i++) values[i] += taskVector[i] / expertCount;
    }
    return values;
  }
}
