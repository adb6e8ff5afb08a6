/** Spherical interpolation from the base to one expert, over the whole tensor as one vector. */
import { arc, cosineOf, GramScan } from './gram.ts';
import { defineMerger } from './merger.ts';
import { weightedSum } from './weighted-sum.ts';

/** Beyond this |cosine| the two are taken for parallel, and a vector not longer than `TINY` for zero: straight interpolation. */
const PARALLEL = 0.9995;
const TINY = 1e-8;

export const slerp = defineMerger({
  name: 'slerp',
  formula: '(sin((1-t) phi) theta_0 + sin(t phi) theta_1) / sin phi',
  reference: 'https://github.com/arcee-ai/mergekit',
  access: 'gram',
  base: 'required',
  experts: { min: 1, max: 1 },
  parameters: { t: { type: 'number', summary: 'position between the base (0) and the expert (1)' } },
  prepare(_tensor, { t }, { compat }) {
    const gram = new GramScan(2);
    let coefficients: readonly number[] | undefined;
    const solve = (): readonly number[] => {
      const [square0, product, , square1] = gram.matrix();
      // mergekit takes a zero vector for one at a right angle.
      const cosine = cosineOf(product, square0, square1, TINY) ?? (compat === 'mergekit' ? 0 : 1);
      return Math.abs(cosine) > PARALLEL ? [1 - t, t] : arc(t, Math.acos(cosine));
    };
    return {
      scans: [{ look: (block) => gram.add([block.base!, block.experts[0]]) }],
      merge(block) {
        coefficients ??= solve();
        return weightedSum([block.base!, block.experts[0]], coefficients, block.output);
      },
    };
  },
});
