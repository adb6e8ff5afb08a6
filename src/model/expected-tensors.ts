/** What a checkpoint must hold for a described network, compared with what its headers say. */
import type { DType, TensorSource } from '../../formats/tensor.ts';
import { FormatError, UnsupportedError } from '../errors.ts';
import type { BlockDescription, DecoderDescription, NormDescription } from './description.ts';
import type { LinearSite } from './model.ts';

export type Shape = readonly number[];

const WEIGHT_DTYPES: readonly DType[] = ['F32', 'F16', 'BF16', 'F64'];
/** Missing tensors listed by name before the rest is counted. */
const LISTED = 4;

/** Sites of a block in the order the forward pass meets them. */
export function blockSites(block: BlockDescription): LinearSite[] {
  const { projections, output } = block.attention;
  const { gate, up, down } = block.mlp;
  const first = 'fused' in projections ? [projections.fused] : [projections.q, projections.k, projections.v];
  return [...first, output, ...(gate ? [gate] : []), up, down];
}

/** A block's tensors besides its sites', with their shapes. */
export function blockOtherTensors(block: BlockDescription): Map<string, Shape> {
  const { headNorms } = block.attention;
  const norms = [block.attentionNorm, ...(headNorms ? [headNorms.q, headNorms.k] : []), block.mlpNorm];
  return new Map(norms.flatMap(normTensors));
}

/** Every tensor of the network besides its sites', with their shapes. */
export function otherTensors(description: DecoderDescription): Map<string, Shape> {
  const { vocabSize, hiddenSize, contextLength } = description.shape;
  const { tokenEmbedding, positionEmbedding, outputHead } = description;
  return new Map<string, Shape>([
    [tokenEmbedding, [vocabSize, hiddenSize]],
    ...(positionEmbedding ? ([[positionEmbedding, [contextLength, hiddenSize]]] as const) : []),
    ...description.blocks.flatMap((block) => [...blockOtherTensors(block)]),
    ...normTensors(description.finalNorm),
    [outputHead, [vocabSize, hiddenSize]],
  ]);
}

/** Checks presence, shape and dtype of every tensor; returns the names of those the network has no use for. */
export function checkTensors(description: DecoderDescription, source: TensorSource): string[] {
  const expected = otherTensors(description);
  for (const site of description.blocks.flatMap(blockSites)) {
    const { outFeatures, inFeatures, transposed } = site;
    expected.set(`${site.name}.weight`, transposed ? [inFeatures, outFeatures] : [outFeatures, inFeatures]);
    if (site.hasBias) expected.set(`${site.name}.bias`, [outFeatures]);
  }
  const missing = [...expected.keys()].filter((name) => !source.tensors.has(name));
  if (missing.length > 0) {
    const more = missing.length > LISTED ? ` and ${missing.length - LISTED} more` : '';
    const names = missing.slice(0, LISTED).map((name) => `"${name}"`);
    throw new FormatError(
      source.path,
      'tensor-missing',
      `${missing.length} of the ${expected.size} tensors that config.json asks for are missing: ${names.join(', ')}${more}`,
    );
  }
  for (const [name, shape] of expected) {
    const info = source.tensors.get(name)!;
    if (info.shape.join() !== shape.join()) {
      throw new FormatError(
        source.path,
        'tensor-shape',
        `tensor "${name}" has shape [${info.shape.join(', ')}], but config.json asks for [${shape.join(', ')}]`,
      );
    }
    if (!WEIGHT_DTYPES.includes(info.dtype)) {
      throw new UnsupportedError(`${source.path}: tensor "${name}" is ${info.dtype}; weights may be ${WEIGHT_DTYPES.join(', ')}`);
    }
  }
  return [...source.tensors.keys()].filter((name) => !expected.has(name) && !description.ignoredTensors.test(name));
}

/** Tensors of a norm, with their shapes. */
export function normTensors(norm: NormDescription): [string, Shape][] {
  const weight: [string, Shape] = [`${norm.name}.weight`, [norm.features]];
  return norm.kind === 'layer' ? [weight, [`${norm.name}.bias`, [norm.features]]] : [weight];
}
