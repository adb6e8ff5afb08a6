/** Model Breadcrumbs (arXiv 2312.06795): drop the largest and the small entries of each task vector, keep those between. */
import { GAMMA, middleBand } from './breadcrumbs-band.ts';
import { keepRanks } from './largest.ts';
import { defineMerger } from './merger.ts';
import { DENSITY, LAMBDA, mergeTaskVectors } from './task-vectors.ts';
import { elementCount } from './tensor-size.ts';
import { WEIGHT } from './weights.ts';

export const breadcrumbs = defineMerger({
  name: 'breadcrumbs',
  formula: 'theta_0 + lambda sum w_k middle(delta_k): the top gamma dropped, the next d kept',
  reference: '2312.06795',
  access: 'selection',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    density: DENSITY,
    gamma: GAMMA,
    lambda: LAMBDA,
    normalize: { type: 'boolean', summary: 'divide by the sum of the weights', default: false },
  },
  prepare(tensor, values) {
    const n = elementCount(tensor);
    const bands = values.density.map((d, k) => middleBand(n, d, values.gamma[k]));
    return mergeTaskVectors(keepRanks(n, bands), { ...values, consensus: false });
  },
});
