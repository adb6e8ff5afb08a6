import { describe, expect, test } from 'vitest';
import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { Value } from '../../src/graph/builder.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { LinearSite } from '../../src/model/model.ts';
import { inverseFrequencies, rotaryTable } from '../../src/model/rotary.ts';
import { MemorySource } from '../support/memory-source.ts';
import { type TinyModel, tinyGpt2, tinyLlama, tinyModels } from '../support/tiny-models.ts';

const create = ({ config, source }: TinyModel) => createModel(config, 'config.json', source);
const decoder = (tiny: TinyModel): OnnxModel => create(tiny).decoderGraph(tiny.source);
const ops = (model: OnnxModel, op: string) => model.graph.nodes.filter((node) => node.op === op);

describe('a Llama block', () => {
  const model = create(tinyLlama('sites', { attention_bias: true }, { biases: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] }));
  const [block] = model.blocks;

  test('has seven sites; q, k and v share an input, and so do gate and up', () => {
    const inputs = Object.fromEntries(block.sites.map((site) => [site.name, site.input]));
    expect(inputs).toEqual({
      'model.layers.0.self_attn.q_proj': 'model.layers.0.self_attn.input',
      'model.layers.0.self_attn.k_proj': 'model.layers.0.self_attn.input',
      'model.layers.0.self_attn.v_proj': 'model.layers.0.self_attn.input',
      'model.layers.0.self_attn.o_proj': 'model.layers.0.self_attn.o_proj.input',
      'model.layers.0.mlp.gate_proj': 'model.layers.0.mlp.input',
      'model.layers.0.mlp.up_proj': 'model.layers.0.mlp.input',
      'model.layers.0.mlp.down_proj': 'model.layers.0.mlp.down_proj.input',
    });
    expect(block.inputs).toEqual([...new Set(Object.values(inputs))]);
  });

  test('gives each site its size, bias and layout', () => {
    const sizes = block.sites.map(({ outFeatures, inFeatures, hasBias, transposed }) => [
      outFeatures,
      inFeatures,
      hasBias,
      transposed,
    ]);
    expect(sizes).toEqual([
      [32, 32, true, false],
      [16, 32, true, false],
      [16, 32, true, false],
      [32, 32, true, false],
      [24, 32, false, false],
      [24, 32, false, false],
      [32, 24, false, false],
    ]);
  });

  test('lists its other tensors, and the model lists all that are no site', () => {
    expect(block.otherTensors).toEqual([
      'model.layers.0.input_layernorm.weight',
      'model.layers.0.post_attention_layernorm.weight',
    ]);
    expect(model.otherTensors).toEqual([
      'model.embed_tokens.weight',
      ...model.blocks.flatMap((each) => each.otherTensors),
      'model.norm.weight',
      'lm_head.weight',
    ]);
  });
});

describe('a GPT-2 block', () => {
  test('has one site for q, k and v, stored (in, out), under either spelling of its names', () => {
    for (const prefix of ['', 'transformer.']) {
      const model = create(tinyGpt2('sites', {}, { prefix }));
      const [{ sites, otherTensors }] = model.blocks;
      expect(sites.map((site) => site.name)).toEqual(
        ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'].map((name) => `${prefix}h.0.${name}`),
      );
      expect(sites[0]).toMatchObject({ outFeatures: 96, inFeatures: 32, hasBias: true, transposed: true });
      expect(new Set(sites.map((site) => site.input)).size).toBe(4);
      expect(otherTensors).toEqual(
        ['ln_1.weight', 'ln_1.bias', 'ln_2.weight', 'ln_2.bias'].map((name) => `${prefix}h.0.${name}`),
      );
      expect([model.tokenEmbedding, model.positionEmbedding]).toEqual([`${prefix}wte.weight`, `${prefix}wpe.weight`]);
      expect(model.outputHead).toBe(model.tokenEmbedding);
    }
  });
});

