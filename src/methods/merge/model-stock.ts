/**
 * Model Stock (arXiv 2403.19522): between the base and the mean of the experts, at the point that the angle between the task vectors
 * says is nearest to the centre the experts scatter around.
 */
import { GramScan } from './gram.ts';
import { defineMerger, type MergeBlock } from './merger.ts';
import { columnCount, elementCount } from './tensor-size.ts';
import { baseAndTaskVectors } from './weighted-sum.ts';

/** mergekit's floor of a product of norms; real task vectors of few elements fall below it. */
const COMPAT_FLOOR = 1e-6;

export const modelStock = defineMerger({
  name: 'model-stock',
  formula: 'theta_0 + t mean delta_k, t = K c / (1 + (K-1) c), c the mean cosine between task vectors, at least 0',
  reference: '2403.19522',
  access: 'gram',
  base: 'required',
  experts: { min: 2 },
  parameters: { filter_wise: { type: 'boolean', summary: 'one t per row instead of one per tensor', default: false } },
  prepare(tensor, { filter_wise }, context) {
    const count = tensor.experts.length;
    const n = elementCount(tensor);
    const compat = context.compat === 'mergekit';
    const positionOf = (cosine: number) => (count * cosine) / (1 + (count - 1) * cosine);
    const gram = new GramScan(count);
    if (!filter_wise) {
      let share: number | undefined;
      const solve = (): number => {
        const cosine = meanCosine(gram.matrix(), count, compat);
        if (cosine < 0 && !compat)
          context.note(tensor, `the mean cosine between task vectors is ${cosine.toFixed(4)}: taken as 0, the base is kept`);
        return positionOf(compat ? cosine : Math.max(0, cosine)) / count;
      };
      return {
        scans: [{ look: (block) => gram.addExperts(block.experts, block.base) }],
        merge(block) {
          share ??= solve();
          return baseAndTaskVectors(block.base!, block.experts, new Array(count).fill(share), block.output);
        },
      };
    }
    const columns = columnCount(tensor);
    let clamped = 0;
    const merge = (block: MergeBlock): Float32Array => {
      const result = new Float32Array(block.length);
      for (let row = 0; row < block.length; row += columns) {
        const base = block.base!.subarray(row, row + columns);
        const experts = block.experts.map((expert) => expert.subarray(row, row + columns));
        gram.clear();
        gram.addExperts(experts, base);
        const cosine = meanCosine(gram.matrix(), count, compat);
        if (cosine < 0 && !compat) clamped++;
        const share = positionOf(compat ? cosine : Math.max(0, cosine)) / count;
        result.set(baseAndTaskVectors(base, experts, new Array(count).fill(share)), row);
      }
      if (block.start + block.length === n && clamped > 0)
        context.note(
          tensor,
          `the mean cosine between task vectors is below 0 in ${clamped} of ${n / columns} rows: taken as 0, the base is kept`,
        );
      return result;
    };
    return { scans: [], merge };
  },
});

/** Over all pairs; a pair with a zero vector counts as at a right angle. */
function meanCosine(products: Float64Array, count: number, compat: boolean): number {
  let total = 0;
  for (let i = 0; i < count; i++)
    for (let j = 0; j < i; j++) {
      const norms = Math.sqrt(products[i * count + i]) * Math.sqrt(products[j * count + j]);
      const cosine = products[i * count + j] / (compat ? Math.max(norms, COMPAT_FLOOR) : norms || 1);
      total += Math.max(-1, Math.min(1, cosine));
    }
  return total / ((count * (count - 1)) / 2);
}
