/** Routed experts and sparse updates in other forms: beside an artifact, in their own tensors, and as plain factors where that loses little. */
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, expect, it } from 'vitest';
import { readAdapterFolder } from '../../src/artifacts/adapter-reader.ts';
import { writeRouted } from '../../src/artifacts/routed-adapter.ts';
import { writeDelta } from '../../src/artifacts/sparse-delta.ts';
import { normal } from '../../src/methods/rank/training/initial.ts';
import { adapt } from '../../src/runs/adapt/adapt.ts';
import { type ConvertRequest, convertAdapter, inspectAdapter } from '../../src/runs/adapt/convert.ts';
import { type AdaptRequest, adaptRecipe } from '../../src/runs/adapt/recipe.ts';
import { evaluate } from '../../src/runs/evaluate/evaluate.ts';
import { verifyArtifact } from '../../src/runs/inspect/verify-artifact.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const at = (...parts: string[]) => join(scratch.path, ...parts);
const MACHINE = { device: 'cpu', threads: 1, maxMemory: 2 ** 30 } as const;
const MODES = { overwrite: true, resume: false, dryRun: false } as const;
/** Activations of 8 bits move the loss by this much at most. */
const FAST = 5e-3;

const train = (output: string, request: AdaptRequest) =>
  adapt(
    at('base'),
    at(output),
    adaptRecipe({ text: [at('text.txt')], sequenceLength: 32, batch: 4, ...MACHINE, ...request }, 1),
    MODES,
  );
const nll = async (model: string, adapter?: string, accuracy: 'exact' | 'fast' = 'exact'): Promise<number> => {
  const options = { ...MACHINE, text: [at('text.txt')], sequenceLength: 32, accuracy };
  return (await evaluate(at(model), { ...options, ...(adapter === undefined ? {} : { adapter: at(adapter) }) })).nll;
};
const convert = (adapter: string, to: ConvertRequest['to'], output: string, more: Partial<ConvertRequest> = {}) =>
  convertAdapter(at(adapter), at(output), { to, overwrite: true, threads: 1, ...more });
const FOLDED = () => ({ base: at('base'), text: [at('text.txt')] });

/** The adapter with other routers: `spread` times a normal of deviation 1. */
async function withRouters(from: string, to: string, spread: number): Promise<void> {
  const contents = await readAdapterFolder(at(from));
  const routed = contents.routed.map((module) => {
    const { name, router, expertsB } = module;
    return { ...module, router: normal(router.length, spread, 4, name), expertsB: expertsB.map((value) => 3 * value) };
  });
  rmSync(at(to), { recursive: true, force: true });
  mkdirSync(at(to));
  await writeRouted(at(to), { ...contents, base: 'base', routed });
}

