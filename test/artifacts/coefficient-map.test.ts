/** The picture of coefficients: every tensor of every expert in its place, by its colour. */
import { expect, it } from 'vitest';
import { coefficientMap } from '../../src/artifacts/coefficient-map.ts';
import type { MergePlan } from '../../src/methods/merge/merge-plan.ts';

const plan: MergePlan = {
  method: 'expert-merging++',
  experts: ['code', 'a<b'],
  start: { method: 'tsv-m', scale: 0.8 },
  passive: 'base',
  tensors: {
    'model.layers.0.self_attn.q_proj.weight': {
      bounds: [0, 30, 40],
      coefficients: [
        [0.5, -1],
        [0, 0.25],
      ],
    },
    'model.layers.0.mlp.up_proj.weight': { bounds: [0, 40], coefficients: [[0], [1]] },
    'model.layers.1.mlp.up_proj.weight': { bounds: [0, 40], coefficients: [[-0.5], [0.125]] },
  },
};

it('has a stripe as wide as its chunk for every coefficient, red above 0 and blue below', () => {
  const svg = coefficientMap(plan);
  const cell = (name: string, values: string) => new RegExp(`<title>${name}: ${values}</title>(.*?)</g>`).exec(svg)?.[1] ?? '';
  const stripes = (group: string) =>
    [...group.matchAll(/width="([\d.]+)" height="\d+" fill="rgb\(([\d,]+)\)"/g)].map(([, width, fill]) => [Number(width), fill]);
  const [wide, narrow] = stripes(cell('model\\.layers\\.0\\.self_attn\\.q_proj\\.weight', '0\\.500 -1\\.00'));
  expect(Number(wide[0]) / Number(narrow[0])).toBeCloseTo(3, 1);
  expect(narrow[1]).toBe('33,102,172');
  expect(wide[1]).toBe('217,140,149');
  expect(stripes(cell('model\\.layers\\.0\\.mlp\\.up_proj\\.weight', '0\\.00'))[0][1]).toBe('255,255,255');
  expect(svg.match(/<title>/g)).toHaveLength(6);
  expect(svg).toContain('a&lt;b');
  expect(svg).toContain('on top of 0.8 x tsv-m');
  expect(coefficientMap(plan)).toBe(svg);
});
