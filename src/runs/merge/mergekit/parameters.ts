/** Parameters of a method, tensor by tensor, as a mergekit configuration gives them (merging.md 3.4). */
import { layerCountOf, layerOf, StackedSource } from '../../../artifacts/merge/stacked-source.ts';
import type { Merger, Parameters, ParameterValues } from '../../../methods/merge/merger.ts';
import { resolveParameters } from '../../../methods/merge/parameters.ts';
import type { MergeInputs } from '../inputs.ts';
import type { MergeRecipe } from '../recipe.ts';
import type { MergekitConfig, MergekitSlice, MergekitSource } from './config.ts';
import { rolesOf } from './inputs.ts';
import { type MergekitParameters, mergekitValueAt } from './values.ts';

/** mergekit's own memory switch: no number depends on it. */
const WITHOUT_EFFECT = 'int8_mask';

/** Levels, the nearest first: a model in a slice, the slice, the module, the whole file. @throws RecipeError for parameters that the method does not have */
export function mergekitParameters(
  merger: Merger,
  { preset }: MergeRecipe,
  config: MergekitConfig,
  { experts, template }: MergeInputs,
): (tensor: string) => ParameterValues<Parameters> {
  const labels = experts.map(({ label }) => label);
  const placeOf = slicePlaces(config, layerCountOf(template.tensors));
  return (tensor) => {
    const { slice, t } = placeOf(tensor);
    const levels = [config.parameters, config.module, slice.parameters];
    const shared = Object.assign({}, ...levels.map((level) => valuesAt(level, tensor, t))) as Record<string, unknown>;
    const own = rolesOf(config, slice).experts.map(({ parameters }: MergekitSource, k) => {
      const { tensors } = experts[k];
      const name = tensors instanceof StackedSource && tensors.tensors.has(tensor) ? tensors.ownName(tensor) : tensor;
      return valuesAt(parameters, name, t);
    });
    // What is said of the only expert is said of the merge.
    if (merger.experts.max === 1) return resolveParameters(merger, { shared: { ...shared, ...own[0] } }, labels, preset);
    const byExpert = Object.fromEntries(labels.map((label, k) => [label, own[k]]));
    return resolveParameters(merger, { shared, byExpert }, labels, preset);
  };
}

function valuesAt(parameters: MergekitParameters, tensor: string, t: number): Record<string, unknown> {
  const values: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(parameters)) {
    if (name === WITHOUT_EFFECT) continue;
    const found = mergekitValueAt(value, tensor, t);
    if (found !== undefined) values[name] = found;
  }
  return values;
}

/** A tensor's slice, and how far down that slice its layer is, 0 to 1. Outside the layers: the first slice's values at 0. */
function slicePlaces(
  { slices }: MergekitConfig,
  layerCount: number,
): (tensor: string) => { readonly slice: MergekitSlice; readonly t: number } {
  const lengths = slices.map(({ sources }) => {
    const [start, end] = sources[0].layers ?? [0, layerCount];
    return end - start;
  });
  return (tensor) => {
    let layer = layerOf(tensor);
    if (layer === undefined) return { slice: slices[0], t: 0 };
    for (const [i, length] of lengths.entries()) {
      if (layer < length) return { slice: slices[i], t: length === 1 ? 1 : layer / (length - 1) };
      layer -= length;
    }
    throw new Error(`${tensor} is beyond the ${layerCount} layers of the result`);
  };
}
