import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { byteLengthOf, toFloat32 } from '../../formats/dtype.ts';
import { openOnnx } from '../../formats/onnx/reader.ts';
import { createShardedSink } from '../../formats/safetensors/sharded-writer.ts';
import { gptqStoredBits, onnxStorage, planesStoredBits } from '../../src/artifacts/accounting.ts';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import { layOutLinear, type OnnxStorageOptions } from '../../src/artifacts/onnx/linear-layout.ts';
import { embeddingGroupSize } from '../../src/artifacts/onnx/lowering.ts';
import { shapeOfGrid } from '../../src/artifacts/planes.ts';
import { type ArtifactFormat, writeArtifact } from '../../src/artifacts/write-artifact.ts';
import { EnvironmentError, FormatError, RecipeError, UnsupportedError } from '../../src/errors.ts';
import { dequantize, type QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import type { LinearSite, Model } from '../../src/model/model.ts';
import { i64, openGraph } from '../support/run-graph.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../support/tiny-models.ts';
import { randomLinear } from './random-linear.ts';

let root: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'pcomp-artifact-'));
});
afterEach(() => rmSync(root, { recursive: true }));

/** Saves a tiny model as Hugging Face does. */
async function save(tiny: TinyModel): Promise<string> {
  const folder = join(root, 'model');
  mkdirSync(folder);
  const tensors = [...tiny.source.tensors.values()];
  await using sink = await createShardedSink(
    folder,
    tensors.map(({ name, dtype, shape }) => ({ name, dtype, shape })),
    { maxShardBytes: 1e9 },
  );
  for (const { name, data } of tensors) await sink.write(name, data);
  await sink.finalize();
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...tiny.config, bos_token_id: 1, eos_token_id: 2 }));
  writeFileSync(join(folder, 'tokenizer.json'), '{"model":{}}');
  writeFileSync(join(folder, 'README.md'), 'not copied');
  return folder;
}

/**
 * Random codes for every site, widths cycling through `bits`.
 * @param hadamard sorts every input, each in its own order, and rotates it by blocks of so many columns; every third layer then has a branch too
 */
function solutionOf(
  model: Model,
  bits: readonly number[],
  groupSize: number,
  keep: (name: string) => boolean = () => true,
  hadamard?: number,
): Map<string, QuantizedLinear> {
  const sites = model.blocks.flatMap((block) => block.sites).filter((site) => keep(site.name));
  const inputs = [...new Set(sites.map((site) => site.input))];
  return new Map(
    sites.map((site, i) => {
      const options = { rows: site.outFeatures, columns: site.inFeatures, groupSize, bits, seed: i + 1, bias: site.hasBias };
      const transform =
        hadamard === undefined ? {} : { transform: { hadamard, seed: inputs.indexOf(site.input) }, lowRank: i % 3 === 1 ? 2 : 0 };
      return [site.name, randomLinear({ ...options, ...transform })];
    }),
  );
}

function sourceOf(linears: ReadonlyMap<string, QuantizedLinear>) {
  return {
    has: (name: string) => linears.has(name),
    readGrid: async (name: string) => linears.get(name)!,
    read: async (name: string) => linears.get(name)!,
  };
}

const WIDE = { hidden_size: 64, intermediate_size: 96, num_attention_heads: 4, num_key_value_heads: 2 };
const BIASES = { biases: ['q_proj', 'k_proj', 'v_proj', 'o_proj'], dtype: 'BF16' } as const;
const llama = () => tinyLlama('artifact', { ...WIDE, attention_bias: true }, BIASES);

interface Written {
  readonly out: string;
  readonly linears: ReadonlyMap<string, QuantizedLinear>;
  readonly artifact: Awaited<ReturnType<typeof writeArtifact>>;
}

