/** `pcomp merge --extract-lora`: an expert as an adapter, and back again. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { extractLora } from '../../src/methods/merge/extract-lora.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { nudged, readWeights, saveFolder, weightsOf } from '../support/merge-models.ts';
import { randomSource, randomValues } from '../support/random.ts';
import { runCli, runCliJson } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

const SETUP_MS = 120_000;
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);

const MODELS = { llama: tinyLlama('base'), gpt2: tinyGpt2('base') };

interface Extracted {
  readonly modules: Readonly<Record<string, { readonly rank: number; readonly residual: number }>>;
  readonly saved: readonly string[];
  readonly lost: readonly string[];
}

beforeAll(async () => {
  for (const [name, base] of Object.entries(MODELS)) {
    await saveCheckpoint(at(name), base, 1e9);
    await saveFolder(at(`${name}-expert`), nudged(weightsOf(base), 1, 0.1), base.config);
  }
}, SETUP_MS);

describe.each(['llama', 'gpt2'] as const)('an expert of %s', (name) => {
  it(
    'at full rank is the expert again when its adapter is merged, norms and biases excepted, which are named',
    async () => {
      const flags = ['--base', name, '--extract-lora', '1000', '-o', `${name}-adapter`];
      const { modules, saved, lost } = await runCliJson<Extracted>(['merge', `${name}-expert`, ...flags], { cwd });
      for (const { residual } of Object.values(modules)) expect(residual).toBeLessThan(1e-5);
      expect(saved.length).toBeGreaterThan(0);
      await runCliJson(['merge', `${name}-adapter`, '--base', name, '--method', 'task-arithmetic', '-o', `${name}-again`], {
        cwd,
      });
      const [expert, again, base] = await Promise.all(
        [`${name}-expert`, `${name}-again`, name].map((folder) => readWeights(at(folder))),
      );
      for (const [tensor, { values }] of again) {
        const wanted = (lost.includes(tensor) ? base : expert).get(tensor)!.values;
        for (let i = 0; i < values.length; i++) expect(Math.abs(values[i] - wanted[i]), tensor).toBeLessThan(1e-5);
      }
    },
    SETUP_MS,
  );

  it(
    'at a small rank keeps the strongest directions, and says what is lost',
    async () => {
      const output = `${name}-thin`;
      const { modules } = await runCliJson<Extracted>(
        ['merge', `${name}-expert`, '--base', name, '--extract-lora', '3', '-o', output],
        { cwd },
      );
      for (const { rank, residual } of Object.values(modules)) {
        expect(rank).toBe(3);
        expect(residual).toBeGreaterThan(0.1);
      }
      await using adapter = await openCheckpoint(at(output, 'adapter_model.safetensors'));
      const config = JSON.parse(readFileSync(at(output, 'adapter_config.json'), 'utf8'));
      expect(config).toMatchObject({ peft_type: 'LORA', r: 3, lora_alpha: 3, use_rslora: false });
      expect(config.target_modules.toSorted()).toEqual(Object.keys(modules).toSorted());
      for (const { name: tensor, shape } of adapter.tensors.values()) {
        if (tensor.endsWith('lora_A.weight')) expect(shape[0]).toBe(3);
        if (tensor.endsWith('lora_B.weight')) expect(shape[1]).toBe(3);
      }
    },
    SETUP_MS,
  );
});

it('energy takes as many directions as hold that part of the squared change', () => {
  const [m, n] = [12, 9];
  const tau = Float32Array.from(randomValues(randomSource(5), m * n, 1));
  const whole = extractLora(tau, m, n, { rank: 100, energy: 1 });
  expect(whole.rank).toBe(9);
  const half = extractLora(tau, m, n, { rank: 100, energy: 0.9 });
  expect(half.rank).toBeLessThan(9);
  expect(half.residual ** 2).toBeLessThanOrEqual(0.1);
  const less = extractLora(tau, m, n, { rank: half.rank - 1, energy: 1 });
  expect(less.residual ** 2).toBeGreaterThan(0.1);
  expect(extractLora(new Float32Array(m * n), m, n, { rank: 4, energy: 1 })).toMatchObject({ rank: 0, residual: 0 });
});

it.each([
  [['llama-expert', 'gpt2-expert', '--extract-lora', '2'], /takes one expert|differs|base/],
  [['llama-expert', '--extract-lora', '0'], /--extract-lora 0: must be a whole number of at least 1/],
  [['llama-expert', '--extract-lora', '2', '--energy', '1.5'], /--energy 1\.5: must be above 0 and at most 1/],
  [['llama-expert', '--extract-lora', '2', '--method', 'ties'], /--method: has no use with --extract-lora/],
  [['llama-expert', '--energy', '0.5'], /--energy: goes with --extract-lora/],
])('refuses %j in one line', async (flags, message) => {
  const { code, stderr } = await runCli(['merge', ...flags, '--base', 'llama', '-o', 'refused'], { cwd });
  expect(code).toBe(2);
  expect(stderr).toMatch(message);
});
