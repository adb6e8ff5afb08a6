/** Isotropic merging in a common subspace and those of the tasks (Marczak et al., arXiv 2502.04959). */
import { multiply, multiplyTransposed } from '../../compute/linalg/products.ts';
import { polar, svd } from '../../compute/linalg/svd.ts';
import { MATRIX_PARAMETERS, meanOf, mergeMatrix, sumOf } from './matrix-merge.ts';
import { defineMerger } from './merger.ts';

export const isoCts = defineMerger({
  name: 'iso-cts',
  formula: 'as iso-c, of the top directions of the sum and, for the rest, of what each delta_k has outside them',
  reference: '2502.04959',
  access: 'matrix',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    ...MATRIX_PARAMETERS,
    common: { type: 'number', summary: 'share of the directions that the experts have in common', default: 0.8, min: 0, max: 1 },
  },
  prepare: (tensor, { lambda, common }) =>
    mergeMatrix(tensor, lambda, (taskVectors, rows, columns) => {
      const rank = Math.min(rows, columns);
      const experts = taskVectors.length;
      // What is left of the directions is divided evenly; where rounding gives the experts more than there are, they have them all.
      const wanted = Math.floor(rank * common);
      const shared = Math.max(0, rank - experts * roundHalfEven((rank - wanted) / experts));
      const own = Math.floor((rank - shared) / experts);
      const top = svd(sumOf(taskVectors), rows, columns, shared);
      const commonCount = Math.min(shared, top.values.length);
      const commonLeft = top.left.subarray(0, commonCount * rows);
      const parts = taskVectors.map((taskVector) => {
        // (I - U U^T) tau
        const along = multiply(commonLeft, taskVector, commonCount, rows, columns);
        const inside = multiplyTransposed(commonLeft, along, rows, commonCount, columns);
        const outside = svd(
          taskVector.map((value, i) => value - inside[i]),
          rows,
          columns,
          own,
        );
        // What the projection leaves of an expert that lies in the common space is rounding, whatever its own scale.
        const least = 1e-6 * (svd(taskVector, rows, columns, 1).values[0] ?? 0);
        const count = Math.min(own, outside.values.filter((value) => value > least).length);
        return { values: outside.values.subarray(0, count), left: outside.left, right: outside.right, count };
      });
      parts.push({ values: top.values.subarray(0, commonCount), left: top.left, right: top.right, count: commonCount });
      const values = Float64Array.from(parts.flatMap((part) => [...part.values]));
      const count = values.length;
      if (count === 0) return new Float64Array(rows * columns);
      const join = (name: 'left' | 'right', width: number) => {
        const all = new Float64Array(count * width);
        let at = 0;
        for (const part of parts) {
          all.set(part[name].subarray(0, part.count * width), at);
          at += part.count * width;
        }
        return polar(all, count, width).factor;
      };
      const mean = meanOf(values);
      const merged = multiplyTransposed(join('left', rows), join('right', columns), rows, count, columns);
      return merged.map((value) => value * mean);
    }),
});

function roundHalfEven(value: number): number {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}