describe.each(tinyModels())('the exported graph: $label', (tiny) => {
  const model = create(tiny);
  const { graph } = model.decoderGraph(tiny.source);

  test('has the inputs and outputs that transformers.js and onnxruntime-genai go by', () => {
    const { kvHeadCount, headDim, blockCount, vocabSize } = model.shape;
    const cache = (kind: string, length: string) =>
      Array.from({ length: blockCount }, (_, i) => i).flatMap((i) =>
        ['key', 'value'].map((part) => [`${kind}.${i}.${part}`, 'F32', ['batch_size', kvHeadCount, length, headDim]]),
      );
    const list = (values: typeof graph.inputs) => values.map(({ name, dtype, shape }) => [name, dtype, shape]);
    expect(list(graph.inputs)).toEqual([
      ['input_ids', 'I64', ['batch_size', 'sequence_length']],
      ['attention_mask', 'I64', ['batch_size', 'total_sequence_length']],
      ...cache('past_key_values', 'past_sequence_length'),
    ]);
    expect(list(graph.outputs)).toEqual([
      ['logits', 'F32', ['batch_size', 'sequence_length', vocabSize]],
      ...cache('present', 'total_sequence_length'),
    ]);
  });

  test('stores every tensor once, under its name, in its own dtype and layout', async () => {
    const stored = [...graph.initializers.values()].filter(({ name }) => tiny.source.tensors.has(name));
    expect(new Set(stored.map(({ name }) => name))).toEqual(new Set(tiny.source.tensors.keys()));
    for (const { name, dtype, shape, byteLength, read } of stored) {
      const tensor = tiny.source.tensors.get(name)!;
      expect([dtype, shape, byteLength]).toEqual([tensor.dtype, tensor.shape, tensor.byteLength]);
      expect(Buffer.compare(await read(), tensor.data)).toBe(0);
      expect(Buffer.compare(await read(6, byteLength - 2), tensor.data.subarray(6, byteLength - 2))).toBe(0);
    }
  });

  test('is in SSA form and in order', () => {
    const known = new Set(['', ...graph.inputs.map(({ name }) => name), ...graph.initializers.keys()]);
    for (const { inputs, outputs, name } of graph.nodes) {
      expect([name, inputs.filter((input) => !known.has(input))]).toEqual([name, []]);
      for (const output of outputs) {
        expect(output === '' || !known.has(output)).toBe(true);
        known.add(output);
      }
    }
    expect(graph.outputs.every(({ name }) => known.has(name))).toBe(true);
  });

  test('has an operator name for every node that is unique and tells its place', () => {
    const names = graph.nodes.map((node) => node.name);
    expect(new Set(names).size).toBe(names.length);
    for (const { name } of model.blocks.flatMap((block) => block.sites)) {
      expect(names).toContain(`/${name.replace(/\.(?!\d)/g, '/')}/MatMul`);
    }
  });
});

describe('the lowering of attention', () => {
  const rotates = (model: OnnxModel) => ops(model, 'GroupQueryAttention').map((node) => node.attributes['do_rotary']?.value);

  test('lets GroupQueryAttention rotate where heads are a multiple of 16', () => {
    expect(rotates(decoder(tinyLlama('16')))).toEqual([1, 1]);
  });

  test('rotates before it where heads are a multiple of 8 only', () => {
    const model = decoder(tinyLlama('8', { num_attention_heads: 4 }));
    expect(rotates(model)).toEqual([0, 0]);
    expect(ops(model, 'Concat').length).toBe(4);
  });

  test('does without it for other heads', () => {
    const model = decoder(tinyLlama('12', { head_dim: 12 }));
    expect(rotates(model)).toEqual([]);
    expect(ops(model, 'Softmax').length).toBe(2);
  });

  test('does not rotate the blocks of SmolLM3 that are not to be', () => {
    const model = decoder(
      tinyLlama('smol', { architectures: ['SmolLM3ForCausalLM'], no_rope_layers: [0, 1], tie_word_embeddings: true }),
    );
    expect(rotates(model)).toEqual([0, 1]);
    expect(ops(model, 'Concat').length).toBe(0);
  });

  test('gives a window to the blocks that have one', () => {
    const windows = (changes: Record<string, unknown>, biases: string[] = []) =>
      ops(decoder(tinyLlama('window', changes, { biases })), 'GroupQueryAttention').map(
        (node) => node.attributes['local_window_size']?.value,
      );
    const mistral = { architectures: ['MistralForCausalLM'] };
    const qwen = { architectures: ['Qwen2ForCausalLM'], use_sliding_window: true, sliding_window: 7 };
    const qkv = ['q_proj', 'k_proj', 'v_proj'];
    expect(windows({ sliding_window: 7 })).toEqual([undefined, undefined]);
    expect(windows({ ...mistral, sliding_window: 7 })).toEqual([7, 7]);
    expect(windows({ ...mistral, sliding_window: null })).toEqual([undefined, undefined]);
    expect(windows(mistral)).toEqual([4096, 4096]);
    expect(windows({ ...qwen, max_window_layers: 1 }, qkv)).toEqual([undefined, 7]);
    expect(windows({ ...qwen, use_sliding_window: false, max_window_layers: 0 }, qkv)).toEqual([undefined, undefined]);
    expect(windows({ ...qwen, layer_types: ['sliding_attention', 'full_attention'] }, qkv)).toEqual([7, undefined]);
  });
});

