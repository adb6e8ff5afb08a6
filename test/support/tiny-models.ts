/** Tiny random checkpoints of every architecture and every choice it offers, made in code. */
import { type FloatDType, fromFloat32 } from '../../formats/dtype.ts';
import type { LinearSite, WeightReader } from '../../src/model/model.ts';
import { MemorySource } from './memory-source.ts';
import { randomSource, randomValues } from './random.ts';

export interface TinyModel {
  /** What is special about it. */
  readonly label: string;
  readonly config: Readonly<Record<string, unknown>>;
  readonly source: MemorySource;
}

interface Extras {
  readonly dtype?: FloatDType;
  /** Linear layers with a bias, by the last part of their name. */
  readonly biases?: readonly string[];
  readonly headNorms?: boolean;
  /** GPT-2: what tensor names begin with. */
  readonly prefix?: string;
}

const LLAMA_CONFIG = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  vocab_size: 41,
  hidden_size: 32,
  intermediate_size: 24,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  hidden_act: 'silu',
  max_position_embeddings: 64,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  tie_word_embeddings: false,
};

const GPT2_CONFIG = {
  architectures: ['GPT2LMHeadModel'],
  model_type: 'gpt2',
  vocab_size: 41,
  n_embd: 32,
  n_head: 2,
  n_layer: 2,
  n_positions: 64,
  layer_norm_epsilon: 1e-5,
};

/** A member of the Llama family; `changes` go into its config.json. */
export function tinyLlama(label: string, changes: Readonly<Record<string, unknown>> = {}, extras: Extras = {}): TinyModel {
  const config = { ...LLAMA_CONFIG, ...changes };
  const { hidden_size: width, num_attention_heads: heads, num_key_value_heads: kvHeads, intermediate_size: inner } = config;
  const headDim = ((changes['head_dim'] as number | undefined) ?? width / heads) as number;
  const add = tensorMaker(label, extras.dtype ?? 'F32');
  const linear = (name: string, out: number, inputs: number): void => {
    add(`${name}.weight`, [out, inputs], 1.5 / Math.sqrt(inputs));
    if (extras.biases?.includes(name.slice(name.lastIndexOf('.') + 1))) add(`${name}.bias`, [out], 0.5);
  };
  add('model.embed_tokens.weight', [config.vocab_size, width], 1);
  for (let i = 0; i < config.num_hidden_layers; i++) {
    const name = `model.layers.${i}`;
    add(`${name}.input_layernorm.weight`, [width], 0.5, 1);
    linear(`${name}.self_attn.q_proj`, heads * headDim, width);
    linear(`${name}.self_attn.k_proj`, kvHeads * headDim, width);
    linear(`${name}.self_attn.v_proj`, kvHeads * headDim, width);
    linear(`${name}.self_attn.o_proj`, width, heads * headDim);
    if (extras.headNorms) {
      add(`${name}.self_attn.q_norm.weight`, [headDim], 0.5, 1);
      add(`${name}.self_attn.k_norm.weight`, [headDim], 0.5, 1);
    }
    add(`${name}.post_attention_layernorm.weight`, [width], 0.5, 1);
    linear(`${name}.mlp.gate_proj`, inner, width);
    linear(`${name}.mlp.up_proj`, inner, width);
    linear(`${name}.mlp.down_proj`, width, inner);
  }
  add('model.norm.weight', [width], 0.5, 1);
  if (!config.tie_word_embeddings) add('lm_head.weight', [config.vocab_size, width], 0.5);
  return { label, config, source: add.source };
}

/** A GPT-2; `changes` go into its config.json. */
export function tinyGpt2(label: string, changes: Readonly<Record<string, unknown>> = {}, extras: Extras = {}): TinyModel {
  const config = { ...GPT2_CONFIG, ...changes };
  const width = config.n_embd;
  const inner = (changes['n_inner'] as number | undefined) ?? 4 * width;
  const prefix = extras.prefix ?? '';
  const add = tensorMaker(label, extras.dtype ?? 'F32');
  const conv = (name: string, inputs: number, out: number): void => {
    add(`${name}.weight`, [inputs, out], 1.5 / Math.sqrt(inputs));
    add(`${name}.bias`, [out], 0.5);
  };
  const norm = (name: string): void => {
    add(`${name}.weight`, [width], 0.5, 1);
    add(`${name}.bias`, [width], 0.5);
  };
  add(`${prefix}wte.weight`, [config.vocab_size, width], 1);
  add(`${prefix}wpe.weight`, [config.n_positions, width], 1);
  for (let i = 0; i < config.n_layer; i++) {
    norm(`${prefix}h.${i}.ln_1`);
    conv(`${prefix}h.${i}.attn.c_attn`, width, 3 * width);
    conv(`${prefix}h.${i}.attn.c_proj`, width, width);
    norm(`${prefix}h.${i}.ln_2`);
    conv(`${prefix}h.${i}.mlp.c_fc`, width, inner);
    conv(`${prefix}h.${i}.mlp.c_proj`, inner, width);
  }
  norm(`${prefix}ln_f`);
  return { label, config, source: add.source };
}

const QKV = ['q_proj', 'k_proj', 'v_proj'];
const MLP = ['gate_proj', 'up_proj', 'down_proj'];
const llama3 = {
  rope_type: 'llama3',
  factor: 8,
  low_freq_factor: 1,
  high_freq_factor: 4,
  original_max_position_embeddings: 32,
};

