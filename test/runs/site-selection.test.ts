import { describe, expect, it } from 'vitest';
import { RecipeError } from '../../src/errors.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import { checkPlanFits, readPlan, selectSites } from '../../src/runs/site-selection.ts';
import { groupedLlama } from '../support/checkpoint-folder.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const { config, source } = groupedLlama();
const model = createModel(config, 'config.json', source);
const Q = 'model.layers.0.self_attn.q_proj';

describe('the layers that are quantized', () => {
  it('are all of every block when nothing is asked', () => {
    expect(selectSites(model, [], []).size).toBe(14);
  });

  it('are those that --only names less those that --skip names', () => {
    expect([...selectSites(model, ['*.mlp.*'], ['model.layers.0', '*.up_proj'])]).toEqual([
      'model.layers.1.mlp.gate_proj',
      'model.layers.1.mlp.down_proj',
    ]);
  });

  it('must not be none', () => {
    expect(() => selectSites(model, [Q], ['*.q_proj'])).toThrow(
      '--skip, --only: none of the 14 linear layers is left to quantize',
    );
  });
});

describe('a plan', () => {
  const write = (content: unknown) => scratch.write('plan.json', typeof content === 'string' ? content : JSON.stringify(content));
  const modules = { [Q]: { groupSize: 32, bits: [2, 3] } };

  it('is read from a plan file and from an artifact alike', async () => {
    expect(await readPlan(write({ modules }))).toEqual({ modules });
    expect(await readPlan(write({ command: 'quantize', plan: { modules } }))).toEqual({ modules });
  });

  it.each<[RegExp, unknown]>([
    [/plan.json: not JSON: /, 'bits'],
    [/plan.json: no "modules" in it; a plan is \{"modules": /, { plan: {} }],
    [/plan.json: no "modules" in it/, []],
    [/module "model.layers.0.self_attn.q_proj" is not an object with "groupSize" and "bits"/, { modules: { [Q]: 3 } }],
    [/has groupSize 48; 32, 64, 128 or 256 is expected/, { modules: { [Q]: { groupSize: 48, bits: [2] } } }],
    [/has groupSize undefined; 32/, { modules: { [Q]: { bits: [2] } } }],
    ...[[2, 9], [0, 2], [2.5, 2], ['2', 2], 2].map((bits): [RegExp, unknown] => {
      return [/has "bits" that are not a list of whole numbers 1..8/, { modules: { [Q]: { groupSize: 32, bits } } }];
    }),
  ])('is refused with %s', async (expected, content) => {
    const path = write(content);
    await expect(readPlan(path)).rejects.toThrow(RecipeError);
    await expect(readPlan(path)).rejects.toThrow(expected);
  });

  it('must have a width for every group of every selected layer, and no other layers', () => {
    const check = (plan: Parameters<typeof checkPlanFits>[1]) => () => checkPlanFits('p', plan, model, new Set([Q]));
    expect(check({ modules })).not.toThrow();
    expect(check({ modules: {} })).toThrow(`--plan p: no widths for module "${Q}"; leave it as it is with --skip "${Q}"`);
    expect(check({ modules: { ...modules, lm_head: { groupSize: 32, bits: [2, 2] } } })).toThrow(
      'the model has no module "lm_head"',
    );
    expect(check({ modules: { [Q]: { groupSize: 32, bits: [2, 2, 2] } } })).toThrow(
      `module "${Q}" has 3 widths, but 64 inputs in groups of 32 make 2`,
    );
  });
});