describe('a lowering given by the caller', () => {
  test('replaces linears, embedding and head, and may leave some as they are', () => {
    const tiny = tinyLlama('lowering', { tie_word_embeddings: true });
    const seen: string[] = [];
    const marked = (builder: { node1: (op: string, inputs: Value[], output: Value) => Value }, x: Value, shape: Value['shape']) =>
      builder.node1('Marked', [x], { ...x, dtype: 'F32', shape });
    const { graph } = create(tiny).decoderGraph(tiny.source, {
      linear(builder, site: LinearSite, x) {
        seen.push(site.name);
        if (!site.name.endsWith('down_proj')) return undefined;
        return marked(builder, x, [...x.shape.slice(0, 2), site.outFeatures]);
      },
      embedding: (builder, ids) => marked(builder, ids, [...ids.shape, 32]),
      head: (builder, hidden) => marked(builder, hidden, [...hidden.shape.slice(0, 2), 41]),
    });
    expect(seen).toEqual(create(tiny).blocks.flatMap((block) => block.sites.map((site) => site.name)));
    expect(graph.nodes.filter((node) => node.op === 'Marked').map((node) => node.name)).toEqual([
      '/model/embed_tokens/Marked',
      '/model/layers.0/mlp/down_proj/Marked',
      '/model/layers.1/mlp/down_proj/Marked',
      '/lm_head/Marked',
    ]);
    const names = [...graph.initializers.keys()];
    expect(names.filter((name) => /down_proj|embed_tokens|lm_head/.test(name))).toEqual([]);
    expect(names).toContain('model.layers.0.mlp.up_proj.weight');
  });
});

describe('rotary tables', () => {
  test('hold cos and sin of position times frequency, whichever bytes are read', async () => {
    const frequencies = { inverseFrequencies: [1, 0.25], positions: 5 };
    const table = rotaryTable('sin_cache', 'sin', frequencies);
    const all = await table.read();
    expect(Array.from(new Float32Array(all.slice().buffer))).toEqual(
      [0, 1, 2, 3, 4].flatMap((p) => [Math.fround(Math.sin(p)), Math.fround(Math.sin(p / 4))]),
    );
    expect(table.byteLength).toBe(40);
    for (const [start, end] of [
      [4, 12],
      [3, 21],
      [38, 40],
      [0, 0],
    ]) {
      expect(Buffer.compare(await table.read(start, end), all.subarray(start, end))).toBe(0);
    }
  });

  test('of Llama 3.1 keep high frequencies, divide low ones, and meet in between', () => {
    const scaling = {
      kind: 'llama3',
      factor: 8,
      lowFrequencyFactor: 1,
      highFrequencyFactor: 4,
      originalContextLength: 8192,
    } as const;
    const plain = inverseFrequencies(128, 500_000, { kind: 'none' });
    const scaled = inverseFrequencies(128, 500_000, scaling);
    const ratios = plain.map((value, i) => value / scaled[i]);
    expect(ratios[0]).toBe(1);
    expect(ratios[63]).toBeCloseTo(8, 12);
    expect(ratios.every((ratio, i) => i === 0 || ratio >= ratios[i - 1] - 1e-12)).toBe(true);
    expect(ratios.filter((ratio) => ratio > 1.001 && ratio < 7.999).length).toBeGreaterThan(0);
  });
});

test('the source of a model is not read when the model is made', () => {
  const { config, source } = tinyLlama('unread');
  const headers = new MemorySource();
  for (const [name, tensor] of source.tensors) headers.tensors.set(name, tensor);
  headers.read = () => Promise.reject(new Error('read'));
  expect(create({ label: '', config, source: headers }).decoderGraph(headers).graph.nodes.length).toBeGreaterThan(0);
});
