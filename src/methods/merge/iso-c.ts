/** Isotropic merging (Marczak et al., arXiv 2502.04959): all directions of the summed task vectors count alike. */
import { polar } from '../../compute/linalg/svd.ts';
import { MATRIX_PARAMETERS, meanOf, mergeMatrix, sumOf } from './matrix-merge.ts';
import { defineMerger } from './merger.ts';

export const isoC = defineMerger({
  name: 'iso-c',
  formula: 'theta_0 + lambda mean(S) polar(sum delta_k), S being the singular values of the sum',
  reference: '2502.04959',
  access: 'matrix',
  base: 'required',
  experts: { min: 1 },
  parameters: MATRIX_PARAMETERS,
  prepare: (tensor, { lambda }) =>
    mergeMatrix(tensor, lambda, (taskVectors, rows, columns) => {
      const { factor, values } = polar(sumOf(taskVectors), rows, columns);
      // The mean is over what is kept, so that the nuclear norm stays what it was for LoRA experts too.
      const mean = meanOf(values);
      return factor.map((value) => value * mean);
    }),
});
