/** The weighted mean of the experts ("model soup"). The base takes part only where it is listed as an expert. */
import { defineMerger } from './merger.ts';
import { weightedSum } from './weighted-sum.ts';
import { normalizedWeights, WEIGHT } from './weights.ts';

export const linear = defineMerger({
  name: 'linear',
  formula: 'sum w_k theta_k / sum w_k',
  reference: '2203.05482',
  access: 'elementwise',
  base: 'unused',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    normalize: { type: 'boolean', summary: 'divide by the sum of the weights', default: true },
  },
  prepare(_tensor, values) {
    const coefficients = values.normalize ? normalizedWeights('linear', values.weight) : values.weight;
    return { scans: [], merge: (block) => weightedSum(block.experts, coefficients, block.output) };
  },
});