async function write(
  tiny: TinyModel,
  formats: readonly ArtifactFormat[],
  bits: readonly number[],
  extra: (model: Model) => Iterable<readonly [string, QuantizedLinear]> = () => [],
  {
    maxShardBytes,
    hadamard,
    onnxStorage,
  }: { readonly maxShardBytes?: number; readonly hadamard?: number; readonly onnxStorage?: OnnxStorageOptions } = {},
): Promise<Written> {
  const folder = await save(tiny);
  const out = join(root, 'out');
  mkdirSync(out);
  await using source = await openModelSource(folder);
  const linears = new Map([...solutionOf(source.model, bits, 32, undefined, hadamard), ...extra(source.model)]);
  const artifact = await writeArtifact({
    source,
    quantized: sourceOf(linears),
    folder: out,
    formats,
    version: '0.0.0',
    ...(maxShardBytes ? { maxShardBytes } : {}),
    ...(onnxStorage && { onnxStorage }),
  });
  writeFileSync(join(out, 'pcomp.json'), '{}');
  return { out, linears, artifact };
}

const json = (...path: string[]) => JSON.parse(readFileSync(join(...path), 'utf8'));

/** Greatest difference of two lists, over the greatest value. */
function difference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let most = 0;
  let norm = 0;
  for (let i = 0; i < a.length; i++) {
    most = Math.max(most, Math.abs(a[i] - b[i]));
    norm = Math.max(norm, Math.abs(b[i]));
  }
  return most / norm;
}

