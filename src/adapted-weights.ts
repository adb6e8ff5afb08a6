/** A frozen model with trainable low-rank updates: what a forward pass reads, and how a gradient of a weight becomes one of the factors. */
import type { Blas, Matrix } from './compute/blas.ts';
import type { TrainedModule } from './methods/rank/training/schedule.ts';
import type { LinearSite, WeightReader } from './model/model.ts';

export interface AdaptedWeightsOptions {
  readonly base: WeightReader;
  readonly modules: ReadonlyMap<string, TrainedModule>;
  readonly blas: Blas;
  /** Bytes of base weights that stay in memory once they are read. */
  readonly keptBytes: number;
}

/** `W + s B M A`, M by the adapter's form: nothing, a diagonal, or a square matrix. */
export class AdaptedWeights implements WeightReader {
  readonly #options: AdaptedWeightsOptions;
  readonly #kept = new Map<string, Float32Array>();
  #room: number;

  constructor(options: AdaptedWeightsOptions) {
    this.#options = options;
    this.#room = options.keptBytes;
  }

  async loadSite(site: LinearSite): Promise<Float32Array> {
    const module = this.#options.modules.get(site.name);
    const weight = await this.#base(site);
    if (module === undefined || module.rank === 0) return weight;
    const { left, right } = factors(module);
    const out: Matrix = { rows: site.outFeatures, columns: site.inFeatures, data: weight.slice() };
    return (await this.#options.blas.gemm(left, right, { alpha: module.scale, beta: 1, out })).data;
  }

  async load(name: string): Promise<Float32Array> {
    const known = this.#kept.get(name);
    return known ?? this.#keep(name, await this.#options.base.load(name));
  }

  loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    return this.#options.base.loadRows(name, start, end);
  }

  info(name: string) {
    return this.#options.base.info(name);
  }

  async #base(site: LinearSite): Promise<Float32Array> {
    const key = `${site.name}.weight`;
    return this.#kept.get(key) ?? this.#keep(key, await this.#options.base.loadSite(site));
  }

  #keep(key: string, values: Float32Array): Float32Array {
    if (values.byteLength > this.#room) return values;
    this.#room -= values.byteLength;
    this.#kept.set(key, values);
    return values;
  }
}

function factors({ rank, inFeatures: n, outFeatures: m, parameters }: TrainedModule): { left: Matrix; right: Matrix } {
  const right = { rows: rank, columns: n, data: parameters.get('loraA')!.values };
  const b = parameters.get('loraB')!.values;
  const e = parameters.get('e')?.values;
  const data = e ? b.map((value, i) => value * e[i % rank]) : b;
  return { left: { rows: m, columns: rank, data }, right };
}

/** Adds the gradients of a layer's factors that follow from that of its weight, (outFeatures, inFeatures). */
export async function pullBack(module: TrainedModule, gradient: Float32Array, blas: Blas): Promise<void> {
  const { rank, inFeatures: n, outFeatures: m, scale, parameters } = module;
  if (rank === 0) return;
  const g = { rows: m, columns: n, data: gradient };
  const { left, right } = factors(module);
  // d/dL <G, s L A> = s G A^T, with L = B or B diag(e).
  const ofLeft = (await blas.gemm(g, right, { transposeB: true, alpha: scale })).data;
  const ofA = (await blas.gemm(left, g, { transposeA: true, alpha: scale })).data;
  addTo(parameters.get('loraA')!.gradient, ofA);
  const b = parameters.get('loraB')!;
  const e = parameters.get('e');
  if (e === undefined) {
    addTo(b.gradient, ofLeft);
    return;
  }
  for (let j = 0; j < m; j++) {
    for (let k = 0; k < rank; k++) {
      const at = j * rank + k;
      b.gradient[at] += ofLeft[at] * e.values[k];
      e.gradient[k] += ofLeft[at] * b.values[at];
    }
  }
}

function addTo(sum: Float32Array, values: Float32Array): void {
  for (let i = 0; i < sum.length; i++) sum[i] += values[i];
}
