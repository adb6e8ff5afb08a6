/** A frozen model with trainable low-rank updates: what a forward pass reads, and how a gradient of a weight becomes one of the factors. */
import type { Blas, Matrix } from '../../compute/blas.ts';
import type { Parameter } from '../../compute/optim/parameter.ts';
import type { RoutedShape } from '../../graph/routed-branch.ts';
import { kernelDelta, kernelGradients, kernelStart, nonZeros } from '../../methods/rank/kernel-delta.ts';
import type { SparseDelta, TrainedModule } from '../../methods/rank/training/schedule.ts';
import type { LinearSite, WeightReader } from '../../model/model.ts';
import { rowNorms, turnTo } from '../../model/row-norms.ts';

export interface AdaptedWeightsOptions {
  readonly base: WeightReader;
  readonly modules: ReadonlyMap<string, TrainedModule>;
  readonly blas: Blas;
  /** Bytes of base weights that stay in memory once they are read. */
  readonly keptBytes: number;
}

/**
 * `W + s B M A`, M by the adapter's form: nothing, a diagonal `e`, or a square `core`. Where there are `initialA` and `initialB`, less `s initialB initialA`;
 * where there is a `magnitude`, each row is then given that length (DoRA, arXiv 2402.09353). Of the form `kernel`: W and few non-zeros. Of the form
 * `routed`: W as it is, and the tensors of the experts beside it.
 */
export class AdaptedWeights implements WeightReader {
  readonly #options: AdaptedWeightsOptions;
  readonly #kept = new Map<string, Float32Array>();
  /** Updates of few non-zeros as they are now. */
  readonly #sparse = new Map<string, SparseDelta>();
  #room: number;

  constructor(options: AdaptedWeightsOptions) {
    this.#options = options;
    this.#room = options.keptBytes;
  }

  async loadSite(site: LinearSite): Promise<Float32Array> {
    const module = this.#options.modules.get(site.name);
    if (module === undefined || module.routed) return await this.#base(site);
    const weight = await this.#updated(site, module);
    const magnitude = module.parameters.get('magnitude');
    if (magnitude) turnTo(weight, magnitude.values, rowNorms(weight, site.outFeatures));
    return weight;
  }

  /** Adds the gradients of a layer's factors that follow from that of its weight, (outFeatures, inFeatures), which may be overwritten. */
  async pullBack(site: LinearSite, gradient: Float32Array): Promise<void> {
    const module = this.#options.modules.get(site.name);
    if (module === undefined) return;
    if (module.kernel) return await kernelGradients(this.#options.blas, module, gradient, await this.#kernelStart(module));
    const magnitude = module.parameters.get('magnitude');
    if (magnitude) {
      const weight = await this.#updated(site, module);
      const norms = rowNorms(weight, site.outFeatures);
      for (let i = 0; i < site.outFeatures; i++) {
        let along = 0;
        for (let j = i * site.inFeatures; j < (i + 1) * site.inFeatures; j++) along += gradient[j] * weight[j];
        if (norms[i] > 0) magnitude.gradient[i] += along / norms[i];
      }
      turnTo(gradient, magnitude.values, norms);
    }
    await this.#pullFactors(module, gradient);
  }

  /** Parameters have changed. */
  changed(): void {
    this.#sparse.clear();
  }

  async #addKernel(weight: Float32Array, module: TrainedModule): Promise<void> {
    let sparse = this.#sparse.get(module.name);
    if (!sparse) {
      const delta = await kernelDelta(this.#options.blas, module, await this.#kernelStart(module));
      if (module.kernel!.kept === undefined) return addTo(weight, delta);
      sparse = nonZeros(delta);
      this.#sparse.set(module.name, sparse);
    }
    const { indices, values } = sparse;
    for (let i = 0; i < indices.length; i++) weight[indices[i]] += values[i];
  }

  async #kernelStart(module: TrainedModule): Promise<Float32Array | undefined> {
    const key = `${module.name} kernel at its start`;
    const known = this.#kept.get(key);
    if (known) return known;
    const start = await kernelStart(this.#options.blas, module);
    return start && this.#keep(key, start);
  }

  routed({ name }: LinearSite): RoutedShape | undefined {
    return this.#options.modules.get(name)?.routed;
  }

  /** Adds the gradient of a tensor of experts, by the name that it is read by. */
  pullBackExperts(name: string, gradient: Float32Array): void {
    const { parameter, factor } = this.#experts(name)!;
    for (let i = 0; i < gradient.length; i++) parameter.gradient[i] += factor * gradient[i];
  }

  /** A tensor of experts, and what it is multiplied by. */
  #experts(name: string): { readonly parameter: Parameter; readonly factor: number } | undefined {
    const dot = name.lastIndexOf('.');
    const module = this.#options.modules.get(name.slice(0, dot));
    const key = name.slice(dot + 1);
    const parameter = module?.routed && module.parameters.get(key);
    return parameter && { parameter, factor: key === 'expertsB' ? module.scale : 1 };
  }

