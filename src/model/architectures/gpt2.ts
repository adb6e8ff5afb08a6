/** GPT-2: layer norms with biases, learned positions, one fused q/k/v layer, an MLP without a gate, weights stored (in, out). */
import type { TensorSource } from '../../../formats/tensor.ts';
import { type ConfigReader, MAX_BLOCKS } from '../config.ts';
import type { BlockDescription, DecoderDescription, NormDescription } from '../description.ts';
import type { LinearSite } from '../model.ts';
import { ACTIVATIONS } from './activations.ts';

/** Describes a GPT-2. Files name its tensors with or without the prefix `transformer.`; `source` decides. */
export function describeGpt2(config: ConfigReader, source: TensorSource): DecoderDescription {
  const hiddenSize = config.count('n_embd');
  const headCount = config.count('n_head');
  if (hiddenSize % headCount !== 0) throw config.broken('config-heads', 'n_head', `it must divide the "n_embd" of ${hiddenSize}`);
  if (config.boolean('add_cross_attention', false))
    throw config.unsupported('add_cross_attention', 'only decoders without an encoder are supported (false)');
  const contextLength = config.count(config.has('n_ctx') && !config.has('n_positions') ? 'n_ctx' : 'n_positions');
  const prefix = source.tensors.has('wte.weight') ? '' : 'transformer.';
  const tied = config.boolean('tie_word_embeddings', true);
  const epsilon = config.positive('layer_norm_epsilon', 1e-5);
  const norm = (name: string): NormDescription => ({ kind: 'layer', name, features: hiddenSize, epsilon });
  const site = (name: string, outFeatures: number, inFeatures: number): LinearSite => ({
    name,
    // No two layers of a GPT-2 block read the same activation.
    input: `${name}.input`,
    outFeatures,
    inFeatures,
    hasBias: true,
    transposed: true,
  });

  const headDim = hiddenSize / headCount;
  const innerSize = config.count('n_inner', 4 * hiddenSize);
  const activation = config.choice('activation_function', ACTIVATIONS, 'gelu_new');
  const baseScale = config.boolean('scale_attn_weights', true) ? headDim ** -0.5 : 1;
  const scalesByIndex = config.boolean('scale_attn_by_inverse_layer_idx', false);
  const block = (index: number): BlockDescription => {
    const name = `${prefix}h.${index}`;
    return {
      name,
      attentionNorm: norm(`${name}.ln_1`),
      attentionName: `${name}.attn`,
      attention: {
        projections: { fused: site(`${name}.attn.c_attn`, 3 * hiddenSize, hiddenSize) },
        output: site(`${name}.attn.c_proj`, hiddenSize, hiddenSize),
        rotates: false,
        scale: scalesByIndex ? baseScale / (index + 1) : baseScale,
      },
      mlpNorm: norm(`${name}.ln_2`),
      mlpName: `${name}.mlp`,
      mlp: {
        up: site(`${name}.mlp.c_fc`, innerSize, hiddenSize),
        down: site(`${name}.mlp.c_proj`, hiddenSize, innerSize),
        activation,
      },
    };
  };
  const blockCount = config.count('n_layer', undefined, MAX_BLOCKS);
  const tokenEmbedding = `${prefix}wte.weight`;
  return {
    shape: {
      vocabSize: config.count('vocab_size'),
      hiddenSize,
      blockCount,
      headCount,
      kvHeadCount: headCount,
      headDim,
      contextLength,
      tiedEmbeddings: tied,
    },
    tokenEmbedding,
    positionEmbedding: `${prefix}wpe.weight`,
    blocks: Array.from({ length: blockCount }, (_, index) => block(index)),
    finalNorm: norm(`${prefix}ln_f`),
    outputHead: tied ? tokenEmbedding : 'lm_head.weight',
    // The causal mask, which old files store in every block, and a tied head stored twice.
    ignoredTensors: /\.attn\.(bias|masked_bias)$|^lm_head\.weight$/,
  };
}
