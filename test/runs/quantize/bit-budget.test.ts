/** Budgets shared out over a survey that is known by heart. */
import { describe, expect, it } from 'vitest';
import { hadamardBits } from '../../../src/artifacts/onnx/hadamard-constant.ts';
import type { TransformKind } from '../../../src/methods/quantize/quantizer.ts';
import type { LinearSite } from '../../../src/model/model.ts';
import { type BitBudget, budgetCurve, shareBudget } from '../../../src/runs/quantize/bit-budget.ts';
import type { ModelSurvey } from '../../../src/runs/quantize/survey.ts';

const WIDTHS = [1, 2, 4];
const GROUP = 32;
const site = { name: 'layer', outFeatures: 64, inFeatures: 64, input: 'x' } as LinearSite;

/** Rotating halves every loss. */
function survey(...transforms: TransformKind[]): ModelSurvey {
  const costs = (scale: number) => [0, 1].map((group) => Float64Array.from(WIDTHS, (bits) => (scale * (2 - group)) / 4 ** bits));
  const choices = transforms.map((transform) => ({
    transform,
    free: false,
    groupSize: GROUP,
    sites: [{ site, costs: costs(transform === 'perm-had' ? 1 : 2), energy: 10 }],
  }));
  return { inputs: [{ input: 'x', survey: { transforms: choices, trials: new Map() } }], sensitivities: new Map([['layer', 1]]) };
}

const budget = (bits: number): BitBudget => ({ unit: 'onnx', container: 'auto', bits, say: (value) => `--bits ${value}` });
const both = survey('perm', 'perm-had');
const matrix = hadamardBits(GROUP);

describe('a budget with room for the codes but none for the matrix of a rotation', () => {
  const [{ size: least }] = budgetCurve(both, WIDTHS, budget(0));

  it('is met without one', async () => {
    const { sites } = await shareBudget(both, WIDTHS, budget(least));
    expect(sites['layer']).toMatchObject({ transform: 'perm' });
    await expect(shareBudget(both, WIDTHS, budget(least - 1))).rejects.toThrow(`--bits ${least}`);
  });

  it('is not taken for one with room for both', async () => {
    const { size: most } = budgetCurve(both, WIDTHS, budget(0)).at(-1)!;
    const { sites } = await shareBudget(both, WIDTHS, budget(most + matrix));
    expect(sites['layer']).toMatchObject({ transform: 'perm-had' });
  });

  it('is below what can be, where every choice rotates', async () => {
    const rotated = survey('perm-had');
    const [{ size }] = budgetCurve(rotated, WIDTHS, budget(0));
    expect(size).toBe(least + matrix);
    await shareBudget(rotated, WIDTHS, budget(size));
    await expect(shareBudget(rotated, WIDTHS, budget(size - 1))).rejects.toThrow(`--bits ${size}`);
  });
});

it('every size of the curve can be had, and loses no more than it says', async () => {
  for (const { size, loss } of budgetCurve(both, WIDTHS, budget(0))) {
    expect((await shareBudget(both, WIDTHS, budget(size))).predictedLoss).toBeLessThanOrEqual(loss);
  }
});
