/** DARE (arXiv 2311.03099): drop elements of the task vectors at random, rescale, then add up. */
import { defineMerger } from './merger.ts';
import { constantProbability, keepRandomly, RESCALE } from './random-sparsifier.ts';
import { DENSITY, LAMBDA, mergeTaskVectors } from './task-vectors.ts';
import { WEIGHT } from './weights.ts';

export const dareLinear = defineMerger({
  name: 'dare-linear',
  formula: 'theta_0 + lambda sum w_k rescale(random_d(delta_k))',
  reference: '2311.03099',
  access: 'norms',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    density: DENSITY,
    lambda: LAMBDA,
    rescale: RESCALE,
    normalize: { type: 'boolean', summary: 'divide by the sum of the weights', default: false },
  },
  prepare(tensor, values, context) {
    const sparsifier = keepRandomly(tensor, context, values.density.map(constantProbability), values.rescale);
    return mergeTaskVectors(sparsifier, { ...values, consensus: false });
  },
});
