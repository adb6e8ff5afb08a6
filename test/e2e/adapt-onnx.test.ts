/** ONNX artifacts with adapters: what onnxruntime computes is the base with the adapter, in the file or fed, whatever its ranks. */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { openOnnx } from '../../formats/onnx/reader.ts';
import { adapt } from '../../src/runs/adapt/adapt.ts';
import { convertAdapter } from '../../src/runs/adapt/convert.ts';
import { readAdapterFeeds } from '../../src/runs/adapt/onnx.ts';
import { adaptRecipe } from '../../src/runs/adapt/recipe.ts';
import { evaluate } from '../../src/runs/evaluate/evaluate.ts';
import { inspect } from '../../src/runs/inspect/inspect.ts';
import { verifyArtifact } from '../../src/runs/inspect/verify-artifact.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const at = (...parts: string[]) => join(scratch.path, ...parts);
const MACHINE = { device: 'cpu', threads: 1, maxMemory: 2 ** 30 } as const;
const MODES = { overwrite: false, resume: false, dryRun: false } as const;
const nll = async (model: string, accuracy: 'exact' | 'fast', adapter?: string): Promise<number> => {
  const options = { ...MACHINE, text: [at('text.txt')], sequenceLength: 32, accuracy };
  return (await evaluate(at(model), { ...options, ...(adapter === undefined ? {} : { adapter: at(adapter) }) })).nll;
};
const convert = (adapter: string, to: 'onnx' | 'onnx-inputs', base: string, output: string) =>
  convertAdapter(at(adapter), at(output), { to, base: at(base), overwrite: true, threads: 1 });
/** Activations of 8 bits move the loss by this much at most. */
const FAST = 5e-3;

describe.each([
  ['llama', 2.5],
  ['gpt2', 3],
] as const)('an artifact of a %s at %d bits', (kind, bits) => {
  beforeAll(async () => {
    const config = { vocab_size: 2048, max_position_embeddings: 64 };
    await saveCheckpoint(at(kind), kind === 'llama' ? tinyLlama(kind, config) : tinyGpt2(kind, { vocab_size: 2048 }), 1e9);
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${file}`), at(kind, file));
    writeFileSync(at('text.txt'), readFileSync(fixture('text/python.train.txt'), 'utf8').slice(0, 9000));
    await runQuantize(at(kind), at(`${kind}-q`), { bits, groupSize: 32, formats: ['onnx'], samples: 4, sequenceLength: 32 });
    for (const [name, request] of Object.entries({ one: { budget: 'r=2' }, two: { budget: 'r=3', method: 'eva' } })) {
      const recipe = adaptRecipe(
        { text: [at('text.txt')], sequenceLength: 32, batch: 4, lr: 2e-2, steps: 20, ...request, ...MACHINE },
        1,
      );
      await adapt(at(`${kind}-q`), at(`${kind}-${name}`), recipe, MODES);
    }
  }, 120_000);

  it('has the adapter in the file, and is an artifact like any with branches', async () => {
    await convert(`${kind}-one`, 'onnx', `${kind}-q`, `${kind}-on`);
    const expected = await nll(`${kind}-q`, 'exact', `${kind}-one`);
    expect(Math.abs(expected - (await nll(`${kind}-q`, 'exact')))).toBeGreaterThan(0.02);
    expect(Math.abs((await nll(`${kind}-on`, 'exact')) - expected)).toBeLessThan(1e-5);
    expect(Math.abs((await nll(`${kind}-on`, 'fast')) - expected)).toBeLessThan(FAST);
    expect((await inspect(at(`${kind}-on`))).modules.filter(({ rank }) => rank === 2)).toHaveLength(
      (await readAdapterFeeds(at(`${kind}-one`))).length / 2,
    );
    expect((await verifyArtifact(at(`${kind}-on`))).mismatches).toEqual([]);
    await expect(convert(`${kind}-one`, 'onnx', `${kind}-on`, `${kind}-twice`)).rejects.toThrow(/has a branch of its own/);
  });

  it('takes adapters of any rank as inputs, and is the base without one', async () => {
    await convert(`${kind}-one`, 'onnx-inputs', `${kind}-q`, `${kind}-in`);
    expect(await nll(`${kind}-in`, 'fast')).toBe(await nll(`${kind}-q`, 'fast'));
    for (const name of ['one', 'two']) {
      const expected = await nll(`${kind}-q`, 'exact', `${kind}-${name}`);
      expect(Math.abs((await nll(`${kind}-in`, 'fast', `${kind}-${name}`)) - expected)).toBeLessThan(FAST);
    }
    await using file = await openOnnx(at(`${kind}-in`, 'onnx', kind === 'llama' ? 'model_q2.onnx' : 'model_q4.onnx'));
    for (const { name, shape } of await readAdapterFeeds(at(`${kind}-one`))) {
      const input = file.model.graph.inputs.find((value) => value.name === name)!;
      for (const [axis, size] of shape.entries()) {
        const free = input.shape![axis];
        if (typeof free === 'number') expect(free).toBe(size);
      }
      expect(input.shape!.filter((size) => typeof size === 'number')).toHaveLength(1);
    }
  });
});

it('what cannot go beside is refused by name', async () => {
  const other = adaptRecipe({ text: [at('text.txt')], sequenceLength: 32, budget: 'r=1', ...MACHINE }, 1);
  await adapt(at('gpt2'), at('other'), other, MODES);
  await expect(convert('other', 'onnx', 'llama-q', 'no')).rejects.toThrow(
    /changes module "h\.0\.attn\.c_attn", but the base has no such module/,
  );
  await expect(convert('llama-one', 'onnx', 'llama', 'no')).rejects.toThrow(/is no ONNX artifact \(float\)/);
  await expect(nll('llama-q', 'fast', 'llama-one')).rejects.toThrow(/has no input "model\.layers\.0/);
  const dora = adaptRecipe({ text: [at('text.txt')], sequenceLength: 32, budget: 'r=1', dora: true, steps: 1, ...MACHINE }, 1);
  await adapt(at('llama-q'), at('dora'), dora, MODES);
  await expect(convert('dora', 'onnx', 'llama-q', 'no')).rejects.toThrow(/is a DoRA/);
});
