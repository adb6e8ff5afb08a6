/** `pcomp merge --method regmean | fisher` as a user runs it: what is measured on text, and what comes of it. */
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { nudged, readWeights, saveFolder, weightsOf } from '../support/merge-models.ts';
import { runCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const SETUP_MS = 120_000;
const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);

const base = tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 512 });
const baseWeights = weightsOf(base);
const experts = { code: nudged(baseWeights, 1, 0.2), math: nudged(baseWeights, 2, 0.2) };
const V = 'model.layers.0.self_attn.v_proj.weight';
const NORM = 'model.layers.0.input_layernorm.weight';
const TEXTS = ['--calibration', 'code=code.txt', 'math=math.txt'];

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 1e9);
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${name}`), at('base', name));
  for (const name of ['code', 'math'] as const) await saveFolder(at(name), experts[name], base.config);
  const text = readFileSync(fixture('text/python.train.txt'), 'utf8');
  // Shorter than a window: every token counts once.
  writeFileSync(at('code.txt'), text.slice(0, 900));
  writeFileSync(at('math.txt'), text.slice(5000, 5600));
}, SETUP_MS);

const merge = (output: string, ...args: string[]) =>
  runCli(['merge', 'code', 'math', '--base', 'base', '-o', output, '--quiet', ...args], { cwd });

/** X^T X / T of what enters the first block's attention: a row of the embedding, normed. */
async function firstGram(name: keyof typeof experts): Promise<{ gram: number[][]; n: number }> {
  const { tokenizer, n } = { tokenizer: await loadTokenizer(at('base'), 2048), n: Number(base.config['hidden_size']) };
  const tokens = tokenizer.encode(readFileSync(at(`${name}.txt`), 'utf8'));
  const embedding = experts[name].get('model.embed_tokens.weight')!.values;
  const scale = experts[name].get(NORM)!.values;
  const gram = Array.from({ length: n }, () => new Array<number>(n).fill(0));
  for (const token of tokens) {
    const row = embedding.subarray(token * n, (token + 1) * n);
    const rms = Math.sqrt(row.reduce((sum, x) => sum + x * x, 0) / n + Number(base.config['rms_norm_eps']));
    const x = Array.from(row, (value, j) => (value / rms) * scale[j]);
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) gram[i][j] += (x[i] * x[j]) / tokens.length;
  }
  return { gram, n };
}

describe('regmean', () => {
  it('solves for the layer that is nearest to both experts, each on its own text', async () => {
    expect(await merge('regmean', '--method', 'regmean', '--set', 'reduce=1', ...TEXTS)).toMatchObject({ code: 0 });
    const merged = (await readWeights(at('regmean'))).get(V)!.values;
    // The normal equations: sum_k (W - W_k) G_k = 0, up to the ridge.
    const [a, b] = [await firstGram('code'), await firstGram('math')];
    const [wa, wb] = [experts.code.get(V)!.values, experts.math.get(V)!.values];
    const { n } = a;
    let worst = 0;
    let size = 0;
    for (let i = 0; i < merged.length / n; i++) {
      for (let j = 0; j < n; j++) {
        let [left, right] = [0, 0];
        for (let k = 0; k < n; k++) {
          left += (merged[i * n + k] - wa[i * n + k]) * a.gram[k][j];
          right += (merged[i * n + k] - wb[i * n + k]) * b.gram[k][j];
        }
        worst = Math.max(worst, Math.abs(left + right));
        size = Math.max(size, Math.abs(left));
      }
    }
    expect(size).toBeGreaterThan(0.01);
    expect(worst / size).toBeLessThan(2e-3);
  });

  it('averages what no text went through', async () => {
    const merged = await readWeights(at('regmean'));
    const [a, b] = [experts.code.get(NORM)!.values, experts.math.get(NORM)!.values];
    expect(Math.abs(merged.get(NORM)!.values[3] - (a[3] + b[3]) / 2)).toBeLessThan(1e-6);
  });
});

describe('fisher', () => {
  it('lies between the experts, nearer to the one that an element matters to, the same on every run', async () => {
    const quick = ['--method', 'fisher', '--set', 'samples=2', 'length=24', ...TEXTS];
    expect(await merge('fisher', ...quick)).toMatchObject({ code: 0 });
    expect(await merge('again', ...quick, '--threads', '1')).toMatchObject({ code: 0 });
    const [one, two] = [await readWeights(at('fisher')), await readWeights(at('again'))];
    const merged = one.get(V)!.values;
    const [a, b] = [experts.code.get(V)!.values, experts.math.get(V)!.values];
    const shares = Array.from(merged, (value, i) => (value - a[i]) / (b[i] - a[i])).filter(
      (_, i) => Math.abs(b[i] - a[i]) > 0.05,
    );
    expect(Math.min(...shares)).toBeGreaterThan(-1e-3);
    expect(Math.max(...shares)).toBeLessThan(1 + 1e-3);
    // Not a plain mean: some elements matter to one of them alone.
    expect(Math.max(...shares) - Math.min(...shares)).toBeGreaterThan(0.5);
    for (const [i, value] of two.get(V)!.values.entries()) expect(Math.abs(value - merged[i])).toBeLessThan(1e-3);
  });

  it('with the scale of one expert at 0 is the other', async () => {
    expect(await merge('one', '--method', 'fisher', '--set', 'samples=1', 'length=16', 'math.scale=0', ...TEXTS)).toMatchObject({
      code: 0,
    });
    const merged = (await readWeights(at('one'))).get(V)!.values;
    for (const [i, value] of experts.code.get(V)!.values.entries()) expect(Math.abs(merged[i] - value)).toBeLessThan(1e-5);
  });
});

it.each([
  [['--method', 'regmean'], /--calibration: regmean measures every expert on text of its own/],
  [['--method', 'fisher', '--calibration', 'code=code.txt'], /no text for expert math/],
  [['--method', 'fisher', ...TEXTS, '--plan', 'x.json'], /--plan: --method fisher learns nothing/],
])('%j is refused in one line', async (args, message) => {
  const { code, stderr } = await merge('refused', ...args);
  expect(code).toBe(2);
  expect(stderr).toMatch(message);
  expect(existsSync(at('refused'))).toBe(false);
});

it('a head that is tied in the base is run as it is there, and stored apart with --untie', async () => {
  const tied = { ...base.config, tie_word_embeddings: true };
  const names = ['tied-base', 'tied-code', 'tied-math'] as const;
  for (const [name, weights] of [
    [names[0], baseWeights] as const,
    [names[1], experts.code] as const,
    [names[2], experts.math] as const,
  ]) {
    await saveFolder(at(name), new Map([...weights].filter(([tensor]) => tensor !== 'lm_head.weight')), tied);
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${file}`), at(name, file));
  }
  const untied = await runCli(
    [
      'merge',
      'tied-code',
      'tied-math',
      '--base',
      'tied-base',
      '--method',
      'regmean',
      '--untie',
      '-o',
      'untied',
      '--quiet',
    ].concat('--calibration', 'tied-code=code.txt', 'tied-math=math.txt'),
    { cwd },
  );
  expect(untied).toMatchObject({ code: 0 });
  const written = await readWeights(at('untied'));
  expect(written.get('lm_head.weight')!.values).toEqual(written.get('model.embed_tokens.weight')!.values);
  expect(JSON.parse(readFileSync(at('untied', 'config.json'), 'utf8'))).toMatchObject({ tie_word_embeddings: false });
});
