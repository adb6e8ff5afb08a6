/** `merge --method moe`: the experts' MLPs as they are, everything else the base's, and routers that know their experts' prompts. */
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import { Calibration } from '../../src/calibration/calibration.ts';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { conditionOf, routerRow } from '../../src/methods/merge/moe/router.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { nudged, readWeights, saveFolder, weightsOf } from '../support/merge-models.ts';
import { runCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);
const HIDDEN = 32;

const base = tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 64, hidden_size: HIDDEN }, { dtype: 'F32' });
const weights = weightsOf(base);
const experts = { math: nudged(weights, 1), play: nudged(weights, 2) };
const PROMPTS = {
  math: ['def add(a, b):', 'for i in range(10):', 'import numpy as np'],
  play: ['ROMEO: O, she doth teach', 'What say you, my lord?', 'Enter the king and his train'],
};
const NEGATIVE = ['To be or not to be', 'class Thing:'];

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 1e9);
  for (const [name, own] of Object.entries(experts)) await saveFolder(at(name), own, base.config);
  for (const name of ['base', 'math', 'play'])
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${file}`), at(name, file));
  for (const [name, lines] of Object.entries(PROMPTS)) writeFileSync(at(`${name}.txt`), `${lines.join('\n')}\n\n`);
  writeFileSync(at('not.jsonl'), NEGATIVE.map((prompt) => JSON.stringify({ prompt })).join('\n'));
}, 60_000);

const USUAL = ['--prompts', 'math=math.txt', 'play=play.txt'];
const merge = (output: string, ...args: string[]) =>
  runCli(['merge', 'math', 'play', '--base', 'base', '--method', 'moe', '-o', output, ...args], { cwd });

/** What enters the MLP of a block for one prompt alone, (tokens, hidden). */
async function entering(prompt: string, block: number): Promise<Float32Array> {
  await using source = await openModelSource(at('base'));
  await using engine = await createEngine({ device: 'cpu', threads: 1 });
  const tokenizer = await loadTokenizer(at('base'), 2048);
  await using calibration = new Calibration({
    model: source.model,
    engine,
    blas: createBlas(engine),
    windows: [Int32Array.from(tokenizer.encode(prompt))],
    path: 'base',
  });
  await calibration.start(source.weights);
  for (const each of source.model.blocks) {
    await using measured = await calibration.measure(each, source.weights, { inputs: [`${each.name}.mlp.input`], advance: true });
    if (each.index !== block) continue;
    for await (const { data } of measured.get(`${each.name}.mlp.input`)!.batches()) return data.slice();
  }
  throw new Error('no such block');
}

const unit = (values: readonly number[]) => values.map((value) => value / Math.hypot(...values));
const meanOf = (rows: readonly (readonly number[])[]) =>
  rows[0].map((_, j) => rows.reduce((sum, row) => sum + row[j], 0) / rows.length);
const lastRow = (states: Float32Array) => [...states.subarray(states.length - HIDDEN)];

describe('the sparse model', () => {
  it('has every expert’s MLP bit by bit, the rest of the base, and the configuration of its kind', async () => {
    expect(await merge('mixtral', ...USUAL, '--quiet')).toMatchObject({ code: 0, stderr: '' });
    const made = await readWeights(at('mixtral'));
    const names = { gate_proj: 'w1', up_proj: 'w3', down_proj: 'w2' };
    let expected = 0;
    for (const [name, { values }] of weights) {
      const match = /^(.*)\.mlp\.(\w+)\.weight$/.exec(name);
      if (!match) {
        expect(made.get(name)!.values, name).toEqual(values);
        expected++;
        continue;
      }
      Object.values(experts).forEach((own, k) => {
        const stored = `${match[1]}.block_sparse_moe.experts.${k}.${names[match[2] as keyof typeof names]}.weight`;
        expect(made.get(stored)!.values, stored).toEqual(own.get(name)!.values);
        expected++;
      });
    }
    expect(made.size).toBe(expected + Number(base.config['num_hidden_layers']));
    expect(JSON.parse(readFileSync(at('mixtral', 'config.json'), 'utf8'))).toMatchObject({
      architectures: ['MixtralForCausalLM'],
      model_type: 'mixtral',
      num_local_experts: 2,
      num_experts_per_tok: 2,
      hidden_size: HIDDEN,
    });
  });

  it('routes by what the base makes of the last token of each prompt', async () => {
    const made = await readWeights(at('mixtral'));
    for (const block of [0, 1]) {
      const { shape, values } = made.get(`model.layers.${block}.block_sparse_moe.gate.weight`)!;
      expect(shape).toEqual([2, HIDDEN]);
      for (const [k, prompts] of Object.values(PROMPTS).entries()) {
        const states = await Promise.all(prompts.map((prompt) => entering(prompt, block)));
        const row = unit(meanOf(states.map(lastRow)));
        for (let j = 0; j < HIDDEN; j++) expect(Math.abs(values[k * HIDDEN + j] - row[j])).toBeLessThan(1e-4);
      }
    }
  });

  it('routes by means over tokens, less those of prompts that an expert is not for', async () => {
    const args = ['--gate', 'hidden-avg', '--negative', 'play=not.jsonl', '--top-k', '1'];
    expect(await merge('averaged', ...USUAL, ...args, '--quiet')).toMatchObject({ code: 0 });
    const { values } = (await readWeights(at('averaged'))).get('model.layers.1.block_sparse_moe.gate.weight')!;
    const all = async (prompts: readonly string[]) => {
      const rows: number[][] = [];
      for (const prompt of prompts) {
        const states = await entering(prompt, 1);
        for (let i = 0; i < states.length; i += HIDDEN) rows.push([...states.subarray(i, i + HIDDEN)]);
      }
      return meanOf(rows);
    };
    const [positive, negative] = [await all(PROMPTS.play), await all(NEGATIVE)];
    const row = unit(positive.map((value, j) => value - negative[j]));
    for (let j = 0; j < HIDDEN; j++) expect(Math.abs(values[HIDDEN + j] - row[j])).toBeLessThan(1e-4);
    expect(JSON.parse(readFileSync(at('averaged', 'config.json'), 'utf8'))).toMatchObject({ num_experts_per_tok: 1 });
  });

  it('routes by embeddings, the same in every block, or at random', async () => {
    expect(await merge('embed', ...USUAL, '--gate', 'embed', '--quiet')).toMatchObject({ code: 0 });
    const tokenizer = await loadTokenizer(at('base'), 2048);
    const table = weights.get('model.embed_tokens.weight')!.values;
    const tokens = PROMPTS.math.flatMap((prompt) => [...tokenizer.encode(prompt)]);
    const row = unit(meanOf(tokens.map((token) => [...table.subarray(token * HIDDEN, (token + 1) * HIDDEN)])));
    const made = await readWeights(at('embed'));
    for (const block of [0, 1])
      for (let j = 0; j < HIDDEN; j++)
        expect(Math.abs(made.get(`model.layers.${block}.block_sparse_moe.gate.weight`)!.values[j] - row[j])).toBeLessThan(1e-5);
    expect(await merge('random', '--gate', 'random', '--quiet')).toMatchObject({ code: 0 });
    const random = (await readWeights(at('random'))).get('model.layers.0.block_sparse_moe.gate.weight')!.values;
    expect(Math.abs(Math.hypot(...random.subarray(0, HIDDEN)) - 1)).toBeLessThan(1e-6);
  });

  it('of a Qwen2 has a shared expert of zeros, so that equal experts make the dense model', async () => {
    const config = { ...base.config, architectures: ['Qwen2ForCausalLM'], model_type: 'qwen2' };
    const biases = new Map(weights);
    for (const block of [0, 1])
      for (const [part, size] of [
        ['q', 'num_attention_heads'],
        ['k', 'num_key_value_heads'],
        ['v', 'num_key_value_heads'],
      ] as const) {
        const rows = weights.get(`model.layers.${block}.self_attn.${part}_proj.weight`)!.shape[0];
        expect(size).toBeTruthy();
        biases.set(`model.layers.${block}.self_attn.${part}_proj.bias`, {
          dtype: 'F32',
          shape: [rows],
          values: new Float32Array(rows),
        } as never);
      }
    for (const name of ['q-base', 'q-one', 'q-two']) await saveFolder(at(name), biases, config);
    expect(
      await runCli(
        ['merge', 'q-one', 'q-two', '--base', 'q-base', '--method', 'moe', '--gate', 'random', '-o', 'qwen', '--quiet'],
        { cwd },
      ),
    ).toMatchObject({ code: 0 });
    const made = await readWeights(at('qwen'));
    const get = (name: string) => made.get(`model.layers.0.mlp.${name}.weight`)!.values;
    const x = Float32Array.from({ length: HIDDEN }, (_, j) => Math.sin(j + 1));
    const times = (w: Float32Array, v: ArrayLike<number>) =>
      Array.from({ length: w.length / v.length }, (_, i) =>
        Array.from({ length: v.length }, (_, j) => w[i * v.length + j] * v[j]).reduce((a, b) => a + b, 0),
      );
    const mlp = (gate: Float32Array, up: Float32Array, down: Float32Array) => {
      const [g, u] = [times(gate, x), times(up, x)];
      return times(
        down,
        g.map((value, i) => (value / (1 + Math.exp(-value))) * u[i]),
      );
    };
    const part = (name: string) => weights.get(`model.layers.0.mlp.${name}.weight`)!.values;
    const dense = mlp(part('gate_proj'), part('up_proj'), part('down_proj'));
    const logits = times(get('gate'), x);
    const odds = logits.map((value) => Math.exp(value - Math.max(...logits)));
    const total = odds.reduce((sum, value) => sum + value, 0);
    const sparse = dense.map(() => 0);
    for (const k of [0, 1])
      mlp(get(`experts.${k}.gate_proj`), get(`experts.${k}.up_proj`), get(`experts.${k}.down_proj`)).forEach((value, i) => {
        sparse[i] += (odds[k] / total) * value;
      });
    const shared = mlp(get('shared_expert.gate_proj'), get('shared_expert.up_proj'), get('shared_expert.down_proj'));
    const open = 1 / (1 + Math.exp(-times(get('shared_expert_gate'), x)[0]));
    for (const [i, value] of dense.entries()) expect(Math.abs(sparse[i] + open * shared[i] - value)).toBeLessThan(1e-5);
  });
});

it('a router whose rows point the same way is told of', async () => {
  expect(conditionOf([Float32Array.of(1, 0), Float32Array.of(0, 1)])).toBeCloseTo(1, 6);
  expect(conditionOf([Float32Array.of(1, 0), Float32Array.of(1, 0)])).toBeGreaterThan(1e6);
  expect([...routerRow(Float64Array.of(3, 4), undefined)]).toEqual([Math.fround(0.6), Math.fround(0.8)]);
  const { stderr } = await merge('alike', '--prompts', 'math=math.txt', 'play=math.txt');
  expect(stderr).toMatch(/the rows of 2 of 2 routers nearly point the same way/);
});

it.each([
  [['--gate', 'random', '--prompts', 'math=math.txt'], /--gate random: reads no prompts/],
  [[], /--prompts: moe makes routers from prompts/],
  [['--prompts', 'math=math.txt'], /--prompts: none for expert play/],
  [['--prompts', 'other=math.txt'], /--prompts other=math.txt: label=FILE is expected, of the experts math, play/],
  [[...USUAL, '--top-k', '3'], /--top-k 3: there are 2 experts/],
  [[...USUAL, '--dtype', 'f16'], /--dtype: --method moe copies tensors/],
])('%j is refused', async (args, message) => {
  const { code, stderr } = await merge('refused', ...args, '--quiet');
  expect(stderr).toMatch(message);
  expect(code).toBe(2);
  expect(existsSync(at('refused'))).toBe(false);
});

it('prompts are nothing for other methods', async () => {
  const { code, stderr } = await runCli(['merge', 'math', 'play', '-o', 'no', '--method', 'linear', ...USUAL], { cwd });
  expect(stderr).toMatch(/--prompts: --method linear makes no routers; moe does/);
  expect(code).toBe(2);
});
