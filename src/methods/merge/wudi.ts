/** WUDI (Cheng et al., arXiv 2503.08099, and version 2 in 2505.19892): the least interference with every task vector, in closed form. */
import { eigh } from '../../compute/linalg/eigh.ts';
import { gramOfColumns, multiply, transposed } from '../../compute/linalg/products.ts';
import { MATRIX_PARAMETERS, mergeMatrix, sumOf } from './matrix-merge.ts';
import { defineMerger } from './merger.ts';

/** Eigenvalues at or below this part of the largest are left alone by the exact minimizer. */
const LEAST = 1e-7;

export const wudi = defineMerger({
  name: 'wudi',
  formula: 'theta_0 + lambda argmin_t sum_k |(t - delta_k) delta_k^T|^2 / |delta_k|^2',
  reference: '2503.08099',
  access: 'matrix',
  base: 'required',
  side: 'columns',
  experts: { min: 1 },
  parameters: {
    ...MATRIX_PARAMETERS,
    filter: {
      type: 'choice',
      summary: 'which directions are solved for: the effective rank, all, or as an early stop would',
      choices: ['rank', 'exact', 'exponential'],
      default: 'rank',
      paper: 'exact',
    },
    time: { type: 'number', summary: 'exponential: how late the stop is', default: 300, above: 0 },
    ratio: { type: 'number', summary: 'exponential: share of the directions', default: 0.65, above: 0, max: 1 },
  },
  prepare: (tensor, { lambda, filter, time, ratio }) =>
    mergeMatrix(tensor, lambda, (taskVectors, rows, columns) => {
      const own = taskVectors.map((taskVector) => ({
        taskVector,
        square: taskVector.reduce((sum, value) => sum + value * value, 0),
      }));
      const moved = own.filter(({ square }) => square > 0);
      if (moved.length === 0) return new Float64Array(rows * columns);
      // C = sum tau^T tau / |tau|^2 and D = sum tau tau^T tau / |tau|^2.
      const c = new Float64Array(columns * columns);
      const d = new Float64Array(rows * columns);
      for (const { taskVector, square } of moved) {
        const gram = gramOfColumns(taskVector, rows, columns);
        const product = multiply(taskVector, gram, rows, columns, columns);
        for (let i = 0; i < c.length; i++) c[i] += gram[i] / square;
        for (let i = 0; i < d.length; i++) d[i] += product[i] / square;
      }
      let factors: Float64Array = new Float64Array(0);
      const { values, vectors } = eigh(c, columns, (all) => {
        factors = factorsOf(all, filter, time, ratio);
        return factors.findLastIndex((factor) => factor !== 0) + 1;
      });
      const count = vectors.length / columns;
      const start = sumOf(taskVectors).map((value) => value / taskVectors.length);
      // start + (D / lambda - start) V f V^T, along each eigenvector.
      const turned = transposed(vectors, count, columns);
      const along = multiply(d, turned, rows, columns, count);
      const startAlong = multiply(start, turned, rows, columns, count);
      for (let i = 0; i < rows; i++) {
        for (let j = 0; j < count; j++) {
          const at = i * count + j;
          along[at] = factors[j] * (along[at] / values[j] - startAlong[at]);
        }
      }
      const change = multiply(along, vectors, rows, count, columns);
      return start.map((value, i) => value + change[i]);
    }),
});

/** How far each direction goes from the mean to the minimum, by descending eigenvalue. */
function factorsOf(values: Float64Array, filter: 'rank' | 'exact' | 'exponential', time: number, ratio: number): Float64Array {
  const usable = values.map((value) => (value > LEAST * values[0] ? value : 0));
  if (filter === 'exact') return usable.map((value) => (value > 0 ? 1 : 0));
  if (filter === 'exponential') {
    const count = Math.ceil(ratio * values.length);
    return usable.map((value, j) => (j < count && value > 0 ? 1 - Math.exp(-time * value) : 0));
  }
  const roots = usable.reduce((sum, value) => sum + Math.sqrt(value), 0);
  const rank = Math.ceil(roots ** 2 / usable.reduce((sum, value) => sum + value, 0) - 1e-9);
  return usable.map((value, j) => (j < rank && value > 0 ? 1 : 0));
}
