/** Writes a whole artifact into its folder from a run's parts: every format asked for, configuration, tokenizer; and reads it back. */
import { join } from 'node:path';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { openOnnx } from '../../formats/onnx/reader.ts';
import type { TensorSource } from '../../formats/tensor.ts';
import type { Storage } from './accounting.ts';
import { copyModelFiles } from './copied-files.ts';
import { CorrectedSource } from './corrected-source.ts';
import { embeddingModules } from './describe-modules.ts';
import { explainDiskError } from './durable.ts';
import { type ColumnFold, FoldedSource, findFolds, rowOrders, unfolded } from './folds.ts';
import { writeFolds } from './folds-file.ts';
import { readGenerationConfig } from './generation-config.ts';
import { whyNotGptq } from './gptq.ts';
import { gptqLoaders } from './gptq-config.ts';
import { writeJson } from './manifest.ts';
import type { ModelSource } from './model-source.ts';
import { genaiConfig } from './onnx/genai-config.ts';
import type { OnnxStorageOptions } from './onnx/linear-layout.ts';
import { OnnxTensors, onnxModules } from './onnx/onnx-modules.ts';
import { type WrittenOnnxArtifact, writeOnnxArtifact } from './onnx/write-onnx.ts';
import { shapeOfGrid } from './planes.ts';
import type { LayoutName } from './quant-metadata.ts';
import type { QuantizedSource } from './quantized-source.ts';
import { storageOfModules } from './storage-of-modules.ts';
import { gptqModules, planesModules, type StoredModules } from './stored-modules.ts';
import { solvedHashes, verifyModules } from './verify.ts';
import { writeGptq, writePlanes } from './write-safetensors.ts';

/** `safetensors` is the layout `planes`. */
export type ArtifactFormat = 'onnx' | 'safetensors' | 'gptq';

export interface WriteOptions {
  /** The float model. */
  readonly source: ModelSource;
  readonly quantized: QuantizedSource;
  /** The artifact's folder: exists and is empty. */
  readonly folder: string;
  readonly formats: readonly ArtifactFormat[];
  /** Version of pcomp. */
  readonly version: string;
  /** Bound on each weight file; default 2 GB for ONNX data, 5 GB for safetensors. */
  readonly maxShardBytes?: number;
  /** How an ONNX file stores codes. */
  readonly onnxStorage?: OnnxStorageOptions;
}

/** One format as it was written. */
export interface WrittenFormat {
  readonly layout: LayoutName;
  /** Weight files, by their path below the folder. */
  readonly files: readonly string[];
  readonly weightBytes: number;
  readonly storage: Storage;
}

export interface WrittenArtifact {
  readonly formats: readonly WrittenFormat[];
  /** SHA-256 of each quantized module's decoded float32 weight. */
  readonly weights: Readonly<Record<string, string>>;
  /** What the user should know: who loads it, what was left out. */
  readonly notes: readonly string[];
}

/** Writes and verifies. Throws RecipeError when a format cannot hold the model, EnvironmentError DISK_FULL. */
export async function writeArtifact(options: WriteOptions): Promise<WrittenArtifact> {
  try {
    return await write(options);
  } catch (error) {
    throw explainDiskError(error, options.folder);
  }
}

