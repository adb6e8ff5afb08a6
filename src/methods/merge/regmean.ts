/** RegMean (Jin et al., arXiv 2212.09849): the layer whose outputs are nearest to every expert's on that expert's own inputs, in closed form. */
import { NotPositiveDefiniteError } from '../../compute/blas.ts';
import { addProduct, strided } from '../../compute/linalg/products.ts';
import { solveRows } from '../../compute/linalg/solve.ts';
import { mergeMatrix } from './matrix-merge.ts';
import { defineMerger } from './merger.ts';
import { SAMPLES } from './statistics-parameters.ts';
import { LAMBDA } from './task-vectors.ts';

/** Part of the mean of a Gram matrix's diagonal that is added to it, so that directions no text has shown have one solution: the mean. */
const RIDGE = 1e-6;
/** Gram matrices are stored in float32, whose rounding may be more than that: ten times as much is tried so often, up to the mean itself. */
const MORE_RIDGES = 6;

export const regmean = defineMerger({
  name: 'regmean',
  formula: 'theta_0 + lambda (sum tau_k G_k) (sum G_k)^-1, G_k = X_k^T X_k / T with its off-diagonal times reduce',
  reference: '2212.09849',
  access: 'matrix',
  base: 'required',
  side: 'columns',
  experts: { min: 1 },
  statistics: 'gram',
  parameters: {
    reduce: {
      type: 'number',
      summary: 'factor on what the Gram matrices say of pairs of inputs; 0: each input by itself',
      default: 0.6,
      min: 0,
      max: 1,
    },
    lambda: LAMBDA,
    ...SAMPLES,
  },
  prepare(tensor, { reduce, lambda }, { note }) {
    return mergeMatrix(tensor, lambda, async (taskVectors, rows, columns, { statistics }) => {
      const merged = new Float64Array(rows * columns);
      // Layers that no text went through are averaged, like all that is no layer.
      if (!statistics) {
        for (const taskVector of taskVectors)
          for (let i = 0; i < merged.length; i++) merged[i] += taskVector[i] / taskVectors.length;
        return merged;
      }
      const grams = statistics.map((gram) => reduced(gram, columns, reduce));
      const trace = grams.reduce((sum, gram) => sum + traceOf(gram, columns), 0) / grams.length;
      const total = new Float64Array(columns * columns);
      grams.forEach((gram, k) => {
        for (let i = 0; i < total.length; i++) total[i] += gram[i];
        addProduct(strided(taskVectors[k], columns), strided(gram, columns), strided(merged, columns), rows, columns, columns);
      });
      let added = 0;
      for (let more = 0; ; more++) {
        const part = RIDGE * 10 ** more;
        const ridge = trace === 0 ? 1 : (part * trace) / columns;
        addRidge(merged, total, taskVectors, columns, ridge - added);
        added = ridge;
        try {
          await solveRows(merged, rows, total, columns);
          if (more > 0)
            note(
              tensor,
              `the Gram matrices of its inputs are singular; ${part.toPrecision(1)} of their mean diagonal is added to it`,
            );
          return merged;
        } catch (error) {
          if (!(error instanceof NotPositiveDefiniteError) || more === MORE_RIDGES) throw error;
        }
      }
    });
  },
});

/** What each expert's Gram matrix gains on its diagonal, in both sums. */
function addRidge(
  merged: Float64Array,
  total: Float64Array,
  taskVectors: readonly Float64Array[],
  columns: number,
  ridge: number,
): void {
  for (let j = 0; j < columns; j++) total[j * columns + j] += taskVectors.length * ridge;
  for (const taskVector of taskVectors) for (let i = 0; i < merged.length; i++) merged[i] += ridge * taskVector[i];
}

function reduced(gram: Float32Array, n: number, reduce: number): Float64Array {
  const result = Float64Array.from(gram, (value) => reduce * value);
  for (let j = 0; j < n; j++) result[j * n + j] = gram[j * n + j];
  return result;
}

function traceOf(matrix: Float64Array, n: number): number {
  let sum = 0;
  for (let j = 0; j < n; j++) sum += matrix[j * n + j];
  return sum;
}
