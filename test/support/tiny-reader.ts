/** A tiny model's weights as forward passes read them. */
import type { LinearSite, WeightReader } from '../../src/model/model.ts';
import type { TinyModel } from './tiny-models.ts';

/** @param moved a site whose W, (outFeatures, inFeatures), is changed by so much */
export function readerOf(tiny: TinyModel, moved?: { readonly site: string; readonly by: Float32Array }): WeightReader {
  const values = (name: string) => tiny.source.values(name)!;
  return {
    load: async (name) => values(name),
    loadRows: async (name, start, end) => {
      const columns = tiny.source.tensors.get(name)!.shape[1];
      return values(name).slice(start * columns, end * columns);
    },
    loadSite: async (site: LinearSite) => {
      const stored = values(`${site.name}.weight`);
      const { outFeatures, inFeatures, transposed } = site;
      const weight = Float32Array.from(stored, (value, i) =>
        transposed ? stored[(i % inFeatures) * outFeatures + Math.floor(i / inFeatures)] : value,
      );
      if (moved?.site === site.name) for (let i = 0; i < weight.length; i++) weight[i] += moved.by[i];
      return weight;
    },
    info: (name) => tiny.source.tensors.get(name),
  };
}
