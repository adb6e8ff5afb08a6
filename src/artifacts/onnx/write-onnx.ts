/** Writes the ONNX artifact: the decoder with its quantized linears, and what transformers.js and onnxruntime-genai want beside it. */
import { mkdir } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { OnnxModel } from '../../../formats/onnx/model.ts';
import { onnxByteLength, writeOnnx } from '../../../formats/onnx/writer.ts';
import type { TensorSource } from '../../../formats/tensor.ts';
import type { Model } from '../../model/model.ts';
import { codeBitsOf } from '../accounting.ts';
import { describeModules } from '../describe-modules.ts';
import { quantMetadata } from '../quant-metadata.ts';
import type { QuantizedSource } from '../quantized-source.ts';
import type { AccuracyLevel } from './linear-graph.ts';
import { QuantizedInitializers } from './linear-initializers.ts';
import type { OnnxStorageOptions } from './linear-layout.ts';
import { quantizedLowering } from './lowering.ts';

export interface OnnxModelOptions {
  readonly model: Model;
  /** The checkpoint: unquantized tensors are written as it stores them. */
  readonly tensors: TensorSource;
  readonly quantized: QuantizedSource;
  /** Version of pcomp, for the file's header. */
  readonly version: string;
  /** Default 4: what runs fast. */
  readonly accuracyLevel?: AccuracyLevel;
  readonly storage?: OnnxStorageOptions;
}

export interface OnnxArtifactOptions extends OnnxModelOptions {
  /** The artifact's folder. */
  readonly folder: string;
  /** Every data file stays shorter; default 2 GB. */
  readonly maxShardBytes?: number;
}

export interface WrittenOnnxArtifact {
  /** The .onnx file, below the artifact's folder: `onnx/model_q2.onnx`. */
  readonly modelFile: string;
  /** All weight files, below the artifact's folder. */
  readonly files: readonly { readonly name: string; readonly byteLength: number }[];
  /** `transformers.js_config.use_external_data_format`. */
  readonly externalDataFormat: Readonly<Record<string, number>>;
  readonly graph: OnnxModel;
}

/** transformers.js tells dtypes by the file's name: < 3 mean code bits `_q2`, < 8 `_q4`, 8 `_quantized`, float ''. */
export function suffixOf(averageBits: number | undefined): string {
  if (averageBits === undefined) return '';
  if (averageBits < 3) return '_q2';
  return averageBits < 8 ? '_q4' : '_quantized';
}

/** The decoder with its quantized linears, and the name of its file. Codes are read when it is written. */
async function onnxModel(options: OnnxModelOptions): Promise<{ readonly graph: OnnxModel; readonly fileName: string }> {
  const { model, tensors, quantized } = options;
  const modules = await describeModules(model, quantized);
  const initializers = await QuantizedInitializers.create(quantized, modules.keys(), options.storage);
  const lowering = quantizedLowering({ model, tensors, quantized: initializers, accuracyLevel: options.accuracyLevel ?? 4 });
  const graph = model.decoderGraph(tensors, lowering);
  graph.producerVersion = options.version;
  const sites = model.blocks.flatMap((block) => block.sites).filter((site) => modules.has(site.name));
  const groupSize = modules.get(sites[0]?.name ?? '')?.groupSize ?? 1;
  for (const [key, value] of quantMetadata('onnx', groupSize, modules)) graph.metadata.set(key, value);
  const weights = sites.reduce((sum, site) => sum + site.outFeatures * site.inFeatures, 0);
  const codeBits = sites.reduce(
    (sum, site) => sum + codeBitsOf({ ...modules.get(site.name)!, bits: modules.get(site.name)!.bits! }),
    0,
  );
  return { graph, fileName: `model${suffixOf(weights === 0 ? undefined : codeBits / weights)}.onnx` };
}

/** Bytes of the weight files that `writeOnnxArtifact` makes with the default bound on them. No codes are read. */
export async function onnxArtifactBytes(options: OnnxModelOptions): Promise<number> {
  const { graph, fileName } = await onnxModel(options);
  return onnxByteLength(graph, fileName);
}

/** Writes `onnx/model<suffix>.onnx` and its external data. Throws RecipeError when a group size cannot be an operand's, EnvironmentError DISK_FULL. */
export async function writeOnnxArtifact(options: OnnxArtifactOptions): Promise<WrittenOnnxArtifact> {
  const { folder } = options;
  const { graph, fileName } = await onnxModel(options);
  await mkdir(join(folder, 'onnx'), { recursive: true });
  const written = await writeOnnx(
    graph,
    join(folder, 'onnx'),
    fileName,
    options.maxShardBytes === undefined ? {} : { maxShardBytes: options.maxShardBytes },
  );
  const files = [written.model, ...written.data].map(({ path, byteLength }) => ({ name: `onnx/${basename(path)}`, byteLength }));
  const externalDataFormat = written.data.length > 0 ? { [fileName]: written.data.length } : {};
  return { modelFile: `onnx/${fileName}`, files, externalDataFormat, graph };
}