beforeAll(async () => {
  await saveCheckpoint(at('base'), tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 64 }), 1e9);
  for (const file of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${file}`), at('base', file));
  writeFileSync(at('text.txt'), readFileSync(fixture('text/python.train.txt'), 'utf8').slice(0, 9000));
  await runQuantize(at('base'), at('q'), { bits: 4, groupSize: 32, formats: ['onnx'], samples: 4, sequenceLength: 32 });
  await train('topk', { method: 'mola', budget: 'params=6k', expertRank: 1, steps: 15, lr: 2e-2, profile: '4,4' });
  await train('soft', { method: 'mola', router: 'soft', budget: 'params=4k', steps: 15, lr: 2e-2 });
  await train('sparse', { method: 'snella', budget: 'density=0.05', steps: 15, lr: 2e-3 });
}, 240_000);

it.each(['topk', 'soft'])(
  'experts (%s) run beside a quantized artifact as they do on its weights',
  async (name) => {
    await convert(name, 'onnx', 'on', { base: at('q') });
    const expected = await nll('q', name);
    expect(Math.abs(expected - (await nll('q')))).toBeGreaterThan(0.02);
    expect(Math.abs((await nll('on')) - expected)).toBeLessThan(1e-5);
    expect(Math.abs((await nll('on', undefined, 'fast')) - expected)).toBeLessThan(FAST);
    await expect(convert(name, 'onnx', 'twice', { base: at('on') })).rejects.toThrow(
      /has experts of its own, and takes no others/,
    );
    await expect(nll('on', name)).rejects.toThrow(/".*_proj" of .* has experts of its own, and takes no others/);
    await expect(convert(name, 'onnx-inputs', 'no', { base: at('q') })).rejects.toThrow(/constants of the file: --to onnx/);
    await expect(
      adapt(at('on'), at('no'), adaptRecipe({ text: [at('text.txt')], budget: 'r=1', ...MACHINE }, 1), MODES),
    ).rejects.toThrow(/has experts beside it, and takes no adapter in training/);
  },
  120_000,
);

it.each(['topk', 'soft'])('experts (%s) keep their own tensors', async (name) => {
  await convert(name, 'routed', 'again');
  const [first, second] = await Promise.all([name, 'again'].map((folder) => readAdapterFolder(at(folder))));
  expect(second).toEqual(first);
  await expect(convert(name, 'delta', 'no')).rejects.toThrow(/--to delta keeps sparse updates as they are/);
});

it('a soft router that hardly chooses is folded, into factors or into the base', async () => {
  await withRouters('soft', 'even', 1e-3);
  const expected = await nll('base', 'even');
  expect(Math.abs(expected - (await nll('base')))).toBeGreaterThan(0.02);
  for (const fold of ['ls', 'mean'] as const) {
    const { folded, adapter } = await convert('even', 'peft', 'plain', { ...FOLDED(), fold });
    expect(Math.max(...folded!.map(({ error }) => error))).toBeLessThan(0.05);
    expect(Math.min(...folded!.map(({ entropy }) => entropy!))).toBeGreaterThan(0.999);
    expect(adapter!.layout).toBe('lora');
    expect(Math.abs((await nll('base', 'plain')) - expected)).toBeLessThan(5e-3);
  }
  await convert('even', 'merged', 'merged', FOLDED());
  expect(Math.abs((await nll('merged')) - expected)).toBeLessThan(5e-3);
  // What it was made from and how, in both.
  for (const folder of ['plain', 'merged']) {
    const made = JSON.parse(readFileSync(at(folder, 'pcomp.json'), 'utf8'));
    expect(made).toMatchObject({ command: 'adapt convert', recipe: { adapter: 'even', base: 'base', text: ['text.txt'] } });
    expect(made.folded).toHaveLength(14);
    const text = { bytes: 9000, sha256: expect.stringMatching(/^[0-9a-f]{64}$/) };
    expect(made.inputs).toMatchObject({ 'text/0/text.txt': text, 'base/model.safetensors': {}, 'adapter_config.json': {} });
    expect((await verifyArtifact(at(folder))).mismatches).toEqual([]);
  }
  expect(JSON.parse(readFileSync(at('merged', 'report.json'), 'utf8')).run.output).toBe(at('merged'));
  expect(readFileSync(at('merged', 'README.md'), 'utf8')).toContain(
    'pcomp adapt convert even --to merged --base base --text text.txt -o merged',
  );
  // An output that is in the way is found before anything is read.
  const taken = convertAdapter(at('even'), at('plain'), {
    to: 'peft',
    overwrite: false,
    threads: 1,
    base: 'gone',
    text: ['gone'],
  });
  await expect(taken).rejects.toThrow(/plain: exists. Replace it with --overwrite/);
  // Experts beside the head are not passed over.
  const contents = await readAdapterFolder(at('even'));
  mkdirSync(at('stray'));
  const routed = contents.routed.map((module) => {
    if (module.name !== 'model.layers.0.self_attn.q_proj') return module;
    const width = module.expertsB.length / module.outFeatures;
    return { ...module, name: 'lm_head', outFeatures: 2048, expertsB: new Float32Array(2048 * width) };
  });
  await writeRouted(at('stray'), { ...contents, base: 'base', routed });
  await expect(convert('stray', 'peft', 'no', FOLDED())).rejects.toThrow(/"lm_head" is no linear layer of a block of .*base/);
}, 120_000);

it('a router that chooses is refused, with what would be lost and the limit', async () => {
  await withRouters('soft', 'choosing', 2);
  await expect(convert('choosing', 'peft', 'no', FOLDED())).rejects.toThrow(
    /loses 0\.\d+ of what it adds \(root mean square, router entropy 0\.\d+ of 1\), and the limit is 0\.05; --max-error allows more/,
  );
  await expect(convert('topk', 'merged', 'no', FOLDED())).rejects.toThrow(/the limit is 0\.05/);
  // Picking the best two of four depends on the token however even the router is.
  await withRouters('topk', 'even picks', 1e-3);
  await expect(convert('even picks', 'peft', 'no', FOLDED())).rejects.toThrow(
    /router entropy 0\.99\d* of 1|router entropy 1\.0000 of 1/,
  );
  const { folded } = await convert('choosing', 'peft', 'yes', { ...FOLDED(), maxError: 1 });
  expect(Math.max(...folded!.map(({ error }) => error))).toBeGreaterThan(0.05);
  await expect(convert('soft', 'peft', 'no', { base: at('base') })).rejects.toThrow(/--text: .* routes tokens through experts/);
}, 120_000);

it('a sparse update is as low in rank as it is, or refused', async () => {
  await expect(convert('sparse', 'peft', 'no')).rejects.toThrow(/folded to rank \d+, ".*" loses 0\.\d+ .* the limit is 0\.05/);
  const { folded } = await convert('sparse', 'peft', 'whole', { rank: 32 });
  expect(Math.max(...folded!.map(({ error }) => error))).toBeLessThan(1e-3);
  expect(Math.abs((await nll('base', 'whole')) - (await nll('base', 'sparse')))).toBeLessThan(1e-5);
  // A layer that stays as it is has no factors, and no size that would not be a number.
  const { deltas, transposed } = await readAdapterFolder(at('sparse'));
  const still = deltas.map((delta, i) => (i === 0 ? { ...delta, values: delta.values.map(() => 0) } : delta));
  mkdirSync(at('still'));
  await writeDelta(at('still'), { base: 'base', deltas: still, transposed });
  const { adapter, folded: losses } = await convert('still', 'peft', 'moving', { rank: 32 });
  expect(adapter!.modules.map(({ name }) => name)).toEqual(deltas.slice(1).map(({ name }) => name));
  expect(losses![0]).toMatchObject({ name: deltas[0].name, rank: 0, error: 0 });
  await expect(convert('sparse', 'onnx', 'no', { base: at('q') })).rejects.toThrow(
    /changes single weights, which a branch cannot/,
  );
  await expect(convert('sparse', 'delta', 'no', { rank: 3 })).rejects.toThrow(/--rank: says how an adapter is folded/);
  await convert('sparse', 'delta', 'kept');
  expect(await inspectAdapter(at('kept'))).toEqual(await inspectAdapter(at('sparse')));
}, 120_000);
