/** RAM (arXiv 2601.13572): an element that one expert changed takes that change whole, one that several changed takes the mean of theirs. */
import { activeMean, EPSILON } from './active-mean.ts';
import { defineMerger } from './merger.ts';

export const ram = defineMerger({
  name: 'ram',
  formula: 'theta_0 + mean of delta_k over the experts with |delta_k| > epsilon',
  reference: '2601.13572',
  access: 'elementwise',
  base: 'required',
  experts: { min: 1 },
  parameters: { epsilon: EPSILON },
  prepare: (tensor, { epsilon }) => activeMean(epsilon, () => new Float64Array(tensor.experts.length).fill(1)),
});
