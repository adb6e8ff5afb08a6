/** What a model's quantized modules are, in model order, for the metadata of an artifact. */
import type { Model } from '../model/model.ts';
import type { QuantizedModule } from './quant-metadata.ts';
import type { QuantizedSource } from './quantized-source.ts';

/** Sites of the blocks first, then embeddings and output head; only what `quantized` has. Widths included. */
export async function describeModules(model: Model, quantized: QuantizedSource): Promise<Map<string, QuantizedModule>> {
  const modules = new Map<string, QuantizedModule>();
  const describe = async (name: string, input: string, transposed: boolean): Promise<void> => {
    const { outFeatures, inFeatures, groupSize, bits } = await quantized.readGrid(name);
    modules.set(name, { outFeatures, inFeatures, groupSize, input, transposed, bits: [...bits] });
  };
  for (const block of model.blocks) {
    // An input goes by the name of the first module that reads it.
    const firstReader = new Map<string, string>();
    for (const site of block.sites) {
      if (!quantized.has(site.name)) continue;
      if (!firstReader.has(site.input)) firstReader.set(site.input, site.name);
      await describe(site.name, firstReader.get(site.input)!, site.transposed);
    }
  }
  for (const name of embeddingModules(model)) {
    if (quantized.has(name)) await describe(name, name, false);
  }
  return modules;
}

/** Module names of the token embedding and of the output head; one when they are tied. */
export function embeddingModules(model: Model): string[] {
  return [...new Set([model.tokenEmbedding, model.outputHead].map((tensor) => tensor.slice(0, tensor.lastIndexOf('.'))))];
}
