/** RAM+ (arXiv 2601.13572): RAM, with an expert's own changes enlarged, the more the larger the part it shares with others. */
import { activeMean, EPSILON } from './active-mean.ts';
import { defineMerger, type MergeBlock } from './merger.ts';

export const ramplus = defineMerger({
  name: 'ramplus',
  formula: 'ram, with what only expert k changed times 1 + r clip(shared_k / unique_k, 0, alpha)',
  reference: '2601.13572',
  access: 'norms',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    epsilon: EPSILON,
    r: { type: 'number', summary: 'how much of the ratio shared / unique is added', default: 0.1 },
    alpha: { type: 'number', summary: 'the largest ratio that counts', default: 0.2, min: 0 },
  },
  prepare(tensor, { epsilon, r, alpha }) {
    const shared = new Float64Array(tensor.experts.length);
    const unique = new Float64Array(tensor.experts.length);
    const scan = ({ base, experts, length }: MergeBlock): void => {
      for (let i = 0; i < length; i++) {
        let active = 0;
        for (let k = 0; k < experts.length; k++) if (Math.abs(experts[k][i] - base![i]) > epsilon) active++;
        if (active === 0) continue;
        const counts = active === 1 ? unique : shared;
        for (let k = 0; k < experts.length; k++) if (Math.abs(experts[k][i] - base![i]) > epsilon) counts[k]++;
      }
    };
    const factors = () => shared.map((count, k) => 1 + r * Math.min(alpha, count / Math.max(1, unique[k])));
    return activeMean(epsilon, factors, [{ look: scan }]);
  },
});
