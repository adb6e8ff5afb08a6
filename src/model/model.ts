/** A network as pcomp sees it: blocks in order, and in each block the linear layers ("sites") that may be compressed. */
import type { TensorInfo } from '../../formats/tensor.ts';

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

/** One decoder layer. */
export interface Block {
  readonly index: number;
  /** `model.layers.0` */
  readonly name: string;
  readonly sites: readonly LinearSite[];
  /** Distinct inputs in the order the forward pass produces them: the stages of a true-sequential run. */
  readonly inputs: readonly string[];
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
}
