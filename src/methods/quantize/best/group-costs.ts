/** What each group of a layer would lose at each width (slim-llm 5.5): the currency of the allocation. */
import type { AsyncKernels } from '../../../compute/kernels/kernels.ts';
import type { QuantizeContext } from '../quantizer.ts';

/** Rows that are looked at; their losses are scaled to all. */
const SAMPLED_ROWS = 256;

/** Sizes that groups of an input of `features` columns may have, descending: of those that take it whole, the least. */
export function groupSizesFor({ options }: QuantizeContext, features: number): readonly number[] {
  const { groupSize, groupSizes = [groupSize] } = options;
  return groupSizes.filter((_, i) => !(groupSizes[i + 1] >= features));
}

/**
 * `c_g(b) = sum_{j in g} d_j sum_i (w_ij - Q_b(w_ij))^2` with the weighted grid, (groups, widths) row after row.
 * @param columns W^T (features, rows) in stored order @param energies d, (features)
 */
export async function groupCosts(
  kernels: AsyncKernels,
  columns: Float32Array,
  energies: Float32Array,
  groupSize: number,
  widths: readonly number[],
): Promise<Float64Array[]> {
  const features = energies.length;
  const rows = columns.length / features;
  const count = Math.min(rows, SAMPLED_ROWS);
  const costs: Float64Array[] = [];
  for (let start = 0; start < features; start += groupSize) {
    const end = Math.min(start + groupSize, features);
    const values = new Float32Array((end - start) * count);
    for (let j = start; j < end; j++) {
      for (let i = 0; i < count; i++) values[(j - start) * count + i] = columns[j * rows + Math.floor((i * rows) / count)];
    }
    const group = { columns: end - start, rows: count, values };
    const weights = energies.subarray(start, end);
    const cost = new Float64Array(widths.length);
    for (const [i, width] of widths.entries()) {
      const { losses } = await kernels.fitWeighted(group, width, weights);
      cost[i] = (losses.reduce((sum, loss) => sum + loss, 0) * rows) / count;
    }
    costs.push(cost);
  }
  return costs;
}
