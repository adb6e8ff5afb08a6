/** `adapt convert`, `evaluate --adapter` and `inspect` of adapters: one update, whatever form it is stored in. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { convertAdapter, inspectAdapter } from '../../src/runs/adapt/convert.ts';
import { evaluate } from '../../src/runs/evaluate/evaluate.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import {
  type NamedTensor,
  product,
  randomTensor,
  readWeights,
  saveAdapter,
  saveFolder,
  type Weights,
  weightsOf,
} from '../support/merge-models.ts';
import { runCli } from '../support/run-cli.ts';
import { runEvaluate, runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

const scratch = scratchFolder();
const llama = tinyLlama('convert');
const Q = 'model.layers.0.self_attn.q_proj';
const UP = 'model.layers.1.mlp.up_proj';
const [OUT, IN] = llama.source.tensors.get(`${Q}.weight`)!.shape;
const OPTIONS = { overwrite: false, threads: 1 };
const wrap = (entries: Readonly<Record<string, NamedTensor>>): Weights =>
  new Map(Object.entries(entries).map(([name, tensor]) => [`base_model.model.${name}`, tensor]));
const tensor = (shape: readonly number[], values: readonly number[]): NamedTensor => ({
  shape,
  values: Float32Array.from(values),
});

async function saved(
  adapter: Weights,
  config: object = {},
  model: TinyModel = llama,
): Promise<{ base: string; adapter: string; folder: string }> {
  const folder = scratch.folder();
  const base = await saveFolder(join(folder, 'base'), weightsOf(model), model.config);
  return { folder, base, adapter: await saveAdapter(join(folder, 'adapter'), adapter, { ...config }) };
}

/** `loraB loraA` of a folder, by module: what a reader without any scale computes. */
async function updates(folder: string): Promise<Map<string, Float64Array>> {
  const weights = await readWeights(join(folder, 'adapter_model.safetensors'));
  const modules = [...weights.keys()]
    .filter((name) => name.endsWith('.lora_A.weight'))
    .map((name) => name.slice(0, -'.lora_A.weight'.length));
  return new Map(
    modules.map((name) => [
      name.replace('base_model.model.', ''),
      product(weights.get(`${name}.lora_A.weight`)!, weights.get(`${name}.lora_B.weight`)!, 1),
    ]),
  );
}

function expectClose(found: ArrayLike<number> | undefined, expected: ArrayLike<number>): void {
  const norm = Math.sqrt(Array.from(expected).reduce((sum, value) => sum + value ** 2, 0));
  const off = Math.sqrt(Array.from(expected).reduce((sum, value, i) => sum + (value - found![i]) ** 2, 0));
  expect(found).toHaveLength(expected.length);
  expect(norm).toBeGreaterThan(0);
  expect(off / norm).toBeLessThan(1e-6);
}

const plain = { a: randomTensor([2, IN], 1), b: randomTensor([OUT, 2], 2) };
const wide = { a: randomTensor([3, IN], 3), b: randomTensor([OUT, 3], 4) };

/** `factor B C A` by the definition. */
function withCore(a: NamedTensor, b: NamedTensor, core: readonly (readonly number[])[], factor: number): Float64Array {
  const rank = core.length;
  const cored = new Float32Array(a.values.length);
  for (let k = 0; k < rank; k++) {
    for (let j = 0; j < IN; j++) cored[k * IN + j] = core[k].reduce((sum, value, l) => sum + value * a.values[l * IN + j], 0);
  }
  return product({ shape: a.shape, values: cored }, b, factor);
}

const rowsOf = ({ values }: NamedTensor, from: number, to: number) =>
  tensor([to - from, IN], [...values.subarray(from * IN, to * IN)]);
const columnsOf = ({ shape, values }: NamedTensor, from: number, to: number) =>
  tensor(
    [shape[0], to - from],
    [...values].filter((_, i) => i % shape[1] >= from && i % shape[1] < to),
  );

