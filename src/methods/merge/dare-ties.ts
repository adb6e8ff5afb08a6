/** DARE (arXiv 2311.03099): drop elements of the task vectors at random, rescale, then elect signs as TIES does. */
import { defineMerger } from './merger.ts';
import { constantProbability, keepRandomly, RESCALE } from './random-sparsifier.ts';
import { DENSITY, LAMBDA, mergeTaskVectors } from './task-vectors.ts';
import { WEIGHT } from './weights.ts';

export const dareTies = defineMerger({
  name: 'dare-ties',
  formula: 'theta_0 + lambda sum over agreeing signs of w_k rescale(random_d(delta_k))',
  reference: '2311.03099',
  access: 'norms',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    density: DENSITY,
    lambda: LAMBDA,
    rescale: RESCALE,
    normalize: { type: 'boolean', summary: 'divide by the weights of the experts that agree', default: false },
  },
  prepare(tensor, values, context) {
    const sparsifier = keepRandomly(tensor, context, values.density.map(constantProbability), values.rescale);
    return mergeTaskVectors(sparsifier, { ...values, consensus: true });
  },
});
