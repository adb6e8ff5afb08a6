/** Task arithmetic (Ilharco et al., arXiv 2212.04089): the base plus the weighted task vectors. */
import { defineMerger } from './merger.ts';
import { divisorOf, LAMBDA } from './task-vectors.ts';
import { baseAndTaskVectors } from './weighted-sum.ts';
import { sum, WEIGHT } from './weights.ts';

export const taskArithmetic = defineMerger({
  name: 'task-arithmetic',
  formula: 'theta_0 + lambda sum w_k delta_k',
  reference: '2212.04089',
  access: 'elementwise',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    lambda: LAMBDA,
    normalize: { type: 'boolean', summary: 'divide by the sum of the weights', default: false },
  },
  prepare(_tensor, { weight, lambda, normalize }) {
    const divisor = normalize ? divisorOf(sum(weight)) : 1;
    const coefficients = weight.map((w) => (lambda * w) / divisor);
    return { scans: [], merge: (block) => baseAndTaskVectors(block.base!, block.experts, coefficients, block.output) };
  },
});
