/** The float model that a quantized base was made from. */
import { type ModelSource, openModelSource } from '../../artifacts/model-source.ts';
import { RecipeError } from '../../errors.ts';
import type { TrainedModule } from '../../methods/rank/training/schedule.ts';

/** Opens it for `modules`. Throws RecipeError for one that is quantized, or of other shapes. */
export async function openOriginal(against: string, modules: readonly TrainedModule[]): Promise<ModelSource> {
  const original = await openModelSource(against);
  try {
    if (original.kind !== 'float')
      throw new RecipeError(`--against ${against}: is quantized itself (layout ${original.kind}); give the float model`);
    const shapes = new Map(original.model.blocks.flatMap(({ sites }) => sites.map((site) => [site.name, site])));
    for (const { name, outFeatures, inFeatures } of modules) {
      const site = shapes.get(name);
      if (site?.outFeatures === outFeatures && site.inFeatures === inFeatures) continue;
      const other = site ? `${site.outFeatures} x ${site.inFeatures}` : 'not there';
      throw new RecipeError(`--against ${against}: "${name}" is ${outFeatures} x ${inFeatures}, but ${other} in it`);
    }
    return original;
  } catch (error) {
    await original[Symbol.asyncDispose]();
    throw error;
  }
}
