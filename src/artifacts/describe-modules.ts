/** What a model's quantized modules are, in model order, for the metadata of an artifact. */
import { type InputTransform, shapeOfTransform } from '../methods/quantize/input-transform.ts';
import type { Model } from '../model/model.ts';
import type { QuantizedModule } from './quant-metadata.ts';
import type { QuantizedSource } from './quantized-source.ts';
import { sameTransform } from './stored-order.ts';

/** Sites of the blocks first, then embeddings and output head; only what `quantized` has. Widths included. */
export async function describeModules(model: Model, quantized: QuantizedSource): Promise<Map<string, QuantizedModule>> {
  const modules = new Map<string, QuantizedModule>();
  const describe = async (name: string, input: string, transposed: boolean): Promise<InputTransform | undefined> => {
    const { outFeatures, inFeatures, groupSize, bits, transform, lowRank } = await quantized.readGrid(name);
    const shape = { outFeatures, inFeatures, groupSize, input, transposed, bits: [...bits] };
    const module = lowRank ? { ...shape, rank: lowRank.rank } : shape;
    modules.set(name, transform ? { ...module, transform: shapeOfTransform(transform) } : module);
    return transform;
  };
  for (const block of model.blocks) {
    // An input goes by the name of the first module that reads it.
    const firstReader = new Map<string, { readonly name: string; readonly transform: InputTransform | undefined }>();
    for (const site of block.sites) {
      if (!quantized.has(site.name)) continue;
      const first = firstReader.get(site.input);
      const transform = await describe(site.name, first?.name ?? site.name, site.transposed);
      if (!first) firstReader.set(site.input, { name: site.name, transform });
      else if (!sameTransform(first.transform, transform)) {
        throw new Error(`${site.name} and ${first.name} read one input and transform it differently. This is a bug in pcomp.`);
      }
    }
  }
  for (const name of embeddingModules(model)) {
    if (!quantized.has(name) || (await describe(name, name, false)) === undefined) continue;
    throw new Error(`${name} has its input transformed, which tables cannot have. This is a bug in pcomp.`);
  }
  return modules;
}

/** Module names of the token embedding and of the output head; one when they are tied. */
export function embeddingModules(model: Model): string[] {
  return [...new Set([model.tokenEmbedding, model.outputHead].map((tensor) => tensor.slice(0, tensor.lastIndexOf('.'))))];
}
