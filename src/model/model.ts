/** A network as pcomp sees it: blocks in order, and in each block the linear layers ("sites") that may be compressed. */
import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { TensorInfo, TensorSource } from '../../formats/tensor.ts';
import type { AttentionLowering } from '../graph/attention.ts';
import type { GraphBuilder, Value } from '../graph/builder.ts';
import type { RoutedShape } from '../graph/routed-branch.ts';

/** One linear layer's place in a network: `y = x W^T + b`, W is (outFeatures, inFeatures). */
export interface LinearSite {
  /** Module name, `model.layers.0.self_attn.q_proj`; its tensors are `<name>.weight` and, if any, `<name>.bias`. */
  readonly name: string;
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly hasBias: boolean;
  /** The checkpoint stores W as (inFeatures, outFeatures), as GPT-2's Conv1D does. */
  readonly transposed: boolean;
  /** Name of the activation that feeds it, unique in the model; sites with the same input share Hessian and permutation. */
  readonly input: string;
}

/** An input whose columns may lie in any order: they are rows of the layers before it, with nothing but element-wise functions between. */
export interface Fold {
  readonly input: string;
  /** Names of the sites whose rows they are. */
  readonly producers: readonly string[];
}

/** One decoder layer. */
export interface Block {
  readonly index: number;
  /** `model.layers.0` */
  readonly name: string;
  readonly sites: readonly LinearSite[];
  /** Distinct inputs in the order the forward pass produces them: the stages of a true-sequential run. */
  readonly inputs: readonly string[];
  readonly folds: readonly Fold[];
  /** Checkpoint names of the block's other tensors (norm weights and biases). */
  readonly otherTensors: readonly string[];
}

/** What every architecture says of itself, independent of its family. */
export interface ModelShape {
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly blockCount: number;
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  /** Longest sequence the model was trained for. */
  readonly contextLength: number;
  readonly tiedEmbeddings: boolean;
}

/** Reads float32 tensors by their checkpoint name, in the checkpoint's own layout. */
export interface WeightReader {
  /** Whole tensor as float32. */
  load(name: string): Promise<Float32Array>;
  /** Rows [start, end) of the first axis as float32. */
  loadRows(name: string, start: number, end: number): Promise<Float32Array>;
  /** W of a site as (outFeatures, inFeatures) float32, whatever the file's layout or encoding. */
  loadSite(site: LinearSite): Promise<Float32Array>;
  /** Header of a stored tensor, or undefined when absent. */
  info(name: string): TensorInfo | undefined;
  /** Experts beside a site, whose tensors `load` gives as `<site>.router`, `<site>.expertsA` and `<site>.expertsB` (routed-branch.ts). */
  routed?(site: LinearSite): RoutedShape | undefined;
}

/** Which sites have experts beside them: what a WeightReader says. */
export type RoutedSites = (site: LinearSite) => RoutedShape | undefined;

/** A block's calibration graph. Weights are graph inputs, so that one compiled program serves every block of the same make. */
export interface BlockGraph {
  /**
   * Inputs `hidden` F32 (batch, sequence, hiddenSize) and `lengths` I32 (batch): real tokens of each right-padded row; then the
   * weights. Outputs `hidden_out` and `middle`, the residual stream between attention and MLP (batch, sequence, hiddenSize), and one
   * (batch, sequence, features) per site input.
   */
  readonly model: OnnxModel;
  /** Equal keys mean equal graphs: the engine compiles once. */
  readonly key: string;
  /** Graph input -> the site whose W (outFeatures, inFeatures) it takes, or the checkpoint name of the tensor it takes. */
  readonly weights: ReadonlyMap<string, LinearSite | string>;
  /** `LinearSite.input` -> graph output that shows it. */
  readonly siteInputs: ReadonlyMap<string, string>;
  /** `LinearSite.input` -> the residual stream beside it, graph input or output: the rest of the block needs these two and `lengths`. */
  readonly residuals: ReadonlyMap<string, string>;
}

/** A block that goes on from a cache: for models that write. Rows may be of different lengths. */
export interface BlockStep {
  /**
   * Inputs `hidden` F32 (batch, sequence, hiddenSize); `query_positions` I64 (batch, sequence), where each token stands in its row;
   * `key_positions` I64 (batch, past + sequence), the same of everything in the cache, the call's tokens last, -1 for what is no token;
   * `past_key` and `past_value` F32 (batch, kvHeadCount, past, headDim); the weights. Outputs `hidden_out` (batch, sequence, hiddenSize),
   * `present_key` and `present_value` (batch, kvHeadCount, past + sequence, headDim).
   */
  readonly model: OnnxModel;
  readonly key: string;
  /** As BlockGraph.weights. */
  readonly weights: ReadonlyMap<string, LinearSite | string>;
}

/** What a block does to cotangents, for batches of one size; the forward pass is made again inside. */
export interface BlockGradient {
  /**
   * Inputs `hidden` and `lengths` as a BlockGraph, `cotangent` of the block's output (batch, sequence, hiddenSize), and the weights. Outputs
   * `hidden_cotangent` (batch, sequence, hiddenSize), and the gradient of every site's W (outFeatures, inFeatures), or of the tensors of its experts.
   * Where experts are picked, also an input `balance` (1), the cotangent of how evenly, and an output `balance_loss` (1).
   */
  readonly model: OnnxModel;
  readonly key: string;
  /** As BlockGraph.weights. */
  readonly weights: ReadonlyMap<string, LinearSite | string>;
  /** Site name -> the output that is the gradient of its W; sites with experts have none. */
  readonly sites: ReadonlyMap<string, string>;
  /** Tensor of experts -> the output that is its gradient. */
  readonly experts: ReadonlyMap<string, string>;
}

