/** `pcomp merge` as a user runs it: every kind of expert, the same bytes on every machine, and one clear line for what cannot be merged. */
import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { fromFloat32 } from '../../formats/dtype.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { artifactTree } from '../support/folder-tree.ts';
import {
  nudged,
  product,
  randomTensor,
  readWeights,
  saveAdapter,
  saveFile,
  saveFolder,
  weightsOf,
} from '../support/merge-models.ts';
import { runCli, runCliJson } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

/** Making models takes a while on a busy machine. */
const SETUP_MS = 120_000;
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);

const base = tinyLlama('base', { hidden_size: 64, intermediate_size: 48 }, { dtype: 'BF16' });
const baseWeights = weightsOf(base);
const math = nudged(baseWeights, 1);
const code = nudged(baseWeights, 2);
const A = randomTensor([2, 64], 3);
const B = randomTensor([48, 2], 4);
const GATE = 'model.layers.1.mlp.gate_proj';
const EXPERTS = ['code', 'lora', 'math.safetensors'];

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 20_000);
  await saveFile(at('math.safetensors'), math);
  await saveFolder(at('code'), code, base.config, 'F16');
  await saveAdapter(
    at('lora'),
    new Map([
      [`base_model.model.${GATE}.lora_A.weight`, A],
      [`base_model.model.${GATE}.lora_B.weight`, B],
    ]),
  );
}, SETUP_MS);

const run = (output: string, ...args: string[]) =>
  runCli(['merge', ...EXPERTS, '--base', 'base', '-o', output, '--quiet', ...args], { cwd });

interface Manifest {
  readonly tensors: Readonly<Record<string, { disposition: string; rule: string; dtype: string; sha256: string }>>;
  readonly inputs: readonly { label: string; kind: string; tensors: number; files: { name: string }[]; contentSha256: string }[];
}

const manifest = (output: string) => JSON.parse(readFileSync(at(output, 'pcomp.json'), 'utf8')) as Manifest;

