/** Task Singular Vectors (Gargiulo et al., arXiv 2412.00081): the strongest directions of every expert, made orthogonal to each other. */
import { multiplyTransposed } from '../../compute/linalg/products.ts';
import { polar, svd } from '../../compute/linalg/svd.ts';
import { MATRIX_PARAMETERS, mergeMatrix } from './matrix-merge.ts';
import { defineMerger } from './merger.ts';

export const tsvM = defineMerger({
  name: 'tsv-m',
  formula: 'theta_0 + lambda polar(U) S polar(V^T), U S V^T being the top min(m, n) / K directions of each delta_k',
  reference: '2412.00081',
  access: 'matrix',
  base: 'required',
  experts: { min: 1 },
  parameters: MATRIX_PARAMETERS,
  prepare: (tensor, { lambda }) =>
    mergeMatrix(tensor, lambda, (taskVectors, rows, columns) => {
      const share = Math.max(1, Math.floor(Math.min(rows, columns) / taskVectors.length));
      const parts = taskVectors.map((taskVector) => {
        const { values, left, right } = svd(taskVector, rows, columns, share);
        const count = Math.min(share, values.length);
        return {
          values: values.subarray(0, count),
          left: left.subarray(0, count * rows),
          right: right.subarray(0, count * columns),
        };
      });
      const values = parts.flatMap((part) => [...part.values]);
      const count = values.length;
      if (count === 0) return new Float64Array(rows * columns);
      const join = (name: 'left' | 'right', width: number) => {
        const all = new Float64Array(count * width);
        let at = 0;
        for (const part of parts) {
          all.set(part[name], at);
          at += part[name].length;
        }
        return polar(all, count, width).factor;
      };
      const left = join('left', rows);
      const right = join('right', columns);
      for (let j = 0; j < count; j++) for (let k = 0; k < columns; k++) right[j * columns + k] *= values[j];
      return multiplyTransposed(left, right, rows, count, columns);
    }),
});
