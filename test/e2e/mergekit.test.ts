/** `pcomp merge --config`: what mergekit's files ask for, checked against the numbers written out. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { nudged, readWeights, saveFolder, weightsOf } from '../support/merge-models.ts';
import { runCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const SETUP_MS = 120_000;
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);

const base = tinyLlama('base', { hidden_size: 64, intermediate_size: 48, num_hidden_layers: 3 }, { dtype: 'F32' });
const baseWeights = weightsOf(base);
const math = nudged(baseWeights, 1);
const code = nudged(baseWeights, 2);

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 1e9);
  await saveFolder(at('math'), math, base.config);
  await saveFolder(at('code'), code, base.config);
}, SETUP_MS);

const merge = (output: string, yaml: string, ...args: string[]) => {
  writeFileSync(at(`${output}.yml`), yaml);
  return runCli(['merge', '--config', `${output}.yml`, '-o', output, '--quiet', ...args], { cwd });
};
const values = (weights: ReadonlyMap<string, { values: Float32Array }>, name: string) => weights.get(name)!.values;
const up = (layer: number) => `model.layers.${layer}.mlp.up_proj.weight`;

describe('models with gradients and filters', () => {
  it('are merged layer by layer with the weights the file gives each tensor', async () => {
    const yaml = `
models:
  - model: base
  - {model: math, parameters: {weight: [0, 1]}}
  - {model: code, parameters: {weight: [{filter: mlp, value: 0.25}, {value: 0.5}]}}
base_model: base
merge_method: task_arithmetic
parameters: {int8_mask: true}
`;
    expect(await merge('arithmetic', yaml)).toMatchObject({ code: 0, stderr: '' });
    const merged = await readWeights(at('arithmetic'));
    for (const [name, { values: theta }] of baseWeights) {
      const layer = /layers\.(\d)/.exec(name);
      const t = layer ? Number(layer[1]) / 2 : 0;
      const w = name.includes('mlp') ? 0.25 : 0.5;
      const [a, b, found] = [values(math, name), values(code, name), values(merged, name)];
      for (let i = 0; i < theta.length; i++) {
        expect(found[i]).toBeCloseTo(theta[i] + t * (a[i] - theta[i]) + w * (b[i] - theta[i]), 5);
      }
    }
    expect(readFileSync(at('arithmetic', 'mergekit_config.yml'), 'utf8')).toBe(yaml);
    expect(readFileSync(at('arithmetic', 'README.md'), 'utf8')).toContain('pcomp merge --config mergekit_config.yml -o merged');
  });
});

describe('slices', () => {
  it('stack layers: embeddings from the first, norm from the last, numbered anew', async () => {
    const yaml = `
slices:
  - sources: [{model: math, layer_range: [0, 2]}]
  - sources: [{model: code, layer_range: [1, 3], parameters: {scale: [{filter: down_proj, value: 0}, {value: 1}]}}]
merge_method: passthrough
`;
    expect(await merge('stacked', yaml)).toMatchObject({ code: 0, stderr: '' });
    const merged = await readWeights(at('stacked'));
    const config = JSON.parse(readFileSync(at('stacked', 'config.json'), 'utf8')) as { num_hidden_layers: number };
    expect(config.num_hidden_layers).toBe(4);
    expect(values(merged, 'model.embed_tokens.weight')).toEqual(values(math, 'model.embed_tokens.weight'));
    expect(values(merged, 'model.norm.weight')).toEqual(values(code, 'model.norm.weight'));
    expect(values(merged, up(1))).toEqual(values(math, up(1)));
    expect(values(merged, up(2))).toEqual(values(code, up(1)));
    expect(values(merged, up(3))).toEqual(values(code, up(2)));
    expect(values(merged, 'model.layers.3.mlp.down_proj.weight').every((value) => value === 0)).toBe(true);
    expect(merged.has(up(4))).toBe(false);
    const evaluated = await runCli(['inspect', 'stacked', '--json'], { cwd });
    expect(evaluated.code).toBe(0);
  });

  it('take the base that they name or leave out from the same layers', async () => {
    const yaml = (sources: string) => `
slices: [{sources: [${sources}{model: math, layer_range: [1, 3]}]}]
merge_method: slerp
base_model: base
parameters: {t: 0.5}
`;
    expect(await merge('listed', yaml('{model: base, layer_range: [1, 3]}, '))).toMatchObject({ code: 0 });
    expect(await merge('unlisted', yaml(''))).toMatchObject({ code: 0 });
    const [listed, unlisted] = [await readWeights(at('listed')), await readWeights(at('unlisted'))];
    expect(values(listed, up(0))).toEqual(values(unlisted, up(0)));
    expect(values(listed, up(0))).not.toEqual(values(math, up(1)));
    expect(listed.has(up(2))).toBe(false);
  });
});

describe('modules and chat_template', () => {
  it('one module with parameters of its own, and the template that most models have or the one that is written out', async () => {
    const templates = { base: 'old', math: 'new', code: 'new' };
    for (const [model, template] of Object.entries(templates))
      writeFileSync(at(model, 'tokenizer_config.json'), JSON.stringify({ chat_template: template, bos_token: '<s>' }));
    const yaml = (template: string) => `
modules:
  default:
    models: [{model: math}, {model: code, parameters: {weight: [{filter: mlp, value: 0.25}]}}]
    parameters: {weight: 0.5}
base_model: base
merge_method: task_arithmetic
parameters: {weight: 7, lambda: 2}
chat_template: ${template}
`;
    expect(await merge('modular', yaml('auto'))).toMatchObject({ code: 0, stderr: '' });
    const merged = await readWeights(at('modular'));
    for (const name of [up(1), 'model.norm.weight']) {
      const [theta, a, b, found] = [baseWeights, math, code, merged].map((weights) => values(weights, name));
      const w = name.includes('mlp') ? 0.25 : 0.5;
      for (let i = 0; i < theta.length; i++)
        expect(found[i]).toBeCloseTo(theta[i] + 2 * (0.5 * (a[i] - theta[i]) + w * (b[i] - theta[i])), 5);
    }
    const templateOf = (folder: string) =>
      (JSON.parse(readFileSync(at(folder, 'tokenizer_config.json'), 'utf8')) as Record<string, unknown>)['chat_template'];
    expect(templateOf('modular')).toBe('new');
    expect(await merge('written', yaml(`"{{ messages[0]['content'] }}"`))).toMatchObject({ code: 0 });
    expect(templateOf('written')).toBe("{{ messages[0]['content'] }}");
    const broken = await merge('broken', yaml('"{% if %}"'));
    expect(broken).toMatchObject({ code: 2, stderr: expect.stringMatching(/broken\.yml: its chat template cannot be followed/) });
  });
});

describe('what cannot be followed', () => {
  it.each([
    [
      'slices: [{sources: [{model: math, layer_range: [0, 4]}]}]\nmerge_method: passthrough',
      /layer_range \[0, 4\] of math: it has 3 layers/,
    ],
    ['models: [{model: math}, {model: code}]\nbase_model: base\nmerge_method: linear', /linear has no use for a base/],
    [
      'slices:\n- sources: [{model: math, layer_range: [0, 1]}]\n- sources: [{model: math, layer_range: [1, 2]}, {model: code, layer_range: [1, 2]}]\nmerge_method: linear',
      /slices\[1\] merges 2 models besides the base, slices\[0\] 1/,
    ],
    ['models: [{model: math, parameters: {wight: 1}}]\nmerge_method: linear', /wight: linear has no such parameter/],
    ['models: [{model: nowhere}]\nmerge_method: linear', /nowhere: no such file or folder/],
    [
      'models: [{model: math}]\nmerge_method: linear\ntokenizer_source: code',
      /--tokenizer code: is neither union nor one of the models \(math\)/,
    ],
    ['models: [', /is not YAML/],
  ])('%s', async (yaml, message) => {
    const { code: exit, stderr } = await merge('refused', yaml);
    expect(stderr).toMatch(message);
    expect(stderr.trim().split('\n')).toHaveLength(1);
    expect(exit).toBe(/no such file/.test(stderr) ? 1 : 2);
  });

  it('flags that the file has a place for are refused beside it', async () => {
    const { code: exit, stderr } = await merge('refused', 'models: [{model: math}]\nmerge_method: linear', '--method', 'ties');
    expect(exit).toBe(2);
    expect(stderr).toContain('--method: has no place beside --config');
  });
});
