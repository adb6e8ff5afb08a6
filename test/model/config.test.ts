import { describe, expect, test } from 'vitest';
import { FormatError, UnsupportedError } from '../../src/errors.ts';
import { ARCHITECTURES, createModel } from '../../src/model/architectures/index.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

const llama = tinyLlama('config');
const gpt2 = tinyGpt2('config');

function refusal({ config, source }: TinyModel, changes: unknown): Error {
  const changed =
    typeof changes === 'object' && !Array.isArray(changes) && changes !== null ? { ...config, ...changes } : changes;
  try {
    createModel(changed, 'folder/config.json', source);
  } catch (error) {
    return error as Error;
  }
  throw new Error('the configuration was accepted');
}

const count = 'it must be an integer from 1 to 2147483647 [config-field-value]';

describe('a broken configuration is refused with the file, the field, its value and the rule', () => {
  const qwen3 = { architectures: ['Qwen3ForCausalLM'] };
  const smol = { architectures: ['SmolLM3ForCausalLM'] };
  test.each<[unknown, string]>([
    [[], 'the configuration is [], it must be an object [config-not-an-object]'],
    ['text', 'the configuration is "text", it must be an object [config-not-an-object]'],
    [{ architectures: undefined }, '"architectures" is missing [config-field-missing]'],
    [
      { architectures: 'LlamaForCausalLM' },
      '"architectures" is "LlamaForCausalLM", it must be a list of strings [config-field-value]',
    ],
    [{ architectures: [] }, '"architectures" is empty, it must name one architecture [config-field-value]'],
    [{ hidden_size: undefined }, '"hidden_size" is missing [config-field-missing]'],
    [{ hidden_size: null }, '"hidden_size" is missing [config-field-missing]'],
    [{ hidden_size: '32' }, `"hidden_size" is "32", ${count}`],
    [{ hidden_size: -32 }, `"hidden_size" is -32, ${count}`],
    [{ intermediate_size: 24.5 }, `"intermediate_size" is 24.5, ${count}`],
    [{ vocab_size: 0 }, `"vocab_size" is 0, ${count}`],
    [{ vocab_size: 2 ** 31 }, `"vocab_size" is 2147483648, ${count}`],
    [{ intermediate_size: [64] }, `"intermediate_size" is [64], ${count}`],
    [{ num_hidden_layers: 1e9 }, '"num_hidden_layers" is 1000000000, it must be an integer from 1 to 10000 [config-field-value]'],
    [{ num_attention_heads: 3 }, '"num_key_value_heads" is 2, it must divide the "num_attention_heads" of 3 [config-heads]'],
    [
      { num_attention_heads: 6 },
      '"hidden_size" is 32, the "num_attention_heads" of 6 must divide it into even parts when "head_dim" is not given [config-heads]',
    ],
    [{ head_dim: 15 }, '"head_dim" is 15, it must be even: rotation takes features in pairs [config-heads]'],
    [{ rms_norm_eps: 0 }, '"rms_norm_eps" is 0, it must be a number above 0 [config-field-value]'],
    [{ rms_norm_eps: '1e-5' }, '"rms_norm_eps" is "1e-5", it must be a number above 0 [config-field-value]'],
    [{ rope_theta: -1 }, '"rope_theta" is -1, it must be a number above 0 [config-field-value]'],
    [{ attention_bias: 1 }, '"attention_bias" is 1, it must be true or false [config-field-value]'],
    [{ hidden_act: 7 }, '"hidden_act" is 7, it must be a string [config-field-value]'],
    [{ rope_scaling: 8 }, '"rope_scaling" is 8, it must be an object [config-not-an-object]'],
    [{ rope_scaling: { type: 'linear' } }, '"rope_scaling.factor" is missing [config-field-missing]'],
    [
      { rope_scaling: { rope_type: 'llama3', factor: 8, low_freq_factor: 4, high_freq_factor: 1 } },
      '"rope_scaling.high_freq_factor" is 1, it must be above the "low_freq_factor" of 4 [config-rope-scaling]',
    ],
    [
      { layer_types: ['full_attention'] },
      '"layer_types" is ["full_attention"], it has 1 entries, "num_hidden_layers" is 2 [config-list-length]',
    ],
    [{ layer_types: ['full_attention', 'sliding_attention'] }, '"sliding_window" is missing [config-field-missing]'],
    [
      { ...qwen3, head_dim: 16, use_sliding_window: 'no' },
      '"use_sliding_window" is "no", it must be true or false [config-field-value]',
    ],
    [
      { ...smol, no_rope_layers: [1] },
      '"no_rope_layers" is [1], it has 1 entries and needs one for each layer [config-list-length]',
    ],
    [{ ...smol, no_rope_layers: [1, 2] }, '"no_rope_layers" is [1,2], it must be a list of zeros and ones [config-field-value]'],
  ])('%j', (changes, message) => {
    const error = refusal(tinyLlama('config', { num_key_value_heads: 2 }), changes);
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toBe(`folder/config.json: ${message}`);
  });

  test('GPT-2 has its own names for its sizes', () => {
    expect(refusal(gpt2, { n_embd: undefined }).message).toContain('"n_embd" is missing');
    expect(refusal(gpt2, { n_head: 5 }).message).toContain('"n_head" is 5, it must divide the "n_embd" of 32');
    expect(refusal(gpt2, { n_positions: undefined }).message).toContain('"n_positions" is missing');
    expect(refusal(gpt2, { scale_attn_weights: 'yes' }).message).toContain(
      '"scale_attn_weights" is "yes", it must be true or false',
    );
  });
});

