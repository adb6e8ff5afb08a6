/** What decides an artifact's bytes and what does not: seeds, plans, globs, places. */
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import type { BitPlan } from '../../src/methods/quantize/quantizer.ts';
import type { Inspection } from '../../src/runs/inspect/inspect.ts';
import type { QuantizeOutcome } from '../../src/runs/quantize/quantize.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { artifactTree } from '../support/folder-tree.ts';
import { runCli, runCliJson, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...path: string[]) => join(cwd, ...path);
const SHAPE = ['--group-size', '32'];
const TEXT = ['--calibration', 'text.txt', '--samples', '8', '--sequence-length', '64'];
/** Six groups in down_proj: enough for slim-llm to mix widths. */
const SETTINGS = ['--bits', '2', ...SHAPE, ...TEXT, '--format', 'onnx,safetensors'];
const quantize = (...args: string[]) => runCliJson<QuantizeOutcome>(['quantize', 'model', ...args], { cwd });
const inspect = (path: string) => runCliJson<Inspection>(['inspect', path], { cwd });
const manifest = (name: string) =>
  JSON.parse(readFileSync(at(name, 'pcomp.json'), 'utf8')) as {
    plan: BitPlan;
    weights: Record<string, string>;
    outputs: Record<string, { bytes: number }>;
    recipe: Record<string, unknown>;
    inputs: Record<string, unknown>;
  };

beforeAll(async () => {
  await saveCheckpoint(at('model'), groupedLlama());
  scratch.write('text.txt', tinyText(1500));
  await quantize(...SETTINGS, '-o', 'first');
});

describe('the same recipe and seed', () => {
  it.concurrent('give the same bytes from another folder, by other paths, under another name', async () => {
    mkdirSync(at('elsewhere'));
    const moved = SETTINGS.map((word) => (word === 'text.txt' ? at('text.txt') : word));
    const run = await runCli(['quantize', at('model'), ...moved, '--seed', '0', '-o', '../other/place', '--quiet'], {
      cwd: at('elsewhere'),
    });
    expect(run).toMatchObject({ code: 0, stderr: '' });
    expect(artifactTree(at('other/place'))).toEqual(artifactTree(at('first')));
  });

  it.concurrent('give the same bytes from inside the model, from a recipe file, and with activations on the disk', async () => {
    const recipe = {
      bits: 2,
      'group-size': 32,
      calibration: '../text.txt',
      samples: 8,
      'sequence-length': 64,
      format: 'onnx,safetensors',
    };
    scratch.write('recipe.json', JSON.stringify(recipe));
    const run = await runCli(
      ['quantize', '.', '--recipe', '../recipe.json', '--max-memory', '1MiB', '-o', '../third', '--quiet'],
      {
        cwd: at('model'),
      },
    );
    expect(run).toMatchObject({ code: 0, stderr: '' });
    expect(artifactTree(at('third'))).toEqual(artifactTree(at('first')));
  });

  it('say nothing of this machine in pcomp.json', () => {
    const text = readFileSync(at('first', 'pcomp.json'), 'utf8');
    expect(text).not.toContain(cwd);
    const { recipe, inputs, outputs } = manifest('first');
    expect(recipe).toMatchObject({ model: 'model', calibration: ['text.txt'], seed: 0 });
    expect(Object.keys(inputs).sort()).toEqual([
      'calibration/0/text.txt',
      'model/config.json',
      'model/model.safetensors',
      'model/tokenizer.json',
      'model/tokenizer_config.json',
    ]);
    expect(Object.keys(outputs).sort()).toEqual(
      Object.entries(artifactTree(at('first')))
        .filter(([name, content]) => content !== 'folder' && name !== 'pcomp.json')
        .map(([name]) => name),
    );
  });
});

it('a run that is killed after its survey goes on with what that found, and ends with the same bytes', async () => {
  const running = startCli(['quantize', 'model', ...SETTINGS, '--quiet', '-o', 'killed'], { cwd });
  while (!existsSync(at('killed.partial', 'parts', 'block-00000.safetensors'))) {
    if (running.process.exitCode !== null) throw new Error(`ended early: ${(await running.done).stderr}`);
    await delay(2);
  }
  running.process.kill('SIGKILL');
  await running.done;
  expect(existsSync(at('killed.partial', 'parts', 'allocation.safetensors'))).toBe(true);
  expect(await runCli(['quantize', 'model', ...SETTINGS, '--quiet', '-o', 'killed', '--resume'], { cwd })).toMatchObject({
    code: 0,
  });
  expect(artifactTree(at('killed'))).toEqual(artifactTree(at('first')));
});