describe.each([
  ['onnx', [1, 2, 3, 4, 8], {}],
  ['onnx', [1, 2, 3, 4, 8], { onnxStorage: { compact: false } }],
  ['onnx', [2, 1, 4, 3], { onnxStorage: { container: '2' } }],
  ['onnx', [2, 1, 4, 3, 8], { onnxStorage: { container: '4' } }],
  ['onnx', [4, 3, 2, 1], { hadamard: 0 }],
  ['onnx', [4, 3, 2, 1], { hadamard: 32 }],
  ['safetensors', [1, 2, 3, 4, 5, 6, 7, 8], {}],
  ['safetensors', [4, 3, 2, 1], { hadamard: 32 }],
  ['gptq', [3], {}],
] as const)(
  'an artifact of format %s, %s bits, %o',
  (format, bits, options: { hadamard?: number; onnxStorage?: OnnxStorageOptions }) => {
    it('opens again as a model with the solved weights, the plain tensors as they were, and what it cost', async () => {
      const tiny = llama();
      const { out, linears, artifact } = await write(tiny, [format], bits, undefined, options);
      await using source = await openModelSource(out);
      expect(source.kind).toBe(format === 'safetensors' ? 'planes' : format);
      for (const site of source.model.blocks.flatMap((block) => block.sites)) {
        expect(await source.weights.loadSite(site)).toEqual(dequantize(linears.get(site.name)!));
      }
      for (const name of source.model.otherTensors) {
        const { dtype, data } = await source.tensors.read(name);
        const original = tiny.source.tensors.get(name)!;
        expect([name, dtype, toFloat32(dtype, data)]).toEqual([name, original.dtype, toFloat32(original.dtype, original.data)]);
      }
      const corrected = 'model.layers.1.self_attn.q_proj';
      const { dtype, data } = await source.tensors.read(`${corrected}.bias`);
      expect([dtype, toFloat32(dtype, data)]).toEqual(['BF16', linears.get(corrected)!.bias]);
      const [written] = artifact.formats;
      expect(source.storage).toEqual(written.storage);
      expect(source.weightBytes).toBe(written.files.reduce((sum, file) => sum + statSync(join(out, file)).size, 0));
      expect(source.storage.modules.map((module) => module.bits)).toEqual([...linears.values()].map((q) => [...q.bits]));
    });

    it('takes exactly the bits that were predicted', async () => {
      const { out, linears } = await write(llama(), [format], bits, undefined, options);
      await using source = await openModelSource(out);
      const sites = source.model.blocks.flatMap((block) => block.sites);
      // The order of an MLP's second input is folded into the layers before.
      const gridOf = (site: LinearSite): QuantizedLinear => {
        const { transform, ...rest } = linears.get(site.name)!;
        if (!transform) return rest;
        return { ...rest, transform: site.name.endsWith('down_proj') ? { hadamard: transform.hadamard } : transform };
      };
      const predicted = {
        onnx: () => {
          const layouts = sites.map((site) => layOutLinear(gridOf(site), options.onnxStorage));
          const storage = onnxStorage(sites.map((site, i) => [site.name, site.input, layouts[i]]));
          expect(source.storage.modules.map(({ runtimeBits }) => runtimeBits)).toEqual(
            [...storage.values()].map(({ runtimeBits }) => runtimeBits),
          );
          return new Map([...storage].map(([name, { storedBits }]) => [name, storedBits]));
        },
        safetensors: () => {
          const first = (site: LinearSite) => sites.find((other) => other.input === site.input) === site;
          return new Map(
            sites.map((site) => {
              const { transform, ...shape } = gridOf(site);
              return [site.name, planesStoredBits(shapeOfGrid(transform && first(site) ? { ...shape, transform } : shape))];
            }),
          );
        },
        gptq: () => new Map(sites.map((site) => [site.name, gptqStoredBits(shapeOfGrid(linears.get(site.name)!))])),
      }[format]();
      const stored = new Map(source.storage.modules.map((module) => [module.name, module.storedBits]));
      expect(stored).toEqual(predicted);
      const weights = sites.reduce((sum, site) => sum + site.outFeatures * site.inFeatures, 0);
      const codeBits = [...linears.values()].reduce((sum, q) => {
        return sum + q.codes.reduce((inner, _, i) => inner + q.bits[Math.floor((i % q.inFeatures) / q.groupSize)], 0);
      }, 0);
      expect(source.storage.averageBits).toBeCloseTo(codeBits / weights, 12);
      expect(source.storage.bitsPerWeight).toBeCloseTo([...predicted.values()].reduce((a, b) => a + b, 0) / weights, 12);
    });

    it('has the same bytes when it is written again', async () => {
      const bytes = async () => {
        const { out } = await write(llama(), [format], bits, undefined, options);
        const files = readdirSync(out, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
        const contents = files
          .map((file) => [file.name, readFileSync(join(file.parentPath, file.name)).toString('base64')] as const)
          .sort();
        rmSync(out, { recursive: true });
        rmSync(join(root, 'model'), { recursive: true });
        return contents;
      };
      expect(await bytes()).toEqual(await bytes());
    });
  },
);

describe('an ONNX artifact', () => {
  it('holds what transformers.js and onnxruntime-genai look for', async () => {
    const { out, artifact } = await write(llama(), ['onnx'], [2]);
    expect(readdirSync(out).sort()).toEqual([
      'config.json',
      'genai_config.json',
      'generation_config.json',
      'onnx',
      'pcomp.json',
      'tokenizer.json',
    ]);
    expect(readdirSync(join(out, 'onnx')).sort()).toEqual(['model_q2.onnx', 'model_q2.onnx_data']);
    const config = json(out, 'config.json');
    expect(config['transformers.js_config']).toEqual({ use_external_data_format: { 'model_q2.onnx': 1 } });
    expect(config).toMatchObject({ architectures: ['LlamaForCausalLM'], hidden_size: 64 });
    expect(config).not.toHaveProperty('quantization_config');
    expect(json(out, 'generation_config.json')).toEqual({ _from_model_config: true, bos_token_id: 1, eos_token_id: 2 });
    expect(json(out, 'genai_config.json')).toMatchObject({
      model: {
        type: 'llama',
        vocab_size: 41,
        bos_token_id: 1,
        eos_token_id: 2,
        pad_token_id: 2,
        decoder: { filename: 'onnx/model_q2.onnx', head_size: 16, num_key_value_heads: 2 },
      },
      search: { past_present_share_buffer: true },
    });
    expect(artifact.notes).toEqual([]);
  });

  it('is named by its mean width', async () => {
    for (const [bits, suffix] of [
      [[2, 3], '_q2'],
      [[3], '_q4'],
      [[4], '_q4'],
      [[8], '_quantized'],
    ] as const) {
      const { out } = await write(llama(), ['onnx'], bits);
      expect(readdirSync(join(out, 'onnx'))).toContain(`model${suffix}.onnx`);
      rmSync(out, { recursive: true });
      rmSync(join(root, 'model'), { recursive: true });
    }
  });

  it('splits its data where asked, and says into how many files', async () => {
    const { out } = await write(llama(), ['onnx'], [2], undefined, { maxShardBytes: 16_384 });
    const data = readdirSync(join(out, 'onnx')).filter((name) => name.includes('_data'));
    expect(data.length).toBeGreaterThan(1);
    expect(json(out, 'config.json')['transformers.js_config'].use_external_data_format).toEqual({ 'model_q2.onnx': data.length });
  });

  it.each([
    ['a Llama with biases', llama, {}],
    ['a Llama with biases and sorted inputs', llama, { hadamard: 0 }],
    ['a GPT-2, whose weights lie transposed', () => tinyGpt2('artifact gpt2'), {}],
    ['a GPT-2 with rotated inputs', () => tinyGpt2('rotated gpt2'), { hadamard: 32 }],
    [
      'a Llama in which nothing divides',
      () => tinyLlama('ragged', { hidden_size: 40, intermediate_size: 52, num_attention_heads: 5, num_key_value_heads: 5 }),
      {},
    ],
    [
      'a Llama in which nothing divides, its inputs rotated',
      () => tinyLlama('ragged', { hidden_size: 40, intermediate_size: 52, num_attention_heads: 5, num_key_value_heads: 5 }),
      { hadamard: 32 },
    ],
  ])('computes the logits of its decoded weights: %s', async (_, make, options) => {
    const { out } = await write(make(), ['onnx'], [4, 1, 2, 3], undefined, options);
    await using source = await openModelSource(out);
    await using exact = await openOnnx(source.onnxPath!);
    // The same file with float activations: what differs from the decoded weights is rounding.
    for (const [i, node] of exact.model.graph.nodes.entries()) {
      if (node.op !== 'MatMulNBits') continue;
      exact.model.graph.nodes[i] = { ...node, attributes: { ...node.attributes, accuracy_level: { kind: 'int', value: 1 } } };
    }
    const ids = [1, 5, 3, 8, 2];
    const feeds: Record<string, ReturnType<typeof i64>> = {
      input_ids: i64([1, 5], ids),
      attention_mask: i64([1, 5], [1, 1, 1, 1, 1]),
    };
    const run = async (model: Parameters<typeof openGraph>[0]) => {
      const session = await openGraph(model);
      const { headDim, kvHeadCount, blockCount } = source.model.shape;
      const empty = { dtype: 'F32' as const, shape: [1, kvHeadCount, 0, headDim], data: new Float32Array(0) };
      const past = Object.fromEntries(
        Array.from({ length: blockCount }, (__, b) => [
          [`past_key_values.${b}.key`, empty],
          [`past_key_values.${b}.value`, empty],
        ]).flat(),
      );
      const { logits } = await session.run({ ...feeds, ...past });
      await session.release();
      return logits.data as Float32Array;
    };
    const decoded = await run(source.model.decoderGraph(source.tensors));
    expect(difference(await run(exact.model), decoded)).toBeLessThan(1e-4);
  });

  it.each([4, 8])('stores tied embeddings of %i bits once, for lookup and for logits', async (bits) => {
    const tiny = tinyLlama('tied', { ...WIDE, tie_word_embeddings: true });
    const groupSize = embeddingGroupSize(64, 32)!;
    const table = randomLinear({ rows: 41, columns: 64, groupSize, bits: [bits], seed: 77 });
    const { out } = await write(tiny, ['onnx'], [2], () => [['model.embed_tokens', table]]);
    await using source = await openModelSource(out);
    expect(toFloat32('F32', (await source.tensors.read('model.embed_tokens.weight')).data)).toEqual(dequantize(table));
    expect(await source.weights.loadRows('model.embed_tokens.weight', 3, 5)).toEqual(dequantize(table).subarray(3 * 64, 5 * 64));
    expect(source.storage.embeddings.map(({ name }) => name)).toEqual(['model.embed_tokens']);
    expect(source.storage.averageBits).toBe(2);
    await using file = await openOnnx(source.onnxPath!);
    const tables = [...file.model.graph.initializers.keys()].filter((name) => name.includes('embed') || name.includes('lm_head'));
    expect(tables.sort()).toEqual(['qweight', 'qzeros', 'scales'].map((part) => `model.embed_tokens.MatMulNBits.${part}`));
    const session = await openGraph(file.model);
    const empty = { dtype: 'F32' as const, shape: [1, 2, 0, 16], data: new Float32Array(0) };
    const past = Object.fromEntries(
      [0, 1].flatMap((b) => [
        [`past_key_values.${b}.key`, empty],
        [`past_key_values.${b}.value`, empty],
      ]),
    );
    const { logits } = await session.run({ input_ids: i64([1, 2], [3, 4]), attention_mask: i64([1, 2], [1, 1]), ...past });
    await session.release();
    expect([...(logits.data as Float32Array)].every(Number.isFinite)).toBe(true);
  });

  it('of an architecture that onnxruntime-genai does not know says so', async () => {
    const { out, artifact } = await write(tinyGpt2('genai'), ['onnx'], [2]);
    expect(readdirSync(out)).not.toContain('genai_config.json');
    expect(artifact.notes.join()).toMatch(/onnxruntime-genai does not know GPT2LMHeadModel/);
  });

  it('is refused for group sizes that no operand has', async () => {
    const folder = await save(llama());
    await using source = await openModelSource(folder);
    const quantized = sourceOf(solutionOf(source.model, [2], 48));
    mkdirSync(join(root, 'out'));
    await expect(
      writeArtifact({ source, quantized, folder: join(root, 'out'), formats: ['onnx'], version: '0' }),
    ).rejects.toThrow(RecipeError);
  });
});

describe('checkpoint artifacts', () => {
  it('go with an ONNX model into one folder, and decode to the same weights', async () => {
    const { out, linears, artifact } = await write(llama(), ['onnx', 'gptq'], [4]);
    expect(artifact.formats.map((format) => format.layout)).toEqual(['onnx', 'gptq']);
    await using onnx = await openModelSource(out);
    await using gptq = await openModelSource(join(out, 'model.safetensors'));
    expect([onnx.kind, gptq.kind]).toEqual(['onnx', 'gptq']);
    for (const site of onnx.model.blocks.flatMap((block) => block.sites)) {
      expect(await onnx.weights.loadSite(site)).toEqual(await gptq.weights.loadSite(site));
      expect(artifact.weights).toHaveProperty([site.name]);
    }
    expect(linears.size).toBe(Object.keys(artifact.weights).length);
  });

  it('are split into shards that each say what they hold', async () => {
    const { out } = await write(llama(), ['safetensors'], [1, 3, 6], undefined, { maxShardBytes: 12_000, hadamard: 32 });
    const shards = readdirSync(out).filter((name) => name.endsWith('.safetensors'));
    expect(shards.length).toBeGreaterThan(2);
    await using source = await openModelSource(out);
    expect(source.storage.modules.length).toBe(14);
    expect(source.weightBytes).toBeGreaterThan(shards.reduce((sum, name) => sum + statSync(join(out, name)).size, 0));
  });

  it('in planes keep loaders away that do not know the layout', async () => {
    const { out } = await write(llama(), ['safetensors'], [2]);
    expect(json(out, 'config.json').quantization_config).toMatchObject({
      quant_method: 'pcomp-planes',
      version: 1,
      group_size: 32,
      bits: 2,
    });
  });

  it('in planes hold quantized embeddings, and a GPT-2 whose weights lie transposed', async () => {
    const table = randomLinear({ rows: 41, columns: 32, groupSize: 32, bits: [8], seed: 5 });
    const { out, linears } = await write(tinyGpt2('planes'), ['safetensors'], [3], () => [['wte', table]]);
    await using source = await openModelSource(out);
    const [site] = source.model.blocks[0].sites;
    expect(site.transposed).toBe(true);
    expect(await source.weights.loadSite(site)).toEqual(dequantize(linears.get(site.name)!));
    expect((await source.tensors.read(`${site.name}.weight`)).shape).toEqual([site.inFeatures, site.outFeatures]);
    expect(await source.weights.load('wte.weight')).toEqual(dequantize(table));
  });

  it('in GPTQ use v1 for symmetric 4-bit modules, v2 otherwise, and name the modules that differ', async () => {
    const symmetric = (q: QuantizedLinear): QuantizedLinear => ({ ...q, zeroPoints: q.zeroPoints.map(() => 8) });
    const folder = await save(llama());
    await using source = await openModelSource(folder);
    const out = join(root, 'out');
    const attempt = async (linears: Map<string, QuantizedLinear>) => {
      rmSync(out, { recursive: true, force: true });
      mkdirSync(out);
      const artifact = await writeArtifact({
        source,
        quantized: sourceOf(linears),
        folder: out,
        formats: ['gptq'],
        version: '0',
      });
      await using opened = await openModelSource(out);
      for (const site of opened.model.blocks.flatMap((block) => block.sites)) {
        const q = linears.get(site.name);
        if (q?.bits.every((bits) => bits === q.bits[0])) expect(await opened.weights.loadSite(site)).toEqual(dequantize(q));
      }
      expect(json(out, 'quantize_config.json')).toEqual(json(out, 'config.json').quantization_config);
      return { config: json(out, 'quantize_config.json'), notes: artifact.notes.join('\n') };
    };
    const four = new Map([...solutionOf(source.model, [4], 32)].map(([name, q]) => [name, symmetric(q)]));
    const v1 = await attempt(four);
    expect(v1.config).toMatchObject({ bits: 4, group_size: 32, sym: true, checkpoint_format: 'gptq', desc_act: false });
    expect(v1.config).not.toHaveProperty('dynamic');
    expect(v1.notes).toMatch(/vLLM load/);

    const down = 'model.layers.1.mlp.down_proj';
    const mixed = randomLinear({ rows: 64, columns: 96, groupSize: 32, bits: [2, 4], seed: 9 });
    const three = solutionOf(source.model, [3], 32, (name) => name !== 'model.layers.0.mlp.up_proj');
    const eight = randomLinear({ rows: 64, columns: 64, groupSize: 32, bits: [8] });
    const v2 = await attempt(three.set(down, mixed).set('model.layers.0.self_attn.o_proj', eight));
    expect(v2.config).toMatchObject({
      bits: 3,
      sym: false,
      checkpoint_format: 'gptq_v2',
      dynamic: {
        '+:^model\\.layers\\.0\\.self_attn\\.o_proj$': { bits: 8, group_size: 32 },
        '-:^model\\.layers\\.0\\.mlp\\.up_proj$': {},
        '-:^model\\.layers\\.1\\.mlp\\.down_proj$': {},
      },
    });
    expect(v2.notes).toMatch(/down_proj stays in float, it mixes widths/);
  });

  it('in GPTQ are refused when no module suits the layout', async () => {
    await expect(write(llama(), ['gptq'], [1, 2])).rejects.toThrow(/none of the quantized modules.*mixes widths/);
  });
});

describe('an artifact that cannot be', () => {
  const attempt = async (change: (linears: Map<string, QuantizedLinear>) => void) => {
    await using source = await openModelSource(await save(llama()));
    const linears = solutionOf(source.model, [2], 32, undefined, 32);
    change(linears);
    const folder = join(root, 'out');
    mkdirSync(folder);
    await writeArtifact({ source, quantized: sourceOf(linears), folder, formats: ['onnx'], version: '0' });
  };
  const q = 'model.layers.0.self_attn.q_proj';
  const up = 'model.layers.0.mlp.up_proj';

  it('is a bug that is named: one input transformed in two ways', async () => {
    const broken = attempt((linears) => {
      const { transform: _, ...plain } = linears.get(q)!;
      linears.set(q, plain);
    });
    await expect(broken).rejects.toThrow(/k_proj and .*q_proj read one input/);
  });

  it('is a bug that is named: a bias for a layer that has none', async () => {
    const broken = attempt((linears) => linears.set(up, { ...linears.get(up)!, bias: new Float32Array(96) }));
    await expect(broken).rejects.toThrow(/"model.layers.0.mlp.up_proj.bias", which is not there/);
  });
});

describe('a model source', () => {
  it('of a float model has its tensors and the width of its type', async () => {
    const folder = await save(llama());
    await using source = await openModelSource(folder);
    expect([source.kind, source.storage.bitsPerWeight, source.storage.averageBits]).toEqual(['float', 16, 16]);
    expect(source.weightBytes).toBe(statSync(join(folder, 'model.safetensors')).size);
    await using bare = await openModelSource(join(folder, 'model.safetensors'));
    expect([bare.kind, bare.folder]).toEqual(['float', folder]);
  });

  it('ignores ONNX exports that pcomp did not write', async () => {
    const folder = await save(llama());
    mkdirSync(join(folder, 'onnx'));
    writeFileSync(join(folder, 'onnx', 'model.onnx'), 'of somebody else');
    await using source = await openModelSource(folder);
    expect(source.kind).toBe('float');
  });

  const damaged: readonly (readonly [string, (folder: string) => void, object])[] = [
    ['is not there', (folder) => rmSync(folder, { recursive: true }), { code: 'FILE_UNREADABLE' }],
    ['has no config.json', (folder) => rmSync(join(folder, 'config.json')), { code: 'FILE_UNREADABLE' }],
    [
      'has a config.json that is no JSON',
      (folder) => writeFileSync(join(folder, 'config.json'), '{'),
      { rule: 'config-not-json' },
    ],
    [
      'has a config.json that is no object',
      (folder) => writeFileSync(join(folder, 'config.json'), '[]'),
      { rule: 'config-not-an-object' },
    ],
  ];
  it.each(damaged)('that %s is refused by name', async (_, damage, expected) => {
    const folder = await save(llama());
    damage(folder);
    const error = await openModelSource(folder).catch((thrown: unknown) => thrown);
    expect([EnvironmentError, FormatError].some((type) => error instanceof type)).toBe(true);
    expect(error).toMatchObject(expected);
  });

  it('that others quantized is refused', async () => {
    const folder = await save(llama());
    writeFileSync(
      join(folder, 'config.json'),
      JSON.stringify({ ...llama().config, quantization_config: { quant_method: 'awq' } }),
    );
    await expect(openModelSource(folder)).rejects.toThrow(UnsupportedError);
  });

  it('whose GPTQ configuration lost its format is refused', async () => {
    const { out } = await write(llama(), ['gptq'], [4]);
    const config = json(out, 'config.json');
    writeFileSync(join(out, 'config.json'), JSON.stringify({ ...config, quantization_config: {} }));
    await expect(openModelSource(out)).rejects.toMatchObject({ rule: 'gptq-checkpoint-format' });
  });

  it('reads no more of an unquantized tensor than the rows asked for', async () => {
    const { out } = await write(llama(), ['onnx'], [2]);
    await using source = await openModelSource(out);
    const { data, shape } = await source.tensors.readRows('model.embed_tokens.weight', 2, 5);
    expect([shape, data.byteLength]).toEqual([[3, 64], byteLengthOf('BF16', [3, 64])]);
  });
});