describe('a configuration pcomp cannot run is refused with what it can', () => {
  const rope = 'supported: default, linear, llama3';
  test.each<[Record<string, unknown>, string]>([
    [
      { architectures: ['MixtralForCausalLM'] },
      `architecture "MixtralForCausalLM" is not supported; supported: ${Object.keys(ARCHITECTURES).join(', ')}`,
    ],
    [{ architectures: ['__proto__'] }, 'architecture "__proto__" is not supported'],
    [{ hidden_act: 'softplus' }, '"hidden_act" is "softplus"; supported: silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu'],
    [{ hidden_act: 'toString' }, '"hidden_act" is "toString"; supported: silu'],
    [{ rope_scaling: { rope_type: 'yarn', factor: 4 } }, `"rope_scaling.rope_type" is "yarn"; ${rope}`],
    [{ rope_scaling: { type: 'dynamic', factor: 4 } }, `"rope_scaling.type" is "dynamic"; ${rope}`],
    [{ rope_parameters: { rope_type: 'longrope' } }, `"rope_parameters.rope_type" is "longrope"; ${rope}`],
    [
      { rope_parameters: { full_attention: { rope_type: 'default' } } },
      'one set of rotary parameters for all layers is supported, not one per layer type',
    ],
    [{ partial_rotary_factor: 0.5 }, '"partial_rotary_factor" is 0.5; only whole heads are rotated (1)'],
    [{ layer_types: ['full_attention', 'linear_attention'] }, 'supported: full_attention, sliding_attention'],
    [
      { quantization_config: { quant_method: 'gptq' } },
      '"quantization_config" is {"quant_method":"gptq"}; the checkpoint is quantized already',
    ],
  ])('%j', (changes, message) => {
    const error = refusal(llama, changes);
    expect(error).toBeInstanceOf(UnsupportedError);
    expect(error.message).toContain('folder/config.json: ');
    expect(error.message).toContain(message);
  });

  test('GPT-2 with an encoder beside it', () => {
    const error = refusal(gpt2, { add_cross_attention: true });
    expect(error).toBeInstanceOf(UnsupportedError);
    expect(error.message).toContain('"add_cross_attention" is true; only decoders without an encoder');
  });
});

describe('a checkpoint that does not fit its configuration', () => {
  test('is refused for missing tensors, naming the first and counting all', () => {
    const { config, source } = tinyLlama('missing');
    source.tensors.delete('model.layers.1.mlp.up_proj.weight');
    const one = refusal({ label: '', config, source }, {});
    expect(one).toBeInstanceOf(FormatError);
    expect(one.message).toBe(
      'memory.safetensors: 1 of the 21 tensors that config.json asks for are missing: "model.layers.1.mlp.up_proj.weight" [tensor-missing]',
    );
    for (const name of [...source.tensors.keys()]) if (name.includes('layers.0')) source.tensors.delete(name);
    expect(refusal({ label: '', config, source }, {}).message).toMatch(
      /^memory.safetensors: 10 of .* and 6 more \[tensor-missing\]$/,
    );
  });

  test.each([
    [{ head_dim: 2 ** 31 - 2 }, /"head_dim" is 2147483646, which makes heads of 2147483646 features, more than 65536/],
    [{ hidden_size: 2 ** 30 }, /"hidden_size" is 1073741824, which makes heads of \d+ features, more than 65536/],
    [
      { max_position_embeddings: 2 ** 31 - 1 },
      /"max_position_embeddings" is 2147483647, it must be an integer from 1 to 16777216/,
    ],
  ])('is refused before anything of that size is made: %j', (fields, message) => {
    const { config, source } = tinyLlama('absurd');
    const { head_dim: _, ...rest } = config;
    const error = refusal({ label: '', config: rest, source }, fields);
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toMatch(message);
  });

  test('is refused for a head that is neither stored nor tied', () => {
    const { config, source } = tinyLlama('untied', { tie_word_embeddings: true });
    expect(refusal({ label: '', config, source }, { tie_word_embeddings: false }).message).toContain('"lm_head.weight"');
  });

  test('is refused for a shape, naming both', () => {
    const error = refusal(llama, { intermediate_size: 48 });
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toBe(
      'memory.safetensors: tensor "model.layers.0.mlp.gate_proj.weight" has shape [24, 32], but config.json asks for [48, 32] [tensor-shape]',
    );
  });

  test('is refused for a dtype that holds no weights', () => {
    const { config, source } = tinyLlama('integers');
    source.add('model.norm.weight', 'I8', [32], new Uint8Array(32));
    const error = refusal({ label: '', config, source }, {});
    expect(error).toBeInstanceOf(UnsupportedError);
    expect(error.message).toBe('memory.safetensors: tensor "model.norm.weight" is I8; weights may be F32, F16, BF16, F64');
  });

  test('may hold buffers and a copy of a tied head; what else it holds is listed', () => {
    const { config, source } = tinyLlama('spare', { tie_word_embeddings: true });
    source.add('model.layers.0.self_attn.rotary_emb.inv_freq', 'F32', [8], new Uint8Array(32));
    source.add('lm_head.weight', 'F32', [41, 32], new Uint8Array(41 * 32 * 4));
    source.add('model.layers.0.self_attn.q_norm.weight', 'F32', [16], new Uint8Array(64));
    expect(createModel(config, 'config.json', source).unusedTensors).toEqual(['model.layers.0.self_attn.q_norm.weight']);

    const gpt = tinyGpt2('spare');
    gpt.source.add('h.0.attn.bias', 'F32', [1, 1, 64, 64], new Uint8Array(64 * 64 * 4));
    gpt.source.add('h.0.attn.masked_bias', 'F32', [], new Uint8Array(4));
    gpt.source.add('classifier.weight', 'F32', [2, 32], new Uint8Array(256));
    expect(createModel(gpt.config, 'config.json', gpt.source).unusedTensors).toEqual(['classifier.weight']);
  });
});
