/** A Model made from a description: everything an architecture did not have to say. */
import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { TensorSource } from '../../formats/tensor.ts';
import type { AttentionLowering } from '../graph/attention.ts';
import { buildBlockGradient, buildBlockGraph, buildBlockLoss, buildBlockStep, buildNormGraph } from './block-graph.ts';
import { buildDecoderGraph } from './decoder-graph.ts';
import type { BlockDescription, DecoderDescription } from './description.ts';
import { blockOtherTensors, blockSites, checkTensors, otherTensors } from './expected-tensors.ts';
import { buildHeadGradient } from './head-gradient.ts';
import type {
  Block,
  BlockGradient,
  BlockGraph,
  BlockLoss,
  BlockStep,
  DecoderLowering,
  HeadGradient,
  HeadObjective,
  Model,
  ModelShape,
  NormGraph,
  RoutedSites,
} from './model.ts';

export class DecoderModel implements Model {
  readonly architecture: string;
  readonly config: Readonly<Record<string, unknown>>;
  readonly shape: ModelShape;
  readonly blocks: readonly Block[];
  readonly tokenEmbedding: string;
  readonly positionEmbedding?: string;
  readonly outputHead: string;
  readonly otherTensors: readonly string[];
  readonly unusedTensors: readonly string[];
  readonly #description: DecoderDescription;

  /** Compares the description with the checkpoint's headers. Throws FormatError `tensor-missing` or `tensor-shape`, or UnsupportedError. */
  constructor(
    architecture: string,
    config: Readonly<Record<string, unknown>>,
    description: DecoderDescription,
    source: TensorSource,
  ) {
    this.unusedTensors = checkTensors(description, source);
    this.architecture = architecture;
    this.config = config;
    this.shape = description.shape;
    this.blocks = description.blocks.map(summarizeBlock);
    this.tokenEmbedding = description.tokenEmbedding;
    if (description.positionEmbedding !== undefined) this.positionEmbedding = description.positionEmbedding;
    this.outputHead = description.outputHead;
    this.otherTensors = [...otherTensors(description).keys()];
    this.#description = description;
  }

  blockGraph(
    block: Block,
    positions: number = this.shape.contextLength,
    lowering?: AttentionLowering,
    routed?: RoutedSites,
  ): BlockGraph {
    return buildBlockGraph(this.#description, this.#description.blocks[block.index], positions, lowering, routed);
  }

  blockStep(block: Block, positions: number, routed?: RoutedSites): BlockStep {
    return buildBlockStep(this.#description, this.#description.blocks[block.index], positions, routed);
  }

  blockGradient(block: Block, size: { readonly batch: number; readonly sequence: number }, routed?: RoutedSites): BlockGradient {
    return buildBlockGradient(this.#description, this.#description.blocks[block.index], size, routed);
  }

  blockLoss(block: Block, size: { readonly batch: number; readonly sequence: number }): BlockLoss {
    return buildBlockLoss(this.#description, this.#description.blocks[block.index], size);
  }

  headGradient(rows: number, objective: HeadObjective): HeadGradient {
    return buildHeadGradient(this.#description, rows, objective);
  }

  finalNormGraph(): NormGraph {
    return buildNormGraph(this.#description);
  }

  decoderGraph(tensors: TensorSource, lowering: DecoderLowering = {}): OnnxModel {
    return buildDecoderGraph(this.#description, tensors, lowering);
  }
}

function summarizeBlock(block: BlockDescription, index: number): Block {
  const sites = blockSites(block);
  const { gate, up, down } = block.mlp;
  return {
    index,
    name: block.name,
    sites,
    inputs: [...new Set(sites.map((site) => site.input))],
    // A query head reads columns of one value head only, which no order brings to another group: attention has nothing to fold.
    folds: [{ input: down.input, producers: [...(gate ? [gate] : []), up].map(({ name }) => name) }],
    otherTensors: [...blockOtherTensors(block).keys()],
  };
}