/** One model for each choice an architecture offers. */
export function tinyModels(): TinyModel[] {
  const mistral = { architectures: ['MistralForCausalLM'], model_type: 'mistral' };
  const qwen2 = { architectures: ['Qwen2ForCausalLM'], model_type: 'qwen2' };
  const qwen3 = { architectures: ['Qwen3ForCausalLM'], model_type: 'qwen3', head_dim: 16 };
  const smol = { architectures: ['SmolLM3ForCausalLM'], model_type: 'smollm3', rope_theta: 500, num_hidden_layers: 3 };
  const window = { use_sliding_window: true, sliding_window: 3 };
  return [
    tinyLlama('Llama with shared key/value heads'),
    tinyLlama('Llama in BF16 with tied embeddings', { tie_word_embeddings: true }, { dtype: 'BF16' }),
    tinyLlama('Llama in F16 with its own head', { num_key_value_heads: 2 }, { dtype: 'F16' }),
    tinyLlama('Llama with heads of 8', { num_attention_heads: 4, num_key_value_heads: 2 }),
    tinyLlama('Llama with heads of 12', { num_attention_heads: 4, num_key_value_heads: 2, head_dim: 12 }),
    tinyLlama('Llama with heads of 4 and no groups', { num_attention_heads: 3, num_key_value_heads: 3, head_dim: 4 }),
    tinyLlama(
      'Llama with biases and GELU',
      { attention_bias: true, mlp_bias: true, hidden_act: 'gelu' },
      { biases: [...QKV, 'o_proj', ...MLP] },
    ),
    tinyLlama('Llama with linear rope scaling and ReLU', { rope_scaling: { type: 'linear', factor: 4 }, hidden_act: 'relu' }),
    tinyLlama('Llama 3.1 rope scaling', { rope_theta: 50, rope_scaling: llama3 }),
    tinyLlama('Llama with the newer rope_parameters', { rope_theta: undefined, rope_parameters: { ...llama3, rope_theta: 70 } }),
    tinyLlama('Mistral with a window', { ...mistral, sliding_window: 3 }),
    tinyLlama('Mistral with a window and heads of 12', { ...mistral, sliding_window: 3, head_dim: 12 }),
    tinyLlama('Mistral without a window', { ...mistral, sliding_window: null, head_dim: 32 }),
    tinyLlama('Qwen2', { ...qwen2, use_sliding_window: false, sliding_window: 3 }, { biases: QKV }),
    tinyLlama('Qwen2 with a window from block 1', { ...qwen2, ...window, max_window_layers: 1 }, { biases: QKV }),
    tinyLlama('Qwen3', { ...qwen3, tie_word_embeddings: true }, { headNorms: true }),
    tinyLlama(
      'Qwen3 with heads of 12 and layer_types',
      { ...qwen3, ...window, head_dim: 12, layer_types: ['sliding_attention', 'full_attention'] },
      { headNorms: true },
    ),
    tinyLlama('SmolLM3 with a list of unrotated blocks', { ...smol, no_rope_layers: [1, 0, 1], tie_word_embeddings: true }),
    tinyLlama('SmolLM3 with an interval, a window and heads of 8', {
      ...smol,
      ...window,
      no_rope_layer_interval: 2,
      head_dim: 8,
    }),
    tinyGpt2('GPT-2'),
    tinyGpt2('GPT-2 in F16 with prefixed names', { n_inner: 40 }, { prefix: 'transformer.', dtype: 'F16' }),
    tinyGpt2('GPT-2 with heads of 4', { n_head: 8, scale_attn_by_inverse_layer_idx: true, activation_function: 'gelu' }),
  ];
}

interface AddTensor {
  (name: string, shape: readonly number[], spread: number, center?: number): void;
  readonly source: MemorySource;
}

/** Adds random tensors to a new source; the label seeds them. */
function tensorMaker(label: string, dtype: FloatDType): AddTensor {
  const random = randomSource([...label].reduce((hash, char) => Math.imul(hash, 31) + char.charCodeAt(0), 7));
  const source = new MemorySource();
  const add = (name: string, shape: readonly number[], spread: number, center = 0): void => {
    const count = shape.reduce((product, dim) => product * dim, 1);
    source.add(name, dtype, shape, fromFloat32(dtype, randomValues(random, count, spread, center)));
  };
  return Object.assign(add, { source });
}

/** Its weights as the product reads them. */
export function weightsOf(tiny: TinyModel): WeightReader {
  const info = (name: string) => tiny.source.tensors.get(name);
  return {
    load: async (name) => tiny.source.values(name)!,
    loadRows: async (name, start, end) => {
      const columns = info(name)!.shape[1];
      return tiny.source.values(name)!.slice(start * columns, end * columns);
    },
    loadSite: async (site: LinearSite) => {
      const stored = tiny.source.values(`${site.name}.weight`)!;
      if (!site.transposed) return stored;
      const { outFeatures, inFeatures } = site;
      return Float32Array.from(
        { length: stored.length },
        (_, i) => stored[(i % inFeatures) * outFeatures + Math.floor(i / inFeatures)],
      );
    },
    info,
  };
}
