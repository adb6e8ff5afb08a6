/** The mean direction of several experts, at their mean length. */
import { GramScan } from './gram.ts';
import { defineMerger } from './merger.ts';
import { baseAndTaskVectors, weightedSum } from './weighted-sum.ts';
import { normalizedWeights, WEIGHT } from './weights.ts';

/** A vector not longer than this has no direction. */
const TINY = 1e-8;

export const multislerp = defineMerger({
  name: 'multislerp',
  formula: '(m / |m|) sum w_k |x_k|, m = sum w_k x_k / |x_k|, sum w = 1; x = theta, or delta and + theta_0',
  reference: 'https://github.com/arcee-ai/mergekit',
  access: 'gram',
  base: 'optional',
  experts: { min: 1 },
  parameters: { weight: WEIGHT },
  prepare(tensor, values, context) {
    // mergekit adds a step in the tangent space at the mean, which is zero: mean and tangent use the same weights (merging.md 4).
    const weight = normalizedWeights('multislerp', values.weight);
    const gram = new GramScan(weight.length);
    let coefficients: readonly number[] | undefined;
    const solve = (): readonly number[] => {
      const n = weight.length;
      const products = gram.matrix();
      const norms = weight.map((_, k) => Math.sqrt(products[k * n + k]));
      const direction = weight.map((w, k) => (norms[k] > TINY ? w / norms[k] : 0));
      if (direction.every((c) => c === 0)) return weight;
      let square = 0;
      for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) square += direction[i] * direction[j] * products[i * n + j];
      const length = Math.sqrt(Math.max(0, square));
      if (length < TINY) {
        context.note(tensor, 'the directions of the experts cancel out: merged by the weighted mean instead');
        return weight;
      }
      const scale = weight.reduce((total, w, k) => total + w * norms[k], 0) / length;
      return direction.map((c) => c * scale);
    };
    return {
      scans: [{ look: (block) => gram.addExperts(block.experts, block.base) }],
      merge(block) {
        coefficients ??= solve();
        return block.base
          ? baseAndTaskVectors(block.base, block.experts, coefficients, block.output)
          : weightedSum(block.experts, coefficients, block.output);
      },
    };
  },
});
