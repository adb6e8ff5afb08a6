/** Budgets are never exceeded and used up; groups of several sizes are a part of them, in every layout. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import type { BitPlan } from '../../src/methods/quantize/quantizer.ts';
import { inspect } from '../../src/runs/inspect/inspect.ts';
import type { QuantizeRequest } from '../../src/runs/quantize/recipe.ts';
import { saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { runCli } from '../support/run-cli.ts';
import { runEvaluate, runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const scratch = scratchFolder();
const at = (name: string) => join(scratch.path, name);
const text = at('text.txt');
const TEXT = { calibration: [text], samples: 16, sequenceLength: 32 };

beforeAll(async () => {
  const shape = { hidden_size: 128, intermediate_size: 280, num_attention_heads: 8, num_key_value_heads: 4 };
  await saveCheckpoint(at('toy'), tinyLlama('budgets', shape));
  scratch.write('text.txt', tinyText(3000));
});

const planOf = (name: string) => (JSON.parse(readFileSync(join(at(name), 'pcomp.json'), 'utf8')) as { plan: BitPlan }).plan;

describe('of a toy of fourteen layers', () => {
  const SIZES = { onnx: 200_000, safetensors: 135_000 };
  const cases = (['rtn', 'slim-llm'] as const).flatMap((method) =>
    (['onnx', 'safetensors'] as const).flatMap((format) =>
      // A survey on text takes long: each layout has one of the two.
      (method === 'rtn' ? ([32, 'auto'] as const) : [format === 'onnx' ? ('auto' as const) : (32 as const)]).flatMap(
        (groupSize) => [
          [method, format, groupSize, 'bits', 2.37, 'averageBits'] as const,
          [method, format, groupSize, 'bpw', 3.2, 'bitsPerWeight'] as const,
          [method, format, groupSize, 'size', SIZES[format], 'bytes'] as const,
        ],
      ),
    ),
  );
  it.each(cases)('%s, %s, groups of %s: --%s %d is kept and used up', async (method, format, groupSize, budget, most, figure) => {
    const name = `${method}-${format}-${groupSize}-${budget}`;
    const request: QuantizeRequest = { method, formats: [format], groupSize, [budget]: most, ...(method === 'rtn' ? {} : TEXT) };
    const { artifacts } = await runQuantize(at('toy'), at(name), request);
    expect(artifacts[0][figure]).toBeLessThanOrEqual(most);
    // One group of the widest layer and the node it comes to need are 1 to 2 % of so small a file.
    expect(artifacts[0][figure]).toBeGreaterThanOrEqual((budget === 'size' ? 0.98 : 0.995) * most);
  });
});

describe('groups of several sizes', () => {
  const request: QuantizeRequest = { ...TEXT, bpw: 2.6, groupSize: 'auto', formats: ['onnx', 'safetensors'] };

  beforeAll(async () => {
    await runQuantize(at('toy'), at('mixed'), request);
  });

  it('are in the plan, and inspect shows them of either layout', async () => {
    const { modules } = planOf('mixed');
    const sizes = Object.values(modules).map(({ groupSize }) => groupSize);
    expect(new Set(sizes).size).toBeGreaterThan(1);
    for (const path of [at('mixed'), join(at('mixed'), 'model.safetensors')]) {
      const inspected = (await inspect(path)).modules;
      expect(inspected.map(({ name, groupSize }) => [name, groupSize])).toEqual(
        Object.keys(modules).map((name, i) => [name, sizes[i]]),
      );
    }
    const config = JSON.parse(readFileSync(join(at('mixed'), 'config.json'), 'utf8'));
    expect(config.quantization_config.group_size).toEqual([...new Set(sizes)].sort((a, b) => a - b));
  });

  it('of a plan are made again, to the same bytes, and no size is asked for', async () => {
    const planned = { ...request, bpw: undefined, groupSize: undefined, plan: join(at('mixed'), 'pcomp.json') };
    await runQuantize(at('toy'), at('planned'), planned);
    for (const file of ['model.safetensors', 'onnx/model_q2.onnx', 'onnx/model_q2.onnx_data'])
      expect(readFileSync(join(at('planned'), file)).equals(readFileSync(join(at('mixed'), file)))).toBe(true);
  });

  it('lose less than one size everywhere at the same stored size', async () => {
    const losses = await Promise.all(
      ([32, 64, 128] as const).map(async (groupSize) => {
        await runQuantize(at('toy'), at(`fixed-${groupSize}`), { ...request, groupSize });
        return predictedLoss(`fixed-${groupSize}`);
      }),
    );
    for (const loss of losses) expect(predictedLoss('mixed')).toBeLessThanOrEqual(loss);
  });

  it('are computed by onnxruntime as they are decoded', async () => {
    const exact = await runEvaluate(at('mixed'), text);
    const fast = await runEvaluate(at('mixed'), text, { accuracy: 'fast' });
    expect(Math.abs(fast.perplexity / exact.perplexity - 1)).toBeLessThan(0.02);
  });

  it.each([
    ['slim-llm-plus', { method: 'slim-llm-plus', steps: 3 }],
    ['branches', { lowrank: 'bpw=1' }],
    ['joint', { lowrank: 'bpw=1', joint: true }],
    ['memory', { bpw: undefined, runtimeMemory: 130_000, formats: ['onnx'] }],
  ] as const)('go with %s', async (name, changes) => {
    const { artifacts } = await runQuantize(at('toy'), at(name), { ...request, ...changes });
    if (name === 'memory') expect(artifacts[0].runtimeBytes).toBeLessThanOrEqual(130_000);
    else expect(artifacts[0].bitsPerWeight).toBeLessThanOrEqual('lowrank' in changes ? 3.6 : 2.6);
    expect(new Set(Object.values(planOf(name).modules).map(({ groupSize }) => groupSize)).size).toBeGreaterThan(1);
  });

  it('are refused where there is one size, and a plan whose rotations differ is', async () => {
    const quantize = (...args: string[]) => runCli(['quantize', 'toy', '-o', 'refused', ...args], { cwd: scratch.path });
    const auto = ['--group-size', 'auto'];
    expect((await quantize('--bits', '2', '--preset', 'paper', ...auto)).stderr).toMatch(
      /--group-size auto: preset paper has one size/,
    );
    expect((await quantize('--bits', '2', '--method', 'gptq', ...auto)).stderr).toMatch(
      /--group-size auto: --method gptq has one size/,
    );
    expect((await quantize('--bits', '2', '--without', 'allocation', ...auto)).stderr).toMatch(
      /--group-size auto: sizes are chosen by/,
    );
    const [q, k] = ['q_proj', 'k_proj'].map((name) => `model.layers.0.self_attn.${name}`);
    const modules = {
      [q]: { groupSize: 32, bits: [2, 2, 2, 2], transform: 'perm-had' },
      [k]: { groupSize: 64, bits: [2, 2], transform: 'perm-had' },
    };
    scratch.write('plan.json', JSON.stringify({ modules }));
    expect((await quantize('--plan', 'plan.json', '--only', q, k)).stderr).toMatch(
      /k_proj" has transform perm-had of 64 columns, but another that reads the same input has perm-had of 32 columns/,
    );
  });
});

function predictedLoss(name: string): number {
  return JSON.parse(readFileSync(join(at(name), 'report.json'), 'utf8')).allocation.predictedLoss;
}