  async #pullFactors(module: TrainedModule, gradient: Float32Array): Promise<void> {
    const { blas } = this.#options;
    const { rank, inFeatures: n, outFeatures: m, scale, parameters } = module;
    if (rank === 0) return;
    const g = { rows: m, columns: n, data: gradient };
    const { left, right } = await factors(module, blas);
    // d/dL <G, s L A> = s G A^T, with L = B, B diag(e) or B C.
    const ofLeft = (await blas.gemm(g, right, { transposeB: true, alpha: scale })).data;
    addTo(parameters.get('loraA')!.gradient, (await blas.gemm(left, g, { transposeA: true, alpha: scale })).data);
    const [b, e, core] = [parameters.get('loraB')!, parameters.get('e'), parameters.get('core')];
    if (core) {
      const outer = { rows: m, columns: rank, data: ofLeft };
      addTo(b.gradient, (await blas.gemm(outer, square(core, rank), { transposeB: true })).data);
      addTo(core.gradient, (await blas.gemm({ rows: m, columns: rank, data: b.values }, outer, { transposeA: true })).data);
    } else if (e) {
      for (let at = 0; at < ofLeft.length; at++) {
        b.gradient[at] += ofLeft[at] * e.values[at % rank];
        e.gradient[at % rank] += ofLeft[at] * b.values[at];
      }
    } else addTo(b.gradient, ofLeft);
  }

  /** The weight with its update, in memory of its own. */
  async #updated(site: LinearSite, module: TrainedModule): Promise<Float32Array> {
    const { blas } = this.#options;
    const { rank, scale, parameters } = module;
    const { outFeatures: rows, inFeatures: columns } = site;
    const out: Matrix = { rows, columns, data: (await this.#base(site)).slice() };
    if (module.kernel) {
      await this.#addKernel(out.data, module);
      return out.data;
    }
    if (rank === 0) return out.data;
    const [initialA, initialB] = [parameters.get('initialA'), parameters.get('initialB')];
    if (initialA && initialB) {
      const left = { rows, columns: rank, data: initialB.values };
      await blas.gemm(left, { rows: rank, columns, data: initialA.values }, { alpha: -scale, beta: 1, out });
    }
    const { left, right } = await factors(module, blas);
    await blas.gemm(left, right, { alpha: scale, beta: 1, out });
    return out.data;
  }

  async load(name: string): Promise<Float32Array> {
    const experts = this.#experts(name);
    if (experts) return experts.parameter.values.map((value) => experts.factor * value);
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

/** B M and A. */
async function factors(module: TrainedModule, blas: Blas): Promise<{ left: Matrix; right: Matrix }> {
  const { rank, inFeatures: n, outFeatures: m, parameters } = module;
  const right = { rows: rank, columns: n, data: parameters.get('loraA')!.values };
  const b = parameters.get('loraB')!.values;
  const core = parameters.get('core');
  if (core) return { left: await blas.gemm({ rows: m, columns: rank, data: b }, square(core, rank)), right };
  const e = parameters.get('e')?.values;
  const data = e ? b.map((value, i) => value * e[i % rank]) : b;
  return { left: { rows: m, columns: rank, data }, right };
}

function square({ values }: Parameter, rank: number): Matrix {
  return { rows: rank, columns: rank, data: values };
}

function addTo(sum: Float32Array, values: Float32Array): void {
  for (let i = 0; i < sum.length; i++) sum[i] += values[i];
}
