/** The base, moved towards one expert by at most `t` per element: only where the two are near does the expert replace it. */
import { defineMerger } from './merger.ts';

export const nearswap = defineMerger({
  name: 'nearswap',
  formula: 'theta_0 + clip(theta_1 - theta_0, -t, t)',
  reference: 'https://github.com/arcee-ai/mergekit',
  access: 'elementwise',
  base: 'required',
  experts: { min: 1, max: 1 },
  parameters: { t: { type: 'number', summary: 'furthest that an element moves', min: 0 } },
  prepare(_tensor, { t }) {
    return {
      scans: [],
      merge({ base, experts: [expert], length }) {
        const result = new Float32Array(length);
        for (let i = 0; i < length; i++) {
          const change = expert[i] - base![i];
          // Within reach the expert's own number is taken: base + (expert - base) could round to a neighbour of it.
          if (change > t) result[i] = base![i] + t;
          else if (change < -t) result[i] = base![i] - t;
          else result[i] = expert[i];
        }
        return result;
      },
    };
  },
});
