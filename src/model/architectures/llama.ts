/**
 * The Llama family: RMS norms, rotary attention with shared key/value heads, a gated MLP. Its members differ by
 * configuration and by the few traits in the table below.
 */
import { type ConfigReader, MAX_BLOCKS } from '../config.ts';
import type { Activation, BlockDescription, DecoderDescription, NormDescription } from '../description.ts';
import type { LinearSite } from '../model.ts';
import { ACTIVATIONS } from './activations.ts';
import { readRotary } from './rotary-config.ts';

/** Features of a head that are refused as nonsense, before tables of that many are made; published models have at most 512. */
const MAX_HEAD_DIM = 65_536;
/** Positions beyond which a context is nonsense: the artifact holds an angle for each, and the longest published have ten million. */
const MAX_CONTEXT = 2 ** 24;

/** What sets a member apart where its config.json is silent. */
export interface LlamaTraits {
  /** q, k and v always have biases and o never has; otherwise `attention_bias` decides for all four. */
  readonly qkvBias?: boolean;
  /** Each head of q and k has an RMS norm of its own before rotation. */
  readonly headNorms?: boolean;
  /** Whether block `index` rotates; all do when absent. */
  readonly rotates?: (config: ConfigReader, index: number) => boolean;
  /** Whether block `index` sees only `sliding_window` tokens, unless `layer_types` says; none do when absent. */
  readonly slides?: (config: ConfigReader, index: number, rotates: boolean) => boolean;
  /** Values of fields that a file may leave out. */
  readonly headDim?: number;
  readonly ropeTheta?: number;
  readonly tied?: boolean;
  readonly slidingWindow?: number;
}

/** Members by the name in `architectures`. A new one is a line here. */
export const LLAMA_FAMILY = {
  LlamaForCausalLM: {},
  MistralForCausalLM: { slides: () => true, slidingWindow: 4096 },
  Qwen2ForCausalLM: { qkvBias: true, slides: slidesFromMaxWindowLayers, slidingWindow: 4096 },
  Qwen3ForCausalLM: { headNorms: true, headDim: 128, slides: slidesFromMaxWindowLayers, slidingWindow: 4096 },
  SmolLM3ForCausalLM: { rotates: rotatesByList, slides: slidesWhereUnrotated, ropeTheta: 2_000_000, tied: true },
} as const satisfies Readonly<Record<string, LlamaTraits>>;

function slidesFromMaxWindowLayers(config: ConfigReader, index: number): boolean {
  return config.boolean('use_sliding_window', false) && index >= config.index('max_window_layers', 28);
}

function slidesWhereUnrotated(config: ConfigReader, _index: number, rotates: boolean): boolean {
  return config.boolean('use_sliding_window', false) && !rotates;
}

function rotatesByList(config: ConfigReader, index: number): boolean {
  if (!config.has('no_rope_layers')) return (index + 1) % config.count('no_rope_layer_interval', 4) !== 0;
  const flags = config.bits('no_rope_layers');
  if (index < flags.length) return flags[index] === 1;
  throw config.broken('config-list-length', 'no_rope_layers', `it has ${flags.length} entries and needs one for each layer`);
}

/** Describes a member of the family. Throws FormatError or UnsupportedError naming field, value and rule. */
export function describeLlama(config: ConfigReader, traits: LlamaTraits): DecoderDescription {
  const hiddenSize = config.count('hidden_size');
  const headCount = config.count('num_attention_heads');
  const kvHeadCount = config.count('num_key_value_heads', headCount);
  if (headCount % kvHeadCount !== 0) {
    throw config.broken('config-heads', 'num_key_value_heads', `it must divide the "num_attention_heads" of ${headCount}`);
  }
  const headDim = readHeadDim(config, hiddenSize, headCount, traits);
  const contextLength = config.count('max_position_embeddings', undefined, MAX_CONTEXT);
  const blockCount = config.count('num_hidden_layers', undefined, MAX_BLOCKS);
  const tied = config.boolean('tie_word_embeddings', traits.tied ?? false);
  const make: BlockMaker = {
    qkvBias: traits.qkvBias ?? config.boolean('attention_bias', false),
    outputBias: traits.qkvBias ? false : config.boolean('attention_bias', false),
    mlpBias: config.boolean('mlp_bias', false),
    headNorms: traits.headNorms ?? false,
    epsilon: config.positive('rms_norm_eps', 1e-6),
    activation: config.choice('hidden_act', ACTIVATIONS, 'silu'),
    intermediateSize: config.count('intermediate_size'),
    hiddenSize,
    headCount,
    kvHeadCount,
    headDim,
  };
  const windows = readWindows(config, traits, blockCount);
  const tokenEmbedding = 'model.embed_tokens.weight';
  const outputHead = tied ? tokenEmbedding : 'lm_head.weight';
  return {
    shape: {
      vocabSize: config.count('vocab_size'),
      hiddenSize,
      blockCount,
      headCount,
      kvHeadCount,
      headDim,
      contextLength,
      tiedEmbeddings: tied,
    },
    tokenEmbedding,
    rotary: readRotary(config, headDim, contextLength, traits.ropeTheta ?? 10_000),
    blocks: windows.map((window, i) => describeBlock(i, make, traits.rotates?.(config, i) ?? true, window)),
    finalNorm: { kind: 'rms', name: 'model.norm', features: hiddenSize, epsilon: make.epsilon },
    outputHead,
    // Old files store the rotary frequencies, some store a tied head twice.
    ignoredTensors: /\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|^lm_head\.weight$/,
  };
}

