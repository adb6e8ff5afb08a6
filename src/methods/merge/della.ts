/** DELLA (arXiv 2406.11617): drop elements of the task vectors at random, small ones sooner, rescale, then elect signs and average what agrees. */
import { EPSILON, magnitudeProbability } from './magnitude-probability.ts';
import { defineMerger } from './merger.ts';
import { keepRandomly, RESCALE } from './random-sparsifier.ts';
import { DENSITY, LAMBDA, mergeTaskVectors } from './task-vectors.ts';
import { columnCount } from './tensor-size.ts';
import { WEIGHT } from './weights.ts';

export const della = defineMerger({
  name: 'della',
  formula:
    'theta_0 + lambda mean over agreeing signs of w_k rescale(random_p(delta_k)), p = d - eps + 2 eps rank / (columns - 1)',
  reference: '2406.11617',
  access: 'norms',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    density: DENSITY,
    epsilon: EPSILON,
    lambda: LAMBDA,
    rescale: RESCALE,
    normalize: { type: 'boolean', summary: 'divide by the weights of the experts that agree', default: true },
  },
  prepare(tensor, values, context) {
    const columns = columnCount(tensor);
    const probabilities = magnitudeProbability('della', columns, values.density, values.epsilon);
    const sparsifier = keepRandomly(tensor, context, probabilities, values.rescale, columns);
    return mergeTaskVectors(sparsifier, { ...values, consensus: true });
  },
});