/** How far a block's output is from what it should be, and what its weights have to do with it; for batches of one size. */
export interface BlockLoss {
  /**
   * Inputs `hidden` and `lengths` as a BlockGraph, `target` of the output (batch, sequence, hiddenSize), `weight` of each row (batch,
   * sequence, 1), 0 for pads, and the weights. Outputs `loss`, the weighted sum of squared differences (1), and its gradient by every site's
   * W (outFeatures, inFeatures).
   */
  readonly model: OnnxModel;
  readonly key: string;
  /** As BlockGraph.weights. */
  readonly weights: ReadonlyMap<string, LinearSite | string>;
  /** Site name -> the output that is its gradient. */
  readonly sites: ReadonlyMap<string, string>;
}

/**
 * What a row of logits z loses, in nats; q is softmax(z).
 * - `divergence`: `T^2 KL(softmax(teacher / T) || softmax(z / T))`, of an input `teacher` (rows, vocabSize)
 * - `label`: `-log q[label]`, of an input `label` (rows, 1), tokens as float32
 * - `entropy`: `-sum q log q`
 */
export type HeadObjective =
  | { readonly kind: 'divergence'; readonly temperature: number }
  | { readonly kind: 'label' }
  | { readonly kind: 'entropy' };

/** The loss of the logits, and what it does to the hidden states after the last block. */
export interface HeadGradient {
  /**
   * Inputs `hidden` (rows, hiddenSize), `head` (vocabSize, hiddenSize), `weight` of each row (rows, 1), those of the objective
   * and the norm's tensors. Outputs `loss`, the weighted sum over rows in nats (1), and `hidden_cotangent` (rows, hiddenSize).
   */
  readonly model: OnnxModel;
  readonly key: string;
  /** Graph input -> checkpoint tensor name, of the norm. */
  readonly weights: ReadonlyMap<string, string>;
}

/** A graph applied to hidden states after the last block: `hidden` (rows, hiddenSize) -> `hidden_out`. */
export interface NormGraph {
  readonly model: OnnxModel;
  readonly key: string;
  /** Graph input -> checkpoint tensor name. */
  readonly weights: ReadonlyMap<string, string>;
}

/** How the exporter renders the parts whose storage differs between artifacts. Defaults render plain float tensors. */
export interface DecoderLowering {
  /** The linear layer `site` applied to `x` (batch, sequence, inFeatures). Return undefined for the plain float rendering. */
  readonly linear?: (builder: GraphBuilder, site: LinearSite, x: Value) => Value | undefined;
  /** Token embedding: ids I64 (batch, sequence) -> (batch, sequence, hiddenSize) F32. */
  readonly embedding?: (builder: GraphBuilder, ids: Value) => Value | undefined;
  /** Output head: (batch, sequence, hiddenSize) -> logits (batch, sequence, vocabSize) F32. */
  readonly head?: (builder: GraphBuilder, hidden: Value) => Value | undefined;
}

/** A loaded network: its shape, its sites, and the graphs that compute it. Holds no weights. */
export interface Model {
  /** `LlamaForCausalLM` */
  readonly architecture: string;
  /** config.json as it was read. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly shape: ModelShape;
  readonly blocks: readonly Block[];
  /** Checkpoint tensor of the token embedding, (vocabSize, hiddenSize). */
  readonly tokenEmbedding: string;
  /** Checkpoint tensor of learned positions, (positions, hiddenSize), added to the token embedding. */
  readonly positionEmbedding?: string;
  /** Checkpoint tensor of the output head, (vocabSize, hiddenSize); the token embedding itself when tied. */
  readonly outputHead: string;
  /** Every checkpoint tensor the model uses besides sites' weights and biases: embeddings, norms, head. */
  readonly otherTensors: readonly string[];
  /** Checkpoint tensors the architecture has no use for, known buffers aside: a reason to warn. */
  readonly unusedTensors: readonly string[];
  /**
   * @param positions tokens of the longest sequence it will run on; default: the whole context
   * @param lowering how attention is computed; default: what is fastest on the CPU
   */
  blockGraph(block: Block, positions?: number, lowering?: AttentionLowering, routed?: RoutedSites): BlockGraph;
  /** @param positions tokens of the longest row that it will run on */
  blockStep(block: Block, positions: number, routed?: RoutedSites): BlockStep;
  /** The derivative of a block for batches of `batch` rows of `sequence` tokens. */
  blockGradient(block: Block, size: { readonly batch: number; readonly sequence: number }, routed?: RoutedSites): BlockGradient;
  /** The loss of a block's output and its derivative, for batches of `batch` rows of `sequence` tokens. */
  blockLoss(block: Block, size: { readonly batch: number; readonly sequence: number }): BlockLoss;
  /** The loss at the output head and its derivative, for pieces of `rows` rows. */
  headGradient(rows: number, objective: HeadObjective): HeadGradient;
  finalNormGraph(): NormGraph;
  /**
   * The whole decoder for runtimes: input_ids, attention_mask, past_key_values.* -> logits, present.* (onnx-runtime spec, section 7).
   * `tensors` yields the stored bytes of unquantized tensors: 16-bit ones stay 16-bit with a Cast at load.
   */
  decoderGraph(tensors: TensorSource, lowering?: DecoderLowering): OnnxModel;
}