function readHeadDim(config: ConfigReader, hiddenSize: number, headCount: number, traits: LlamaTraits): number {
  if (!config.has('head_dim') && traits.headDim === undefined && hiddenSize % (2 * headCount) !== 0) {
    throw config.broken(
      'config-heads',
      'hidden_size',
      `the "num_attention_heads" of ${headCount} must divide it into even parts when "head_dim" is not given`,
    );
  }
  const headDim = config.count('head_dim', traits.headDim ?? hiddenSize / headCount);
  if (headDim > MAX_HEAD_DIM) {
    const field = config.has('head_dim') ? 'head_dim' : 'hidden_size';
    throw config.broken('config-heads', field, `which makes heads of ${headDim} features, more than ${MAX_HEAD_DIM}`);
  }
  if (headDim % 2 !== 0) throw config.broken('config-heads', 'head_dim', 'it must be even: rotation takes features in pairs');
  return headDim;
}

/** The window of each block, or undefined where a query sees all earlier tokens. */
function readWindows(config: ConfigReader, traits: LlamaTraits, blockCount: number): (number | undefined)[] {
  const types = config.has('layer_types') ? config.texts('layer_types') : undefined;
  if (types && types.length !== blockCount) {
    throw config.broken(
      'config-list-length',
      'layer_types',
      `it has ${types.length} entries, "num_hidden_layers" is ${blockCount}`,
    );
  }
  const unknown = types?.find((type) => type !== 'full_attention' && type !== 'sliding_attention');
  if (unknown) throw config.unsupported('layer_types', 'supported: full_attention, sliding_attention');
  return Array.from({ length: blockCount }, (_, i) => {
    const slides = types ? types[i] === 'sliding_attention' : traits.slides?.(config, i, traits.rotates?.(config, i) ?? true);
    if (!slides) return undefined;
    if (types || config.has('sliding_window')) return config.count('sliding_window');
    // null says: no window. A field left out has its class's default.
    return Object.hasOwn(config.fields, 'sliding_window') ? undefined : traits.slidingWindow;
  });
}

/** What all blocks of a model share. */
interface BlockMaker {
  readonly qkvBias: boolean;
  readonly outputBias: boolean;
  readonly mlpBias: boolean;
  readonly headNorms: boolean;
  readonly epsilon: number;
  readonly activation: Activation;
  readonly intermediateSize: number;
  readonly hiddenSize: number;
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
}

function describeBlock(index: number, make: BlockMaker, rotates: boolean, window: number | undefined): BlockDescription {
  const { hiddenSize, headCount, kvHeadCount, headDim, intermediateSize, qkvBias, outputBias, mlpBias, epsilon } = make;
  const name = `model.layers.${index}`;
  const site = (path: string, input: string, outFeatures: number, inFeatures: number, hasBias: boolean): LinearSite => ({
    name: `${name}.${path}`,
    input: `${name}.${input}`,
    outFeatures,
    inFeatures,
    hasBias,
    transposed: false,
  });
  const norm = (path: string, features: number): NormDescription => ({ kind: 'rms', name: `${name}.${path}`, features, epsilon });
  return {
    name,
    attentionNorm: norm('input_layernorm', hiddenSize),
    attentionName: `${name}.self_attn`,
    attention: {
      projections: {
        q: site('self_attn.q_proj', 'self_attn.input', headCount * headDim, hiddenSize, qkvBias),
        k: site('self_attn.k_proj', 'self_attn.input', kvHeadCount * headDim, hiddenSize, qkvBias),
        v: site('self_attn.v_proj', 'self_attn.input', kvHeadCount * headDim, hiddenSize, qkvBias),
      },
      output: site('self_attn.o_proj', 'self_attn.o_proj.input', hiddenSize, headCount * headDim, outputBias),
      ...(make.headNorms ? { headNorms: { q: norm('self_attn.q_norm', headDim), k: norm('self_attn.k_norm', headDim) } } : {}),
      rotates,
      ...(window === undefined ? {} : { window }),
      scale: headDim ** -0.5,
    },
    mlpNorm: norm('post_attention_layernorm', hiddenSize),
    mlpName: `${name}.mlp`,
    mlp: {
      gate: site('mlp.gate_proj', 'mlp.input', intermediateSize, hiddenSize, mlpBias),
      up: site('mlp.up_proj', 'mlp.input', intermediateSize, hiddenSize, mlpBias),
      down: site('mlp.down_proj', 'mlp.down_proj.input', hiddenSize, intermediateSize, mlpBias),
      activation: make.activation,
    },
  };
}