/** Each kind: its tensors, its configuration, and the update it means. */
const KINDS: readonly [string, Weights, object, Float64Array][] = [
  [
    'lora',
    wrap({ [`${Q}.lora_A.weight`]: plain.a, [`${Q}.lora_B.weight`]: plain.b }),
    { lora_alpha: 4, r: 2 },
    product(plain.a, plain.b, 2),
  ],
  [
    'lora with rank-stabilized scale and patterns',
    wrap({ [`${Q}.lora_A.weight`]: wide.a, [`${Q}.lora_B.weight`]: wide.b }),
    { lora_alpha: 4, r: 8, rank_pattern: { q_proj: 3 }, alpha_pattern: { q_proj: 5 }, use_rslora: true },
    product(wide.a, wide.b, 5 / Math.sqrt(3)),
  ],
  [
    'adalora',
    wrap({ [`${Q}.lora_A`]: plain.a, [`${Q}.lora_B`]: plain.b, [`${Q}.lora_E`]: tensor([2, 1], [0.5, -2]) }),
    { peft_type: 'ADALORA', init_r: 12, lora_alpha: 32 },
    withCore(
      plain.a,
      plain.b,
      [
        [0.5, 0],
        [0, -2],
      ],
      32 / (12 + 1e-5),
    ),
  ],
  [
    'increlora',
    wrap({
      [`${Q}.lora_A.0`]: rowsOf(wide.a, 0, 1),
      [`${Q}.lora_A.1`]: rowsOf(wide.a, 1, 2),
      [`${Q}.lora_A.2`]: rowsOf(wide.a, 2, 3),
      [`${Q}.lora_B.0`]: columnsOf(wide.b, 0, 1),
      [`${Q}.lora_B.1`]: columnsOf(wide.b, 1, 2),
      [`${Q}.lora_B.2`]: columnsOf(wide.b, 2, 3),
      [`${Q}.lora_E.0`]: tensor([1, 1], [0.75]),
      [`${Q}.lora_E.1`]: tensor([1, 1], [1e-5]),
      [`${Q}.lora_E.2`]: tensor([1, 1], [-1.5]),
    }),
    { lora_alpha: 16 },
    withCore(
      wide.a,
      wide.b,
      [
        [0.75, 0, 0],
        [0, 0, 0],
        [0, 0, -1.5],
      ],
      16 / (2 + 1e-5),
    ),
  ],
  [
    // adapters.md, vector 12.
    'triadaptlora',
    wrap({
      [`${Q}.lora_A.0`]: rowsOf(plain.a, 0, 1),
      [`${Q}.lora_A.1`]: rowsOf(plain.a, 1, 2),
      [`${Q}.lora_B.0`]: columnsOf(plain.b, 0, 1),
      [`${Q}.lora_B.1`]: columnsOf(plain.b, 1, 2),
      [`${Q}.lora_C_row.0`]: tensor([1, 1], [1]),
      [`${Q}.lora_C_row.1`]: tensor([1, 2], [2, 3]),
      [`${Q}.lora_C_col.0`]: tensor([1, 1], [4]),
      [`${Q}.lora_C_col.1`]: tensor([2, 1], [5, 6]),
    }),
    { lora_alpha: 8 },
    withCore(
      plain.a,
      plain.b,
      [
        [5, 5],
        [2, 9],
      ],
      8 / (2 + 1e-5),
    ),
  ],
  [
    'lamda',
    wrap({
      [`${Q}.lora_A.default.weight`]: plain.a,
      [`${Q}.lora_B.default.weight`]: plain.b,
      [`${Q}.sigma.default.weight`]: tensor([2, 2], [1, -0.5, 0.25, 2]),
    }),
    { lora_alpha: 4 },
    withCore(
      plain.a,
      plain.b,
      [
        [1, -0.5],
        [0.25, 2],
      ],
      4 / 2,
    ),
  ],
];

