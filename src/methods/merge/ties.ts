/** TIES (Yadav et al., arXiv 2306.01708): trim each task vector to its largest entries, elect signs, average what agrees. */
import { keepRanks } from './largest.ts';
import { defineMerger } from './merger.ts';
import { DENSITY, LAMBDA, mergeTaskVectors } from './task-vectors.ts';
import { elementCount } from './tensor-size.ts';
import { WEIGHT } from './weights.ts';

export const ties = defineMerger({
  name: 'ties',
  formula: 'theta_0 + lambda mean over agreeing signs of w_k top_d(delta_k)',
  reference: '2306.01708',
  access: 'selection',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    weight: WEIGHT,
    density: DENSITY,
    lambda: LAMBDA,
    normalize: { type: 'boolean', summary: 'divide by the weights of the experts that agree', default: true },
  },
  prepare(tensor, values) {
    const n = elementCount(tensor);
    const bands = values.density.map((d) => (d < 1 ? { drop: 0, keep: Math.min(n, Math.max(1, Math.floor(d * n))) } : undefined));
    return mergeTaskVectors(keepRanks(n, bands), { ...values, consensus: true });
  },
});