describe('a base in three shards, a bare file, a LoRA and an F16 folder', () => {
  it('become a checkpoint with the names, types and shapes of the base', async () => {
    expect(readdirSync(at('base')).filter((name) => name.endsWith('.safetensors')).length).toBeGreaterThan(2);
    expect(await run('merged', '--method', 'task-arithmetic', '--set', 'lambda=0.5')).toMatchObject({ code: 0, stderr: '' });
    await using result = await openCheckpoint(at('merged'));
    await using original = await openCheckpoint(at('base'));
    const headers = (source: typeof result) =>
      Object.fromEntries([...source.tensors.values()].map(({ name, dtype, shape }) => [name, [dtype, ...shape]]));
    expect(headers(result)).toEqual(headers(original));
  });

  it('are merged by the formula, the LoRA too', async () => {
    const merged = await readWeights(at('merged'));
    const f16 = await readWeights(at('code'));
    const update = product(A, B, 2);
    for (const [name, { values }] of baseWeights) {
      const found = merged.get(name)!.values;
      for (let i = 0; i < values.length; i++) {
        const lora = name === `${GATE}.weight` ? update[i] : 0;
        const delta = math.get(name)!.values[i] - values[i] + (f16.get(name)!.values[i] - values[i]) + lora;
        const expected = values[i] + 0.5 * delta;
        // BF16 has 8 significant bits; rounding to nearest loses at most half of the last.
        expect(Math.abs(found[i] - expected)).toBeLessThanOrEqual(2 ** -8 * Math.abs(expected) + 1e-6);
      }
    }
  });

  it('are all in the manifest, with hashes of what went in and came out', async () => {
    const { tensors, inputs } = manifest('merged');
    expect(Object.keys(tensors).sort()).toEqual([...baseWeights.keys()].sort());
    expect(new Set(Object.values(tensors).map(({ disposition }) => disposition))).toEqual(new Set(['merged']));
    await using result = await openCheckpoint(at('merged'));
    for (const [name, { sha256 }] of Object.entries(tensors)) {
      const { data } = await result.read(name);
      expect(createHash('sha256').update(data).digest('hex'), name).toBe(sha256);
    }
    expect(inputs.map(({ label, kind, tensors: count }) => [label, kind, count])).toEqual([
      ['code', 'folder', baseWeights.size],
      ['lora', 'adapter', 2],
      ['math', 'file', baseWeights.size],
      ['base', 'folder', baseWeights.size],
    ]);
    await using file = await openCheckpoint(at('math.safetensors'));
    const content = createHash('sha256');
    for (const name of [...file.tensors.keys()].sort()) {
      const { dtype, shape, data } = await file.read(name);
      content.update(`${JSON.stringify([name, dtype, shape, createHash('sha256').update(data).digest('hex')])}\n`);
    }
    expect(inputs[2].contentSha256).toBe(content.digest('hex'));
  });

  it('take configuration and tokenizer of the base, and get a card', () => {
    expect(readdirSync(at('merged')).sort()).toEqual([
      'README.md',
      'config.json',
      'model.safetensors',
      'pcomp.json',
      'report.json',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
    expect(JSON.parse(readFileSync(at('merged', 'config.json'), 'utf8'))).toMatchObject(base.config);
    const card = readFileSync(at('merged', 'README.md'), 'utf8');
    expect(card).toMatch(/^---\nbase_model:\n- base\n- code\n- lora\n- math\n/);
    expect(card).toMatch(
      /pcomp merge code lora math.safetensors --base base --method task-arithmetic --set lambda=0.5 -o merged/,
    );
    expect(card).not.toContain(cwd);
  });

  it.each([
    ['linear', []],
    ['ties', ['--set', 'density=0.4', '*.mlp.*:lambda=0.7', 'math.weight=2']],
  ])('give the same bytes by %s on one thread and four, with little memory and much', async (method, settings) => {
    const trees = [];
    for (const machine of [
      ['--threads', '1', '--max-memory', '64MiB'],
      ['--threads', '4', '--max-memory', '64MiB'],
      ['--threads', '4', '--max-memory', '2GiB'],
    ]) {
      const output = `${method}-${machine[1]}-${machine[3]}`;
      expect(await run(output, '--method', method, ...settings, '--shard-size', '30kB', ...machine)).toMatchObject({ code: 0 });
      trees.push(artifactTree(at(output)));
    }
    expect(trees[1]).toEqual(trees[0]);
    expect(trees[2]).toEqual(trees[0]);
    expect(Object.keys(trees[0])).toContain('model.safetensors.index.json');
  });
});

describe('experts', () => {
  it('may come in any order, from globs, and as the shards of a series', async () => {
    await saveCheckpoint(at('series', 'big'), tinyLlama('base', base.config, { dtype: 'F32' }), 40_000);
    for (const name of readdirSync(at('series', 'big')).filter((file) => !file.startsWith('model-'))) {
      writeFileSync(at('series', 'big', name), '');
    }
    mkdirSync(at('set'));
    copyFileSync(at('math.safetensors'), at('set', 'math.safetensors'));
    for (const name of readdirSync(at('series', 'big')).filter((file) => file.startsWith('model-'))) {
      copyFileSync(at('series', 'big', name), at('set', name.replace('model', 'big')));
    }
    const merge = (output: string, ...experts: string[]) =>
      runCliJson<{ experts: object[] }>(['merge', ...experts, '-o', output, '--quiet'], { cwd });
    const result = await merge('by-glob', 'set/*.safetensors');
    expect(result.experts).toEqual([
      { label: 'big', kind: 'series', weight: 1 },
      { label: 'math', kind: 'file', weight: 1 },
    ]);
    const files = readdirSync(at('set')).map((name) => `set/${name}`);
    await merge('by-name', ...files.toReversed());
    expect(artifactTree(at('by-name'))).toEqual(artifactTree(at('by-glob')));
  });

  it('with a prefix more than the base are recognized', async () => {
    const wrapped = new Map(
      [...math].map(([name, tensor]) => [name === 'lm_head.weight' ? name : `language_model.${name}`, tensor]),
    );
    await saveFile(at('wrapped.safetensors'), wrapped);
    const { notes } = await runCliJson<{ notes: string[] }>(
      ['merge', 'wrapped.safetensors', '--base', 'base', '--method', 'linear', '--dtype', 'f32', '-o', 'unwrapped', '--quiet'],
      { cwd },
    );
    expect(notes).toEqual(['wrapped: names are the base\'s without "language_model."']);
    expect(await readWeights(at('unwrapped'))).toEqual(new Map([...math].map(([name, tensor]) => [name, tensor])));
  });

  it('alone, without a base, are averaged; the default is said', async () => {
    const { code: status, stderr } = await runCli(['merge', 'code', 'math.safetensors', '-o', 'mean'], { cwd });
    expect(status).toBe(0);
    expect(stderr).toMatch(/note: merging by linear, the default without a --base/);
    const mean = (await readWeights(at('mean'))).get('model.norm.weight')!.values;
    const parts = [await readWeights(at('code')), math].map((weights) => weights.get('model.norm.weight')!.values);
    expect([...mean]).toEqual([...mean.keys()].map((i) => expect.closeTo((parts[0][i] + parts[1][i]) / 2, 2)));
  });
});

describe('what cannot be merged is one line, and leaves nothing:', () => {
  const copy = (name: string, change: (weights: Map<string, { shape: readonly number[]; values: Float32Array }>) => void) => {
    const weights = new Map(math);
    change(weights);
    return saveFile(at(`${name}.safetensors`), weights);
  };
  const NORM = 'model.norm.weight';

  beforeAll(async () => {
    const whole = readFileSync(at('math.safetensors'));
    writeFileSync(at('cut.safetensors'), whole.subarray(0, whole.byteLength - 10));
    await copy('nan', (weights) => {
      const values = weights.get(NORM)!.values.slice();
      values[5] = Number.NaN;
      weights.set(NORM, { shape: [64], values });
    });
    await copy('shape', (weights) => weights.set(NORM, { shape: [32], values: new Float32Array(32) }));
    await copy('missing', (weights) => weights.delete(NORM));
    await copy('extra', (weights) => weights.set('model.bonus', { shape: [2], values: new Float32Array(2) }));
    await copy('large', (weights) => weights.set(NORM, { shape: [64], values: new Float32Array(64).fill(1e6) }));
    await saveFolder(at('other'), math, { ...base.config, rope_theta: 5e5, rms_norm_eps: 1e-6 });
    await saveFolder(at('quantized'), math, { ...base.config, quantization_config: { bits: 4 } });
  }, SETUP_MS);

  it.each([
    [
      'a file that was cut short',
      ['cut.safetensors'],
      1,
      /^pcomp: .*cut\.safetensors: .*\[data-truncated|offsets-out-of-bounds\]/,
    ],
    ['NaN', ['nan.safetensors'], 2, /tensor "model.norm.weight": expert "nan" holds NaN at flat index 5/],
    [
      'another shape',
      ['shape.safetensors'],
      2,
      /shape\.safetensors: tensor "model.norm.weight" is \[32\], but the base's is \[64\]/,
    ],
    ['a tensor too few', ['missing.safetensors'], 2, /missing\.safetensors: lacks "model.norm.weight" .*--on-missing base/],
    ['a tensor too many', ['extra.safetensors'], 2, /extra\.safetensors: has "model.bonus", .*--on-extra ignore/],
    [
      'another network',
      ['other'],
      2,
      /other: is not of the base's make: rms_norm_eps is 0.000001.*; rope_theta is 500000, the base's 10000/,
    ],
    ['quantized weights', ['quantized'], 2, /quantized: is quantized .*merge the float models/],
    [
      'a number too large for F16',
      ['large.safetensors', '--dtype', 'f16'],
      2,
      /tensor "model.norm.weight": .* is 1000000, which F16 cannot hold/,
    ],
    ['no such expert', ['nowhere.safetensors'], 1, /nowhere\.safetensors: no such file or folder/],
    ['a glob for nothing', ['nowhere/*.safetensors'], 2, /nowhere\/\*\.safetensors: no model matches/],
    ['an unknown method', ['math.safetensors', '--method', 'magic'], 2, /--method magic: must be one of linear, /],
    ['an unknown parameter', ['math.safetensors', '--set', 'sharpness=2'], 2, /sharpness: task-arithmetic has no such parameter/],
    ['a setting for no tensor', ['math.safetensors', '--set', '*.attention:lambda=2'], 2, /--set \*\.attention: matches none/],
    ['a setting for no expert', ['math.safetensors', '--set', 'code.weight=2'], 2, /no expert "code"; the experts are math/],
    ['weights for other experts', ['math.safetensors', '--weights', '1,2'], 2, /--weights 1,2: 2 weights for 1 experts/],
    ['an option of something else', ['math.safetensors', '--bits', '2'], 2, /unknown option '--bits'/],
  ])('%s', async (_, args, status, message) => {
    const method = args.includes('--method') ? [] : ['--method', 'task-arithmetic'];
    const { code, stdout, stderr } = await runCli(['merge', ...args, '--base', 'base', ...method, '-o', 'broken', '--quiet'], {
      cwd,
    });
    expect({ code, stdout }, stderr).toEqual({ code: status, stdout: '' });
    expect(stderr).toMatch(message);
    expect(stderr.trim().split('\n')).toHaveLength(1);
    expect(existsSync(at('broken'))).toBe(false);
    expect(existsSync(at('broken.partial'))).toBe(false);
  });

  it('unless it is asked for', async () => {
    const merge = (name: string, ...args: string[]) =>
      runCliJson<{ notes: string[] }>(
        ['merge', `${name}.safetensors`, '--base', 'base', '--method', 'linear', '-o', `allowed-${name}`, '--quiet', ...args],
        { cwd },
      );
    await merge('nan', '--allow-nonfinite');
    expect((await readWeights(at('allowed-nan'))).get(NORM)!.values[5]).toBeNaN();
    expect((await merge('missing', '--on-missing', 'base')).notes).toEqual([
      'missing: 1 tensors are missing and taken from the base: "model.norm.weight"',
    ]);
    expect((await readWeights(at('allowed-missing'))).get(NORM)).toEqual(baseWeights.get(NORM));
    expect((await merge('extra', '--on-extra', 'copy')).notes[0]).toMatch(/1 tensors that the base has not are added/);
    expect(manifest('allowed-extra').tensors['model.bonus']).toMatchObject({
      disposition: 'copied',
      rule: 'of extra',
      dtype: 'F32',
    });
  });
});

it('whole numbers are copied where they are equal, and refused where they are not', async () => {
  const save = async (name: string, last: number) => {
    const { createSafetensorsSink } = await import('../../formats/safetensors/writer.ts');
    await using sink = await createSafetensorsSink(at(name), [
      { name: 'steps', dtype: 'I32', shape: [3] },
      { name: 'w', dtype: 'F32', shape: [2] },
    ]);
    await sink.write('steps', new Uint8Array(Int32Array.of(1, 2, last).buffer));
    await sink.write('w', fromFloat32('F32', Float32Array.of(last, 1)));
    await sink.finalize();
  };
  await save('whole-a.safetensors', 3);
  await save('whole-b.safetensors', 3);
  await save('whole-c.safetensors', 4);
  const equal = await runCli(['merge', 'whole-a.safetensors', 'whole-b.safetensors', '-o', 'wholes', '--quiet'], { cwd });
  expect(equal.code, equal.stderr).toBe(0);
  expect(manifest('wholes').tensors['steps']).toMatchObject({ disposition: 'copied', dtype: 'I32' });
  const different = await runCli(['merge', 'whole-a.safetensors', 'whole-c.safetensors', '-o', 'never', '--quiet'], { cwd });
  expect(different).toMatchObject({ code: 2, stderr: expect.stringMatching(/tensor "steps" \(I32\) differs from the base's/) });
});

it('a dry run says what would be done, and writes nothing', async () => {
  const before = artifactTree(cwd);
  const { code: status, stdout } = await run('never', '--method', 'ties', '--dry-run');
  expect(status).toBe(0);
  expect(stdout).toMatch(
    /tensors +21 merged\n[\s\S]*to read +at most [\d.]+ kB, every pass counted\npeak buffers +[\d.]+ [kM]B on/,
  );
  expect(stdout).toMatch(/Dry run: nothing was written\.\n$/);
  expect(artifactTree(cwd)).toEqual(before);
});
