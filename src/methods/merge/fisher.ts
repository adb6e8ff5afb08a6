/** Fisher merging (Matena and Raffel, arXiv 2111.09832): a mean in which each expert's element weighs what its Fisher information says. */
import { RecipeError } from '../../errors.ts';
import { defineMerger, type MergeBlock } from './merger.ts';
import { SpanSums } from './span-sum.ts';
import { SAMPLES } from './statistics-parameters.ts';
import { weightedSum } from './weighted-sum.ts';
import { normalizedWeights, sum } from './weights.ts';

export const fisher = defineMerger({
  name: 'fisher',
  formula: 'sum s_k (F_k + eps) theta_k / sum s_k (F_k + eps), s_k = scale_k / (|F_k| + eps)',
  reference: '2111.09832',
  access: 'norms',
  base: 'unused',
  experts: { min: 1 },
  statistics: 'fisher',
  parameters: {
    scale: { type: 'number', summary: 'factor on the Fisher information of the expert', default: 1, min: 0, perExpert: true },
    normalize: {
      type: 'boolean',
      summary: "divide each expert's information by its norm over the model, so that none outweighs the others as a whole",
      default: true,
    },
    epsilon: {
      type: 'number',
      summary: 'added to the information, so that the mean exists where there is none',
      default: 1e-6,
      above: 0,
    },
    ...SAMPLES,
  },
  prepare(_tensor, { scale, normalize, epsilon }, { statisticNorms }) {
    if (sum(scale) === 0) throw new RecipeError(`scale ${scale.join(',')}: fisher needs one above 0`);
    // Without norms over the whole model, each tensor is balanced by itself, at the price of one more pass.
    const squares = normalize && !statisticNorms ? scale.map(() => new SpanSums()) : undefined;
    const scan = (block: MergeBlock): void => {
      for (const [k, square] of squares!.entries()) square.addProducts(block.statistics![k], block.statistics![k]);
    };
    let factors: readonly number[] | undefined;
    const solve = (): readonly number[] => {
      if (!normalize) return scale;
      const norms = statisticNorms ?? squares!.map((square) => Math.sqrt(square.total()));
      return scale.map((s, k) => s / (norms[k] + epsilon));
    };
    const merge = ({ experts, statistics, length, output }: MergeBlock): Float32Array => {
      // What is no layer has none: its mean, weighted by `scale` alone.
      if (!statistics) return weightedSum(experts, normalizedWeights('fisher', scale), output);
      factors ??= solve();
      const result = new Float32Array(length);
      for (let i = 0; i < length; i++) {
        let total = 0;
        let divisor = 0;
        for (let k = 0; k < factors.length; k++) {
          const weight = factors[k] * (statistics[k][i] + epsilon);
          total += weight * experts[k][i];
          divisor += weight;
        }
        result[i] = total / divisor;
      }
      return result;
    };
    return { scans: squares ? [{ look: scan }] : [], merge };
  },
});