it.concurrent.each([
  ['--bpw', '3.1', 'bitsPerWeight', 3.1],
  ['--size', '130kB', 'bytes', 130_000],
  ['--runtime-memory', '60kB', 'runtimeBytes', 60_000],
] as const)('a budget of %s %s is kept', async (flag, budget, figure, most) => {
  const outcome = await quantize(flag, budget, ...SHAPE, ...TEXT, '-o', `budget${flag}`);
  const [artifact] = outcome.artifacts;
  expect(artifact[figure]).toBeLessThanOrEqual(most);
  expect(artifact[figure]).toBeGreaterThan((flag === '--size' ? 0.99 : 0.9) * most);
});

it.concurrent('another seed gives other weights', async () => {
  await quantize(...SETTINGS, '--seed', '1', '-o', 'seeded');
  expect(manifest('seeded').weights).not.toEqual(manifest('first').weights);
});

describe('a plan', () => {
  it.concurrent('from an artifact makes the same weights again', async () => {
    expect(new Set(Object.values(manifest('first').plan.modules).flatMap(({ bits }) => bits)).size).toBeGreaterThan(1);
    await quantize('--plan', 'first/pcomp.json', ...TEXT, '-o', 'planned');
    expect(manifest('planned').weights).toEqual(manifest('first').weights);
    expect(manifest('planned').plan).toEqual(manifest('first').plan);
    expect(manifest('planned').outputs['onnx/model_q2.onnx_data']).toEqual(manifest('first').outputs['onnx/model_q2.onnx_data']);
  });

  it.concurrent('written by hand is followed, group by group', async () => {
    const plan = structuredClone(manifest('first').plan) as {
      modules: Record<string, { groupSize: number; bits: number[]; transform?: string }>;
    };
    for (const module of Object.values(plan.modules)) delete module.transform;
    plan.modules['model.layers.1.mlp.down_proj'] = { groupSize: 32, bits: [1, 2, 3, 4, 5, 8] };
    plan.modules['model.layers.0.self_attn.q_proj'] = { groupSize: 64, bits: [3] };
    scratch.write('plan.json', JSON.stringify(plan));
    await quantize('--plan', 'plan.json', '--method', 'rtn', '-o', 'by-hand');
    const { modules } = await inspect('by-hand');
    for (const { name, groupSize, bits } of modules)
      expect({ [name]: { groupSize, bits } }).toEqual({ [name]: plan.modules[name] });
  });
});

it.concurrent('--skip and --only decide which layers are quantized', async () => {
  const outcome = await quantize(
    ...['--bits', '3', ...SHAPE, '--method', 'rtn', '-o', 'some', '--only', 'model.layers.1', '*.q_proj', '--skip', '*.up_proj'],
  );
  expect(outcome).toMatchObject({ modules: 14, quantizedModules: 7, averageBits: 3 });
  const { modules, tensors, averageBits } = await inspect('some');
  const parts = [
    'self_attn.q_proj',
    'self_attn.k_proj',
    'self_attn.v_proj',
    'self_attn.o_proj',
    'mlp.gate_proj',
    'mlp.down_proj',
  ];
  expect(modules.map(({ name }) => name)).toEqual([
    'model.layers.0.self_attn.q_proj',
    ...parts.map((part) => `model.layers.1.${part}`),
  ]);
  expect(averageBits).toBe(3);
  expect(tensors.filter(({ name }) => name.includes('up_proj'))).toHaveLength(2);
});

describe('the sizes that a dry run predicts are those of the artifact:', () => {
  it.concurrent.each([
    ['rtn, every layout', '--method rtn --preset paper --bits 2 --format onnx,safetensors'],
    ['rtn of 1 bit', '--method rtn --preset paper --bits 1 --format onnx,safetensors'],
    ['rtn of 1 bit, symmetric', '--method rtn --preset paper --bits 1 --symmetric --format onnx,safetensors'],
    ['rtn with embeddings', '--method rtn --preset paper --bits 3 --embeddings 4 --format onnx,safetensors'],
    ['gptq in act-order', `--method gptq --preset paper --bits 4 --act-order --format onnx,gptq ${TEXT.join(' ')}`],
    ['a plan', `--plan first/pcomp.json --format onnx,safetensors ${TEXT.join(' ')}`],
  ])('%s', async (name, line) => {
    const group = line.includes('--plan') ? [] : SHAPE;
    const args = [...line.split(' '), ...group, '-o', name.replaceAll(/\W/g, '-')];
    const predicted = await quantize(...args, '--dry-run');
    const real = await quantize(...args);
    const figures = (outcome: QuantizeOutcome) =>
      outcome.artifacts.map(({ format, averageBits, bitsPerWeight, quantizedBytes, runtimeBytes }) => {
        return { format, averageBits, bitsPerWeight, quantizedBytes, runtimeBytes };
      });
    expect(figures(predicted)).toEqual(figures(real));
    for (const [i, { bytes }] of predicted.artifacts.entries()) expect(real.artifacts[i].bytes).toBeGreaterThan(bytes);
  });
});