async function write({
  source,
  quantized,
  folder,
  formats,
  version,
  maxShardBytes,
  onnxStorage,
}: WriteOptions): Promise<WrittenArtifact> {
  const { model } = source;
  const notes: string[] = [];
  const names = [...model.blocks.flatMap((block) => block.sites.map((site) => site.name)), ...embeddingModules(model)];
  const expected = await solvedHashes(
    quantized,
    names.filter((name) => quantized.has(name)),
  );
  const all = await findFolds(model, quantized);
  const written: WrittenFormat[] = [];
  const shards = maxShardBytes === undefined ? {} : { maxShardBytes };
  const changes: Record<string, unknown> = {};
  /** What a layout holds, given the folds it can have. */
  const foldedBy = async (folds: readonly ColumnFold[]) => {
    const folded = new FoldedSource(quantized, folds);
    return { folds, quantized: folded, tensors: await CorrectedSource.create(source.tensors, folded, names, rowOrders(folds)) };
  };
  const finish = async (
    opened: TensorSource,
    stored: StoredModules,
    files: readonly string[],
    folds: readonly ColumnFold[],
  ): Promise<WrittenFormat> => {
    await verifyModules(opened.path, unfolded(stored, folds), expected);
    const weightBytes = opened.files.reduce((sum, file) => sum + file.byteLength, 0);
    return { layout: stored.layout, files, weightBytes, storage: await storageOfModules(model, stored) };
  };
  let onnx: WrittenOnnxArtifact | undefined;
  for (const format of formats) {
    if (format === 'onnx') {
      onnx = await writeOnnxArtifact({
        ...{ model, ...(await foldedBy(all)), folder, version, ...shards },
        ...(onnxStorage && { storage: onnxStorage }),
      });
      written.push(await checkOnnx(folder, onnx, (opened, stored, files) => finish(opened, stored, files, all)));
      changes['transformers.js_config'] = transformersJsConfig(source.config, onnx);
      continue;
    }
    if (format === 'safetensors') {
      const files = await writePlanes({ model, ...(await foldedBy(all)), folder, ...shards });
      await using opened = await openCheckpoint(folder);
      const one = await finish(opened, planesModules(shardsOf(opened)), files, all);
      written.push(one);
      changes['quantization_config'] = planesConfig(one.storage);
      continue;
    }
    const folds = await findFolds(model, quantized, (grid) => whyNotGptq(shapeOfGrid(grid)) === undefined);
    const { files, config, left } = await writeGptq({ model, ...(await foldedBy(folds)), folder, ...shards });
    for (const [name, why] of left) notes.push(`gptq: ${name} stays in float, it ${why}`);
    notes.push(...gptqLoaders(config).map((line) => `gptq: ${line}`));
    await using opened = await openCheckpoint(folder);
    written.push(await finish(opened, gptqModules(shardsOf(opened), config.checkpoint_format), files, folds));
    changes['quantization_config'] = config;
    await writeJson(join(folder, 'quantize_config.json'), config);
  }
  await writeFolds(folder, all);
  await writeJson(join(folder, 'config.json'), { ...source.config, ...changes });
  await copyModelFiles(source.folder, folder);
  const generation = await readGenerationConfig(source);
  await writeJson(join(folder, 'generation_config.json'), generation);
  if (onnx) {
    const genai = genaiConfig(model, onnx.graph, onnx.modelFile, generation);
    if (genai) await writeJson(join(folder, 'genai_config.json'), genai);
    else notes.push(`onnxruntime-genai does not know ${model.architecture}: no genai_config.json was written`);
  }
  return { formats: written, weights: Object.fromEntries(expected), notes };
}

type Finish = (opened: TensorSource, stored: StoredModules, files: readonly string[]) => Promise<WrittenFormat>;

async function checkOnnx(folder: string, onnx: WrittenOnnxArtifact, finish: Finish): Promise<WrittenFormat> {
  await using file = await openOnnx(join(folder, ...onnx.modelFile.split('/')));
  const stored = await onnxModules(file);
  return await finish(
    new OnnxTensors(file),
    stored,
    onnx.files.map(({ name }) => name),
  );
}

function shardsOf(source: TensorSource): readonly TensorSource[] {
  return 'shards' in source ? (source.shards as readonly TensorSource[]) : [source];
}

function transformersJsConfig(config: Readonly<Record<string, unknown>>, onnx: WrittenOnnxArtifact): Record<string, unknown> {
  const given = config['transformers.js_config'];
  const kept = typeof given === 'object' && given !== null ? given : {};
  // What the source said of its own ONNX files does not hold for ours.
  return { ...kept, use_external_data_format: onnx.externalDataFormat };
}

/** Makes readers that do not know the layout refuse it, instead of misreading it. */
function planesConfig({ modules, averageBits, bitsPerWeight }: Storage): Record<string, unknown> {
  const sizes = [...new Set(modules.map(({ groupSize }) => groupSize))].sort((a, b) => a - b);
  const groupSize = sizes.length > 1 ? sizes : sizes[0];
  return { quant_method: 'pcomp-planes', version: 1, group_size: groupSize, bits: averageBits, bpw: bitsPerWeight };
}
