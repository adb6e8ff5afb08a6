/**
 * What an architecture file says of a network, as plain data: names, sizes and choices. One renderer turns it into the
 * calibration graph of a block, the exported decoder, and the list of tensors the checkpoint must hold.
 */
import type { LinearSite, ModelShape } from './model.ts';
import type { RotaryFrequencies } from './rotary.ts';

/** How a hidden feature is bent inside the MLP. `gelu-tanh` is the tanh approximation that GPT-2 was trained with. */
export type Activation = 'silu' | 'gelu' | 'gelu-tanh' | 'relu';

/** A norm over the last axis; its tensors are `<name>.weight` and, for kind `layer`, `<name>.bias`. */
export interface NormDescription {
  readonly kind: 'rms' | 'layer';
  readonly name: string;
  readonly features: number;
  readonly epsilon: number;
}

export interface AttentionDescription {
  /** Three layers, or one whose output is q, k and v side by side. */
  readonly projections:
    | { readonly q: LinearSite; readonly k: LinearSite; readonly v: LinearSite }
    | { readonly fused: LinearSite };
  readonly output: LinearSite;
  /** Norms of each head of q and of k, applied before rotation. */
  readonly headNorms?: { readonly q: NormDescription; readonly k: NormDescription };
  /** Whether q and k are rotated by the model's frequencies. */
  readonly rotates: boolean;
  /** Tokens a query sees, itself included; all when absent. */
  readonly window?: number;
  /** Factor on the scores. */
  readonly scale: number;
}

/** `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate. */
export interface MlpDescription {
  readonly gate?: LinearSite;
  readonly up: LinearSite;
  readonly down: LinearSite;
  readonly activation: Activation;
}

/** `x + attention(norm(x))`, then `x + mlp(norm(x))`. All names inside begin with the block's. */
export interface BlockDescription {
  readonly name: string;
  readonly attentionNorm: NormDescription;
  /** Module name of the attention: `model.layers.0.self_attn`. */
  readonly attentionName: string;
  readonly attention: AttentionDescription;
  readonly mlpNorm: NormDescription;
  /** `model.layers.0.mlp` */
  readonly mlpName: string;
  readonly mlp: MlpDescription;
}

export interface DecoderDescription {
  readonly shape: ModelShape;
  /** Tensor (vocabSize, hiddenSize). */
  readonly tokenEmbedding: string;
  /** Tensor (contextLength, hiddenSize), when positions are learned. */
  readonly positionEmbedding?: string;
  /** Angles of rotating blocks. */
  readonly rotary?: RotaryFrequencies;
  readonly blocks: readonly BlockDescription[];
  readonly finalNorm: NormDescription;
  /** Tensor (vocabSize, hiddenSize); `tokenEmbedding` itself when tied. */
  readonly outputHead: string;
  /** Tensors that checkpoints carry besides, and that mean nothing: buffers, or a copy of a tied head. */
  readonly ignoredTensors: RegExp;
}
