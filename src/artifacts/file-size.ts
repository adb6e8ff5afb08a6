/** Bytes of an artifact's weight files before there is an artifact: its graph or its headers are laid out without data. */
import { onnxByteLength } from '../../formats/onnx/writer.ts';
import type { TensorSource } from '../../formats/tensor.ts';
import { GraphBuilder } from '../graph/builder.ts';
import { type SitePlan, TRANSFORMS, type TransformKind } from '../methods/quantize/quantizer.ts';
import type { LinearSite, Model } from '../model/model.ts';
import { freeInputs } from './folds.ts';
import type { PartBytes } from './layer-sizes.ts';
import { LinearRenderer } from './onnx/linear-graph.ts';
import { QuantizedInitializers } from './onnx/linear-initializers.ts';
import { type OnnxStorageOptions, operandBits, trueWidth } from './onnx/linear-layout.ts';
import { onnxArtifactBytes } from './onnx/write-onnx.ts';
import { plannedSource } from './planned-source.ts';
import type { ArtifactFormat } from './write-artifact.ts';
import { planesArtifactBytes } from './write-safetensors.ts';

/** How an artifact is to be written. */
export interface FileOptions {
  readonly model: Model;
  /** The checkpoint. */
  readonly tensors: TensorSource;
  /** `gptq` is counted as `safetensors`. */
  readonly format: ArtifactFormat;
  readonly storage: OnnxStorageOptions;
  /** Version of pcomp. */
  readonly version: string;
}

/** Bytes of all weight files, exact but where what is planned comes out otherwise: scales beyond float16, inputs that are sorted already. */
export function artifactBytes(
  { format, ...options }: FileOptions,
  plans: Iterable<readonly [LinearSite, SitePlan]>,
): Promise<number> {
  const sites = [...plans];
  const quantized = plannedSource(sites, freeInputs(options.model, new Set(sites.map(([{ name }]) => name))));
  return format === 'onnx' ? onnxArtifactBytes({ ...options, quantized }) : planesArtifactBytes({ ...options, quantized });
}

/** Digits that the offset of a constant may have beyond those in the small graph looked at. */
const CONSTANT_BYTES = 8;
/** The entry of one tensor in a safetensors header, but for its name. */
const ENTRY_BYTES = 100;
const SUFFIX_BYTES = 12;

/** About what widths cost in files, from above. @param names of the layers */
export async function partBytesOf(
  { format, storage }: Pick<FileOptions, 'format' | 'storage'>,
  names: readonly string[],
  widths: readonly number[],
): Promise<PartBytes> {
  const name = names.reduce((longest, one) => (one.length > longest.length ? one : longest), '');
  if (format !== 'onnx') {
    const entry = ENTRY_BYTES + SUFFIX_BYTES + name.length;
    const transforms = transformsBy(async (transform) => (transform === 'none' ? 0 : entry));
    return { order: 0, widths: { 1: entry, 2: entry }, transforms: await transforms };
  }
  const bytes: Record<number, number> = {};
  const { compact = true, container = 'auto' } = storage;
  // Beside what is there already: in one operand with it, or in an operand of its own.
  const joined = compact && container !== '2';
  for (const width of new Set(widths.map((each) => (compact ? trueWidth(each) : operandBits(each))))) {
    const other = width === 8 ? 4 : !joined ? 8 : width === 4 ? 3 : 4;
    const both = width > other ? [width, other] : [other, width];
    bytes[width] = (await linearBytes(name, both, storage)) - (await linearBytes(name, [other], storage));
  }
  const order = (await linearBytes(name, [2, 8], storage)) - (await linearBytes(name, [8, 2], storage));
  const plain = await linearBytes(name, [2], storage);
  const transforms = await transformsBy(async (transform) =>
    transform === 'none' ? 0 : (await linearBytes(name, [2], storage, transform)) - plain,
  );
  return { order, widths: bytes, transforms };
}

async function transformsBy(bytes: (transform: TransformKind) => Promise<number>): Promise<Record<TransformKind, number>> {
  const all: [TransformKind, number][] = [];
  for (const transform of TRANSFORMS) all.push([transform, await bytes(transform)]);
  return Object.fromEntries(all) as Record<TransformKind, number>;
}

/** Rows and columns of a group that make every constant too large to lie inside the graph, and leave no gaps. */
const ROWS = 1024;
const GROUP = 32;

/** A graph of one layer with groups of these widths, less its data. */
async function linearBytes(
  name: string,
  bits: readonly number[],
  storage: OnnxStorageOptions,
  transform: TransformKind = 'none',
): Promise<number> {
  const inFeatures = GROUP * bits.length;
  const site: LinearSite = { name, outFeatures: ROWS, inFeatures, hasBias: false, transposed: false, input: name };
  const source = plannedSource([[site, { groupSize: GROUP, bits, ...(transform !== 'none' && { transform }) }]]);
  const initializers = await QuantizedInitializers.create(source, [name], storage);
  const builder = new GraphBuilder('linear');
  const x = builder.input('x', 'F32', ['batch_size', 'sequence_length', inFeatures]);
  const layout = initializers.layouts.get(name)!;
  const y = builder.scope(name, () => new LinearRenderer(builder, 4).render(name, layout, initializers.of(name), x, null));
  builder.output('y', y);
  const model = builder.build();
  const constants = [...model.graph.initializers.values()];
  const data = constants.reduce((sum, { byteLength }) => sum + byteLength, 0);
  return (await onnxByteLength(model, 'model_q2.onnx')) - data + CONSTANT_BYTES * constants.length;
}