describe.each(KINDS)('a %s', (_, tensors, config, expected) => {
  it('is the same update as plain factors, padded ones, and inside the base', async () => {
    const { folder, base, adapter } = await saved(tensors, config);
    await convertAdapter(adapter, join(folder, 'peft'), { to: 'peft', base, ...OPTIONS });
    expectClose((await updates(join(folder, 'peft'))).get(Q), expected);
    await convertAdapter(join(folder, 'peft'), join(folder, 'padded'), { to: 'peft-padded', ...OPTIONS });
    expectClose((await updates(join(folder, 'padded'))).get(Q), expected);
    await convertAdapter(adapter, join(folder, 'merged'), { to: 'merged', base, ...OPTIONS });
    const [merged, before] = [await readWeights(join(folder, 'merged')), weightsOf(llama)];
    for (const [name, { values }] of merged) {
      const own = before.get(name)!.values;
      const wanted = own.map((value, i) => value + (name === `${Q}.weight` ? expected[i] : 0));
      const off = values.reduce((most, value, i) => Math.max(most, Math.abs(value - wanted[i])), 0);
      expect(off, name).toBeLessThan(1e-5);
    }
  });
});

describe('adapt convert', () => {
  it('folds in what plain factors cannot say: a trained bias, a norm that is stored whole, an embedding', async () => {
    const gpt2 = tinyGpt2('convert');
    const before = weightsOf(gpt2);
    const [bias, norm, table] = ['h.0.attn.c_attn.bias', 'h.0.ln_1.weight', 'wte.weight'];
    const [vocabulary, width] = before.get(table)!.shape;
    const [a, b] = [randomTensor([2, vocabulary], 11), randomTensor([width, 2], 12)];
    const kept = { [bias]: randomTensor(before.get(bias)!.shape, 13), [norm]: randomTensor(before.get(norm)!.shape, 14) };
    const tensors = wrap({ ...kept, 'wte.lora_embedding_A': a, 'wte.lora_embedding_B': b });
    const { folder, base, adapter } = await saved(tensors, { lora_alpha: 6, r: 2, bias: 'lora_only' }, gpt2);
    await convertAdapter(adapter, join(folder, 'merged'), { to: 'merged', base, ...OPTIONS });
    const update = product(a, b, 3);
    for (const [name, { values }] of await readWeights(join(folder, 'merged'))) {
      const own = kept[name]?.values ?? before.get(name)!.values;
      const off = values.reduce((most, value, i) => {
        const added = name === table ? update[(i % width) * vocabulary + Math.floor(i / width)] : 0;
        return Math.max(most, Math.abs(value - own[i] - added));
      }, 0);
      expect(off, name).toBeLessThan(1e-5);
    }
    await expect(convertAdapter(adapter, join(folder, 'no'), { to: 'peft', base, ...OPTIONS })).rejects.toThrow(
      /which plain factors cannot say; --to merged/,
    );
    // A run that is stopped leaves nothing to go on with: there is no way to.
    const stop = new AbortController();
    const hooks = { signal: stop.signal, progress: ({ phase }: { phase: string }) => phase.startsWith('merge') && stop.abort() };
    const again = () => convertAdapter(adapter, join(folder, 'again'), { to: 'merged', base, ...OPTIONS }, hooks);
    await expect(again()).rejects.toThrow();
    expect(existsSync(join(folder, 'again')) || existsSync(join(folder, 'again.partial'))).toBe(false);
  });

  const two = wrap({
    [`${Q}.lora_A.weight`]: plain.a,
    [`${Q}.lora_B.weight`]: plain.b,
    [`${UP}.lora_A.weight`]: randomTensor([3, IN], 5),
    [`${UP}.lora_B.weight`]: randomTensor([llama.source.tensors.get(`${UP}.weight`)!.shape[0], 3], 6),
  });
  const patterns = { r: 2, lora_alpha: 2, rank_pattern: { up_proj: 3 }, alpha_pattern: { up_proj: 3 } };

  it('writes ranks that match whole names only, or one rank for all', async () => {
    const { folder, adapter } = await saved(two, patterns);
    await convertAdapter(adapter, join(folder, 'peft'), { to: 'peft', ...OPTIONS });
    const config = JSON.parse(readFileSync(join(folder, 'peft', 'adapter_config.json'), 'utf8'));
    expect(config.rank_pattern).toEqual({
      '^model\\.layers\\.0\\.self_attn\\.q_proj': 2,
      '^model\\.layers\\.1\\.mlp\\.up_proj': 3,
    });
    expect(config.alpha_pattern).toEqual(config.rank_pattern);
    const { adapter: outline } = await convertAdapter(adapter, join(folder, 'padded'), { to: 'peft-padded', ...OPTIONS });
    expect(outline!.modules.map(({ rank }) => rank)).toEqual([3, 3]);
    expect(await inspectAdapter(adapter)).toMatchObject({
      layout: 'lora',
      modules: [
        { name: Q, rank: 2 },
        { name: UP, rank: 3 },
      ],
    });
  });

  it('gives what evaluate --adapter measures, on a float base and a quantized one', async () => {
    const text = scratch.write('text.txt', tinyText(1500));
    const folder = scratch.folder();
    const base = await saveCheckpoint(join(folder, 'base'), groupedLlama('convert', { num_hidden_layers: 2 }));
    const weights = await readWeights(base);
    const [rows, columns] = weights.get(`${Q}.weight`)!.shape;
    const factors = { a: randomTensor([2, columns], 7), b: randomTensor([rows, 2], 8) };
    const adapter = await saveAdapter(
      join(folder, 'adapter'),
      wrap({ [`${Q}.lora_A.weight`]: factors.a, [`${Q}.lora_B.weight`]: factors.b }),
    );
    const options = {
      text: [text],
      sequenceLength: 32,
      accuracy: 'exact',
      device: 'cpu',
      threads: 1,
      maxMemory: 2 ** 30,
    } as const;
    await convertAdapter(adapter, join(folder, 'merged'), { to: 'merged', base, ...OPTIONS });
    const [alone, applied, merged] = [
      await runEvaluate(base, text),
      await evaluate(base, { ...options, adapter }),
      await runEvaluate(join(folder, 'merged'), text),
    ];
    expect(Math.abs(applied.nll - alone.nll)).toBeGreaterThan(1e-3);
    expect(Math.abs(applied.nll - merged.nll)).toBeLessThan(1e-5);
    await runQuantize(base, join(folder, 'q8'), { bits: 8, method: 'rtn', preset: 'paper', formats: ['safetensors'] });
    const quantized = await evaluate(join(folder, 'q8'), { ...options, adapter });
    expect(Math.abs(quantized.nll - applied.nll)).toBeLessThan(Math.abs(applied.nll - alone.nll) / 5);
    await expect(
      convertAdapter(adapter, join(folder, 'no'), { to: 'merged', base: join(folder, 'q8'), ...OPTIONS }),
    ).rejects.toThrow(/is quantized \(layout planes\), and an adapter folded into it would be rounded away/);
    expect(existsSync(join(folder, 'no'))).toBe(false);
    // A layer that is saved whole takes the place of the base's.
    const whole = await saveAdapter(join(folder, 'whole'), wrap({ [`${Q}.weight`]: randomTensor([rows, columns], 15) }));
    await convertAdapter(whole, join(folder, 'replaced'), { to: 'merged', base, ...OPTIONS });
    const [replaced, read] = [
      await runEvaluate(join(folder, 'replaced'), text),
      await evaluate(base, { ...options, adapter: whole }),
    ];
    expect(Math.abs(replaced.nll - alone.nll)).toBeGreaterThan(1e-3);
    expect(Math.abs(replaced.nll - read.nll)).toBeLessThan(1e-5);
  });

  it('keeps the layout of layers that are stored (in, out)', async () => {
    const gpt2 = tinyGpt2('convert');
    const name = 'h.0.attn.c_attn';
    const [inFeatures, outFeatures] = gpt2.source.tensors.get(`${name}.weight`)!.shape;
    const [a, b] = [randomTensor([2, inFeatures], 9), randomTensor([outFeatures, 2], 10)];
    const tensors = wrap({ [`${name}.lora_A.weight`]: a, [`${name}.lora_B.weight`]: b });
    const { folder, base, adapter } = await saved(tensors, { fan_in_fan_out: true }, gpt2);
    await convertAdapter(adapter, join(folder, 'peft'), { to: 'peft', base, ...OPTIONS });
    expect(JSON.parse(readFileSync(join(folder, 'peft', 'adapter_config.json'), 'utf8')).fan_in_fan_out).toBe(true);
    expectClose((await updates(join(folder, 'peft'))).get(name), product(a, b, 2));
  });

  it.each<[string, Weights, object, RegExp]>([
    [
      'one of another shape',
      wrap({ [`${Q}.lora_A.weight`]: randomTensor([2, IN + 8], 1), [`${Q}.lora_B.weight`]: plain.b }),
      {},
      /module ".*q_proj" changes a tensor of \[\d+, \d+\], but the base's/,
    ],
    [
      'a core that does not fit',
      wrap({
        [`${Q}.lora_A.weight`]: plain.a,
        [`${Q}.lora_B.weight`]: plain.b,
        [`${Q}.sigma.default.weight`]: tensor([1, 1], [1]),
      }),
      {},
      /sigma.default.weight" is \[1, 1\], but the rank is 2/,
    ],
    [
      'lists with patterns of scales',
      wrap({ [`${Q}.lora_A.0`]: plain.a, [`${Q}.lora_B.0`]: plain.b, [`${Q}.lora_E.0`]: tensor([2, 1], [1, 1]) }),
      { lora_alpha: 4, alpha_pattern: { q_proj: 2 } },
      /has alpha_pattern .*, which pcomp reads with plain LoRA factors only/,
    ],
    [
      'an unknown tensor',
      wrap({ [`${Q}.lora_A.0`]: plain.a, [`${Q}.lora_B.0`]: plain.b, [`${Q}.lora_X`]: plain.b }),
      {},
      /lora_X" is no part of an adapter that pcomp knows/,
    ],
  ])('refuses %s by name, and writes nothing', async (_, tensors, config, message) => {
    const { folder, base, adapter } = await saved(tensors, config);
    await expect(convertAdapter(adapter, join(folder, 'out'), { to: 'peft', base, ...OPTIONS })).rejects.toThrow(message);
    expect(existsSync(join(folder, 'out')) || existsSync(join(folder, 'out.partial'))).toBe(false);
  });

  it('on the command line: a form is needed, and a model is no adapter', async () => {
    const { base, adapter, folder } = await saved(two, patterns);
    const unsaid = await runCli(['adapt', 'convert', adapter, '-o', join(folder, 'x')]);
    expect([unsaid.code, unsaid.stderr]).toEqual([
      2,
      expect.stringMatching(/^pcomp: required option '--to <form>' not specified/),
    ]);
    const model = await runCli(['adapt', 'convert', base, '--to', 'peft', '-o', join(folder, 'x')]);
    expect([model.code, model.stderr]).toEqual([2, expect.stringMatching(/holds no adapter_config.json, so it is no adapter/)]);
    const more = await runCli(['adapt', 'convert', adapter, '--to', 'peft', '-o', join(folder, 'x'), '--max-error', '-1']);
    expect([more.code, more.stderr]).toEqual([2, expect.stringMatching(/--max-error -1: a part above 0 % and at most 100 %/)]);
    const made = await runCli(['adapt', 'convert', adapter, '--to', 'peft', '-o', join(folder, 'made')]);
    expect([made.code, made.stdout]).toEqual([0, expect.stringMatching(/adapter +lora, 2 layers, rank 2 to 3/)]);
    expect((await runCli(['inspect', join(folder, 'made')])).stdout).toMatch(/mlp\.up_proj .* 3 /);
    const unnamed = await runCli(['adapt', base, '-o', join(folder, 'y')]);
    expect([unnamed.code, unnamed.stderr]).toEqual([
      2,
      expect.stringMatching(/^pcomp: --budget: what the adapter may cost is needed/),
    ]);
  });
});
