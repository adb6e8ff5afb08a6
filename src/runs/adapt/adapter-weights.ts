/** A base with an adapter applied to its weights as they are read: nothing is written, and the base may be quantized. */

import { type AdapterContents, readAdapterFolder } from '../../artifacts/adapter-reader.ts';
import { assertNaturalOrder, type ModelSource } from '../../artifacts/model-source.ts';
import { transpose } from '../../artifacts/transpose.ts';
import type { Blas } from '../../compute/blas.ts';
import { RecipeError, UnsupportedError } from '../../errors.ts';
import { ROUTED_TENSORS, type RoutedShape } from '../../graph/routed-branch.ts';
import type { LinearSite, WeightReader } from '../../model/model.ts';
import { rowNorms, turnTo } from '../../model/row-norms.ts';

/** `source.weights` with the adapter in the folder `path` added. Throws as `readAdapterFolder` and `assertFits`. */
export async function withAdapter(source: ModelSource, path: string, blas: Blas): Promise<WeightReader> {
  const contents = await readAdapterFolder(path, source.tensors.tensors);
  assertFits(source, contents, `--adapter ${path}:`);
  return new AdapterWeights(source.weights, contents, blas);
}

/**
 * Throws RecipeError for layers outside the blocks and UnsupportedError for experts beside a layer that has some, or a source whose order is not that of the
 * model. @param what begins the message
 */
export function assertFits(source: ModelSource, { modules, routed, deltas }: AdapterContents, what: string): void {
  const { path, model, weights } = source;
  assertNaturalOrder(source, what);
  const sites = new Map(model.blocks.flatMap((block) => block.sites.map((site) => [site.name, site] as const)));
  const stray = [...modules, ...routed, ...deltas].find(({ name }) => !sites.has(name));
  if (stray) throw new RecipeError(`${what} "${stray.name}" is no linear layer of a block of ${path}`);
  const taken = routed.find(({ name }) => weights.routed?.(sites.get(name)!));
  if (taken) throw new UnsupportedError(`${what} "${taken.name}" of ${path} has experts of its own, and takes no others`);
}

/** `base` with an adapter on it. */
export class AdapterWeights implements WeightReader {
  readonly #base: WeightReader;
  readonly #blas: Blas;
  readonly #modules: ReadonlyMap<string, AdapterContents['modules'][number]>;
  readonly #saved: ReadonlyMap<string, AdapterContents['saved'][number]>;
  readonly #routed: ReadonlyMap<string, AdapterContents['routed'][number]>;
  readonly #deltas: ReadonlyMap<string, AdapterContents['deltas'][number]>;

  constructor(base: WeightReader, { modules, saved, routed, deltas }: AdapterContents, blas: Blas) {
    this.#base = base;
    this.#blas = blas;
    this.#modules = new Map(modules.map((module) => [module.name, module]));
    this.#routed = new Map(routed.map((module) => [module.name, module]));
    this.#deltas = new Map(deltas.map((module) => [module.name, module]));
    this.#saved = new Map(saved.map((module) => [`${module.name}.weight`, module]));
  }

  async loadSite(site: LinearSite): Promise<Float32Array> {
    const { outFeatures: rows, inFeatures: columns } = site;
    const saved = this.#saved.get(`${site.name}.weight`)?.weight;
    if (saved) return site.transposed ? transpose(saved, columns, rows) : saved;
    const weight = await this.#base.loadSite(site);
    const delta = this.#deltas.get(site.name);
    if (delta) {
      const updated = weight.slice();
      for (const [i, at] of delta.indices.entries()) updated[at] += delta.values[i];
      return updated;
    }
    const module = this.#modules.get(site.name);
    if (!module) return weight;
    const { rank, loraA, loraB, magnitude } = module;
    const out = { rows, columns, data: weight.slice() };
    const left = { rows, columns: rank, data: loraB };
    await this.#blas.gemm(left, { rows: rank, columns, data: loraA }, { beta: 1, out });
    if (magnitude) turnTo(out.data, magnitude, rowNorms(out.data, rows));
    return out.data;
  }

  routed(site: LinearSite): RoutedShape | undefined {
    return this.#routed.get(site.name)?.routed ?? this.#base.routed?.(site);
  }

  async load(name: string): Promise<Float32Array> {
    const dot = name.lastIndexOf('.');
    const experts = this.#routed.get(name.slice(0, dot));
    const key = ROUTED_TENSORS.find((one) => one === name.slice(dot + 1));
    if (experts && key) return experts[key];
    return this.#saved.get(name)?.weight ?? this.#base.load(name);
  }

  async loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    const saved = this.#saved.get(name);
    if (!saved) return this.#base.loadRows(name, start, end);
    const [, columns] = saved.shape;
    return saved.weight.subarray(start * columns, end * columns);
  }

  info(name: string) {
    return this.#base.info(name);
  }
}
