/** `merge --tokenizer`: models whose vocabularies have grown apart, against rows put together by hand. */
import { copyFileSync, cpSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { evaluate } from '../../src/runs/evaluate/evaluate.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { nudged, readWeights, saveFolder, weightsOf } from '../support/merge-models.ts';
import { runCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);
const EMBEDDING = 'model.embed_tokens.weight';
const HEAD = 'lm_head.weight';

type Weights = ReturnType<typeof weightsOf>;
const settings = { vocab_size: 2048, hidden_size: 32, tie_word_embeddings: false, max_position_embeddings: 64 };
const base = tinyLlama('base', settings, { dtype: 'F32' });
const weights = { base: weightsOf(base) } as Record<'base' | 'chat' | 'tools', Weights>;
/** Tokens that experts add, in the order of their ids from 2048 on, and their rows. */
const ADDED = { chat: ['<|start|>', '<|end|>'], tools: ['<|end|>', '<tool>', ' prefab'] };
const ROWS = { base: 2048, chat: 2056, tools: 2051 };

/** More rows, of numbers that tell their place. */
function grown(own: Weights, rows: number, seed: number): Weights {
  return new Map(
    [...own].map(([name, tensor]) => {
      if (name !== EMBEDDING && name !== HEAD) return [name, tensor];
      const [before, columns] = tensor.shape;
      const values = new Float32Array(rows * columns);
      values.set(tensor.values);
      for (let i = before * columns; i < values.length; i++) values[i] = seed + i / values.length;
      return [name, { ...tensor, shape: [rows, columns], values }];
    }),
  ) as Weights;
}

function saveTokenizer(name: string, added: readonly string[], ordinary: readonly string[] = []): void {
  mkdirSync(at(name), { recursive: true });
  const json = JSON.parse(readFileSync(fixture('base/tokenizer.json'), 'utf8')) as {
    added_tokens: object[];
    model: { vocab: Record<string, number> };
  };
  for (const [i, content] of added.entries()) {
    json.added_tokens.push({
      id: 2048 + i,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    });
  }
  for (const [i, token] of ordinary.entries()) json.model.vocab[token] = 2048 + added.length + i;
  writeFileSync(at(name, 'tokenizer.json'), JSON.stringify(json));
  copyFileSync(fixture('base/tokenizer_config.json'), at(name, 'tokenizer_config.json'));
}

beforeAll(async () => {
  weights.chat = grown(nudged(weights.base, 1), ROWS.chat, 1);
  weights.tools = grown(nudged(weights.base, 2), ROWS.tools, 2);
  await saveCheckpoint(at('base'), base, 1e9);
  await saveFolder(at('chat'), weights.chat, { ...base.config, vocab_size: ROWS.chat });
  await saveFolder(at('tools'), weights.tools, { ...base.config, vocab_size: ROWS.tools });
  saveTokenizer('base', []);
  saveTokenizer('chat', ADDED.chat);
  saveTokenizer('tools', ADDED.tools.slice(0, 2), ['Ġprefab']);
  writeFileSync(at('text.txt'), readFileSync(fixture('text/python.train.txt'), 'utf8').slice(0, 4000));
}, 60_000);

const merge = (output: string, ...args: string[]) =>
  runCli(['merge', 'chat', 'tools', '-o', output, '--overwrite', ...args], { cwd });
/** The row of a token in a model's table; undefined: it has none. */
function row(model: 'base' | 'chat' | 'tools', tensor: string, token: string, id: number): Float32Array | undefined {
  const { values, shape } = weights[model].get(tensor)!;
  const place = id < 2048 ? id : model === 'base' ? -1 : ADDED[model].indexOf(token);
  const at = id < 2048 ? id : 2048 + place;
  return place < 0 ? undefined : values.subarray(at * shape[1], (at + 1) * shape[1]);
}

describe('--tokenizer union', () => {
  const UNION = [' prefab', '<|start|>', '<|end|>', '<tool>'];

  it('has the tokens of all, with the rows of who has them, merged by the method', async () => {
    const { code, stderr } = await merge('union', '--base', 'base', '--method', 'task-arithmetic', '--tokenizer', 'union');
    expect(code).toBe(0);
    expect(stderr).toMatch(/4 tokens that the base lacks: "Ġprefab", "<\|start\|>", "<\|end\|>", "<tool>"/);
    expect(stderr).toMatch(/chat lacks 2 tokens, whose rows are from tools/);
    const merged = await readWeights(at('union'));
    for (const tensor of [EMBEDDING, HEAD]) {
      const { shape, values } = merged.get(tensor)!;
      expect(shape).toEqual([2052, 32]);
      for (const id of [0, 700, 2047, 2048, 2049, 2050, 2051]) {
        const token = UNION[id - 2048] ?? '';
        const owners = (['base', 'chat', 'tools'] as const).filter((model) => row(model, tensor, token, id));
        // Who lacks it has the row of its only owner, or of the base, or the mean of its owners.
        const from = owners[0] === 'base' ? ['base' as const] : owners;
        const filled = Array.from({ length: 32 }, (_, j) =>
          from.reduce((sum, model) => sum + row(model, tensor, token, id)![j] / from.length, 0),
        );
        const rowOf = (model: 'base' | 'chat' | 'tools') => row(model, tensor, token, id) ?? filled;
        for (let j = 0; j < 32; j++) {
          const expected = rowOf('base')[j] + (rowOf('chat')[j] - rowOf('base')[j]) + (rowOf('tools')[j] - rowOf('base')[j]);
          expect(Math.abs(values[id * 32 + j] - expected)).toBeLessThan(1e-5);
        }
      }
    }
    expect(JSON.parse(readFileSync(at('union', 'config.json'), 'utf8'))).toMatchObject({ vocab_size: 2052 });
    const manifest = JSON.parse(readFileSync(at('union', 'pcomp.json'), 'utf8')) as { vocabulary: object };
    expect(manifest.vocabulary).toMatchObject({
      source: 'union',
      rows: 2052,
      appended: [{ token: 'Ġprefab', from: 'tools' }, { token: '<|start|>', from: 'chat' }, { from: 'chat' }, { from: 'tools' }],
      conflicts: [],
    });
  });

  it('has a tokenizer that knows them, and text without them is cut as before', async () => {
    const [before, after] = [await loadTokenizer(at('base'), 2048), await loadTokenizer(at('union'), 2052)];
    const text = 'def hello(x): return x';
    expect([...after.encode(text)]).toEqual([...before.encode(text)]);
    expect([...after.encode('<|start|>a<|end|><tool>')].filter((id) => id >= 2048)).toEqual([2049, 2050, 2051]);
    expect([...after.encode('a prefab')]).toContain(2048);
    const measured = await evaluate(at('union'), {
      text: [at('text.txt')],
      sequenceLength: 32,
      accuracy: 'exact',
      device: 'cpu',
      threads: 1,
      maxMemory: 2 ** 30,
    });
    expect(Number.isFinite(measured.nll)).toBe(true);
  });

  it('fills up to a multiple with the mean of the rows that have a token, and keeps the padding of the base', async () => {
    expect(
      await runCli(
        [
          'merge',
          'tools',
          '--base',
          'chat',
          '--method',
          'linear',
          '--tokenizer',
          'union',
          '--pad-vocab',
          '64',
          '-o',
          'padded',
          '--quiet',
        ],
        { cwd },
      ),
    ).toMatchObject({ code: 0 });
    const { shape, values } = (await readWeights(at('padded'))).get(EMBEDDING)!;
    // chat: 2050 tokens in 2056 rows; tools adds two: 2058, in rows of 64.
    expect(shape).toEqual([2112, 32]);
    const padding = weights.chat.get(EMBEDDING)!.values.subarray(2053 * 32, 2054 * 32);
    for (let j = 0; j < 32; j++) expect(Math.abs(values[2053 * 32 + j] - padding[j])).toBeLessThan(1e-6);
    const tools = weights.tools.get(EMBEDDING)!.values;
    const mean = Array.from({ length: 32 }, (_, j) => {
      let sum = 0;
      for (let i = 0; i < 2051; i++) sum += tools[i * 32 + j] / 2051;
      return sum;
    });
    for (let j = 0; j < 32; j++) expect(Math.abs(values[2111 * 32 + j] - mean[j])).toBeLessThan(1e-4);
  });

  it('leaves no temporary file, and is what mergekit’s file asks for', async () => {
    const temporary = () => readdirSync(tmpdir()).filter((name) => name.startsWith('pcomp-vocabulary-'));
    const before = temporary();
    writeFileSync(
      at('union.yml'),
      'merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: chat}, {model: tools}]\ntokenizer: {source: union}\n',
    );
    expect(await runCli(['merge', '--config', 'union.yml', '-o', 'by-file', '--quiet'], { cwd })).toMatchObject({ code: 0 });
    const [one, two] = [await readWeights(at('union')), await readWeights(at('by-file'))];
    for (const [name, { values }] of one) expect(two.get(name)!.values).toEqual(values);
    expect(temporary()).toEqual(before);
  });
});

describe("mergekit's rules for single tokens", () => {
  const save = (name: string, rules: string, source = 'union') =>
    writeFileSync(
      at(name),
      `merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: chat}, {model: tools}]\ntokenizer:\n  source: ${source}\n  tokens:\n${rules}`,
    );

  it('take rows from where they say, for models that have the token too where they are forced', async () => {
    save(
      'rules.yml',
      [
        '    "<|end|>": {source: chat, force: true}',
        '    "<tool>": {source: {kind: zero}}',
        '    "<|new|>": {source: {kind: model_token, model: chat, token_id: 700}}',
        '    "<|start|>": {source: {kind: model_token, model: tools, token: "<tool>"}}',
        '',
      ].join('\n'),
    );
    const { code, stderr } = await runCli(['merge', '--config', 'rules.yml', '-o', 'by-rules'], { cwd });
    expect(code).toBe(0);
    expect(stderr).toMatch(/base lacks 5 tokens, whose rows are from tools, chat, zeros/);
    expect(stderr).toMatch(/tools has 1 tokens of its own, whose rows are from chat: "<\|end\|>"/);
    const merged = await readWeights(at('by-rules'));
    for (const tensor of [EMBEDDING, HEAD]) {
      const { shape, values } = merged.get(tensor)!;
      expect(shape).toEqual([2053, 32]);
      const own = (model: 'base' | 'chat' | 'tools', id: number) =>
        weights[model].get(tensor)!.values.subarray(id * 32, id * 32 + 32);
      const zeros = new Float32Array(32);
      const tool = own('tools', 2049);
      // Base, chat and tools at every new id: " prefab" as ever, start, end, tool, new.
      const expected = [
        [own('tools', 2050), own('tools', 2050), own('tools', 2050)],
        [tool, own('chat', 2048), tool],
        [own('chat', 2049), own('chat', 2049), own('chat', 2049)],
        [zeros, zeros, tool],
        [own('chat', 700), own('chat', 700), own('chat', 700)],
      ];
      for (const [i, [base, chat, tools]] of expected.entries()) {
        for (let j = 0; j < 32; j++)
          expect(Math.abs(values[(2048 + i) * 32 + j] - (chat[j] + tools[j] - base[j]))).toBeLessThan(1e-5);
      }
    }
    const tokenizer = await loadTokenizer(at('by-rules'), 2053);
    expect([...tokenizer.encode('<|new|>')]).toContain(2052);
    const { vocabulary } = JSON.parse(readFileSync(at('by-rules', 'pcomp.json'), 'utf8')) as { vocabulary: object };
    expect(vocabulary).toMatchObject({
      appended: expect.arrayContaining([{ token: '<|new|>', id: 2052, from: 'tokenizer.tokens' }]) as unknown,
      forced: { tools: [{ token: '<|end|>', from: ['chat'] }] },
    });
  });

  it('give a vocabulary without union its new tokens', async () => {
    save('one.yml', '    "<|new|>": {source: {kind: zero}}\n', 'tools');
    expect(await runCli(['merge', '--config', 'one.yml', '-o', 'by-one', '--quiet'], { cwd })).toMatchObject({ code: 0 });
    const { shape, values } = (await readWeights(at('by-one'))).get(EMBEDDING)!;
    expect(shape).toEqual([2052, 32]);
    expect(values.subarray(2051 * 32)).toEqual(new Float32Array(32));
    expect([...(await loadTokenizer(at('by-one'), 2052)).encode('<|new|>')]).toContain(2051);
  });

  it('are of tokens that only one model has, in the vocabulary of the base', async () => {
    save('only.yml', '    "<|start|>": {source: chat}\n', 'base');
    const { code, stderr } = await runCli(['merge', '--config', 'only.yml', '-o', 'by-only'], { cwd });
    expect(code).toBe(0);
    expect(stderr).toMatch(/3 tokens of tools are left out/);
    const { shape, values } = (await readWeights(at('by-only'))).get(EMBEDDING)!;
    expect(shape).toEqual([2049, 32]);
    // All three have the row of chat: base + (chat - base) + (tools - base) is it again.
    const start = weights.chat.get(EMBEDDING)!.values.subarray(2048 * 32, 2049 * 32);
    for (let j = 0; j < 32; j++) expect(Math.abs(values[2048 * 32 + j] - start[j])).toBeLessThan(1e-5);
  });

  it('name models by path before label', async () => {
    cpSync(at('chat'), at('other', 'chat'), { recursive: true });
    writeFileSync(
      at('paths.yml'),
      'merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: other/chat}, {model: chat}]\ntokenizer: {tokens: {"<|start|>": {source: chat}}}\n',
    );
    const { code, stderr } = await runCli(['merge', '--config', 'paths.yml', '--dry-run'], { cwd });
    expect(code).toBe(0);
    // The one that is called chat is other/chat.
    expect(stderr).toMatch(/base lacks 2 tokens, whose rows are from chat-2, chat:/);
  });

  it.each([
    ['1.50: {source: nobody}', /tokenizer\.tokens\.1\.50: nobody is not one of the models/],
    ['"": {source: chat}', /tokenizer\.tokens: a token has no name/],
    ['" prefab": {source: {kind: zero}}', /two tokens that are added spell " prefab"/],
    ['"x": {source: nobody}', /tokenizer\.tokens\.x: nobody is not one of the models \(base, chat, tools\)/],
    ['"<tool>": {source: chat}', /tokenizer\.tokens\.<tool>: chat has no token "<tool>"/],
    [
      'x: {source: {kind: model_token, model: tools, token_id: 2051}}',
      /tokens\.x: token_id 2051: the embedding of tools has 2051 rows/,
    ],
    ['x: {source: {kind: model_token, model: tools}}', /tokens\.x\.source: exactly one of token and token_id is expected/],
    ['x: {source: {kind: random}}', /tokens\.x\.source\.kind "random": zero or model_token is expected/],
    ['x: {force: 1}', /tokens\.x\.force 1: true or false is expected/],
    ['x: {from: base}', /tokens\.x: from: pcomp follows source, force here, and nothing else/],
  ])('%s is refused', async (rule, message) => {
    save('bad.yml', `    ${rule}\n`);
    const { code, stderr } = await runCli(['merge', '--config', 'bad.yml', '-o', 'bad'], { cwd });
    expect(code).toBe(2);
    expect(stderr).toMatch(message);
  });
});

it('--tokenizer of an expert has that expert’s tokens, and says what is left out', async () => {
  const { code, stderr } = await merge('as-tools', '--base', 'base', '--method', 'linear', '--tokenizer', 'tools');
  expect(code).toBe(0);
  expect(stderr).toMatch(/1 tokens of chat are left out: "<\|start\|>"/);
  expect((await readWeights(at('as-tools'))).get(EMBEDDING)!.shape).toEqual([2051, 32]);
  expect(readFileSync(at('as-tools', 'tokenizer.json')).equals(readFileSync(at('tools', 'tokenizer.json')))).toBe(true);
});

it('without it, vocabularies must agree: the message says what brings them together', async () => {
  const { code, stderr } = await merge('no', '--base', 'base', '--method', 'linear');
  expect(code).toBe(2);
  expect(stderr).toMatch(/2048 is "<\|start\|>", the base's nothing.*--tokenizer union/);
  expect((await merge('no', '--base', 'base', '--method', 'linear', '--tokenizer', 'nobody')).stderr).toMatch(
    /--tokenizer nobody: is neither union nor one of the models \(base, chat, tools\)/,
  );
});
