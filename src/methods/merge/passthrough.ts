/** One input, scaled: what slices of models are stacked from. */
import { defineMerger } from './merger.ts';

export const passthrough = defineMerger({
  name: 'passthrough',
  formula: 'scale theta_1',
  reference: 'https://github.com/arcee-ai/mergekit',
  access: 'elementwise',
  base: 'unused',
  experts: { min: 1, max: 1 },
  parameters: { scale: { type: 'number', summary: 'factor; 1 copies bit for bit', default: 1 } },
  prepare(_tensor, { scale }) {
    return { scans: [], merge: ({ experts: [expert] }) => (scale === 1 ? expert : expert.map((value) => scale * value)) };
  },
});
