/** From what the user names (a Hugging Face folder, a bare checkpoint, an artifact of ours) to a model and its weights. */
import { readdir, readFile, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { bitsPerElement } from '../../formats/dtype.ts';
import { type OnnxFile, openOnnx } from '../../formats/onnx/reader.ts';
import type { TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { EnvironmentError, FormatError, RecipeError } from '../errors.ts';
import { createModel } from '../model/architectures/index.ts';
import type { LinearSite, Model, WeightReader } from '../model/model.ts';
import { type Storage, summarizeStorage } from './accounting.ts';
import { DecodedSource } from './decoded-source.ts';
import type { ColumnFold } from './folds.ts';
import { FOLDS_FILE, readFolds } from './folds-file.ts';
import type { GptqFormat } from './gptq.ts';
import { OnnxTensors, onnxModules } from './onnx/onnx-modules.ts';
import { errorCode } from './process-lock.ts';
import { type LayoutName, layoutOf } from './quant-metadata.ts';
import { SourceWeights } from './source-weights.ts';
import { storageOfModules } from './storage-of-modules.ts';
import { gptqModules, planesModules, type StoredModules } from './stored-modules.ts';

/** An open model. Weights can be read until it is disposed. */
export interface ModelSource extends AsyncDisposable {
  /** As the user named it; used in messages. */
  readonly path: string;
  readonly kind: 'float' | LayoutName;
  /** Where config.json and the tokenizer are. */
  readonly folder: string;
  readonly configPath: string;
  /** config.json as it was read. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly model: Model;
  /** Float32 weights; quantized ones are decoded. */
  readonly weights: WeightReader;
  /** Tensors under their checkpoint names; quantized modules appear as float32 weights. */
  readonly tensors: TensorSource;
  /** Tensors as the files store them. */
  readonly storedTensors: readonly TensorInfo[];
  /** Weight files: shards and index, or the .onnx file and its data. */
  readonly files: readonly { readonly path: string; readonly byteLength: number }[];
  /** Size of the weight files. */
  readonly weightBytes: number;
  /** Rows and columns that the files have in another order than the original; weights and tensors here do not. */
  readonly folds: readonly ColumnFold[];
  /** A layer whose rows or columns lie in an order that nothing tells, so that they do here too; absent: there is none. */
  readonly unknownFold?: string;
  /** What the quantized modules cost, in the layout that was opened. */
  readonly storage: Storage;
  /** The ONNX model, when there is one to run. */
  readonly onnxPath?: string;
}

/** Throws RecipeError for a model whose layers do not have the rows and columns of the original, told or not. */
export function assertNaturalOrder({ path, folder, unknownFold }: ModelSource, flag: string): void {
  if (unknownFold === undefined) return;
  throw new RecipeError(
    `${flag} ${path}: "${unknownFold}" reads its columns in an order of its own, and the ${FOLDS_FILE} that tells it is not in ${folder}`,
  );
}

/**
 * Opens a model. An artifact that holds an ONNX model and a checkpoint is opened by its ONNX model. Throws FormatError, UnsupportedError,
 * RecipeError (no weights), EnvironmentError FILE_UNREADABLE.
 */
export async function openModelSource(path: string): Promise<ModelSource> {
  const folder = (await isFolder(path)) ? path : dirname(path);
  const configPath = join(folder, 'config.json');
  const config = await readConfig(configPath);
  const onnxPath = folder === path ? await findOnnx(folder) : undefined;
  const opened = onnxPath === undefined ? await openStored(path, configPath, config) : await openOnnxArtifact(onnxPath);
  try {
    return await describe(opened, { path, folder, configPath, config, ...(onnxPath === undefined ? {} : { onnxPath }) });
  } catch (error) {
    await opened.tensors.close();
    throw error;
  }
}

/** Tensors as stored, and the quantized modules among them. */
interface Opened {
  readonly tensors: TensorSource;
  readonly modules?: StoredModules;
}

type Place = Pick<ModelSource, 'path' | 'folder' | 'configPath' | 'config' | 'onnxPath'>;

async function describe({ tensors: stored, modules }: Opened, place: Place): Promise<ModelSource> {
  const { folds, unknown } = modules ? await readFolds(place.folder, modules.modules) : { folds: [] };
  const tensors = modules ? new DecodedSource(stored, modules, folds) : stored;
  // The layouts pcomp decodes look like float checkpoints from here on; any other quantization is refused by createModel.
  const { quantization_config: _, ...floatConfig } = place.config;
  const model = createModel(modules ? floatConfig : place.config, place.configPath, tensors);
  return {
    ...place,
    kind: modules?.layout ?? 'float',
    model,
    weights: new SourceWeights(tensors),
    tensors,
    storedTensors: [...stored.tensors.values()],
    files: tensors.files,
    folds,
    ...(unknown !== undefined && { unknownFold: unknown }),
    weightBytes: tensors.files.reduce((sum, file) => sum + file.byteLength, 0),
    storage: await storageOf(model, tensors, modules),
    [Symbol.asyncDispose]: () => tensors.close(),
  };
}

async function storageOf(model: Model, tensors: TensorSource, modules: StoredModules | undefined): Promise<Storage> {
  const floatBits = meanFloatBits(
    model.blocks.flatMap((block) => block.sites),
    tensors,
  );
  return modules ? storageOfModules(model, modules, floatBits) : summarizeStorage([], [], floatBits);
}

/** Mean width of the sites' weights as the checkpoint has them. */
function meanFloatBits(sites: readonly LinearSite[], tensors: TensorSource): number {
  let bits = 0;
  let weights = 0;
  for (const { name, outFeatures, inFeatures } of sites) {
    weights += outFeatures * inFeatures;
    bits += outFeatures * inFeatures * bitsPerElement(tensors.tensors.get(`${name}.weight`)!.dtype);
  }
  return bits / weights;
}

async function openStored(path: string, configPath: string, config: Readonly<Record<string, unknown>>): Promise<Opened> {
  const tensors = await openCheckpoint(path);
  try {
    const files = 'shards' in tensors ? (tensors.shards as readonly TensorSource[]) : [tensors];
    const layout = layoutOf(files[0].path, files[0].metadata);
    if (layout === 'planes') return { tensors, modules: planesModules(files) };
    if (layout === 'gptq') return { tensors, modules: gptqModules(files, gptqFormatOf(configPath, config)) };
    return { tensors };
  } catch (error) {
    await tensors.close();
    throw error;
  }
}

async function openOnnxArtifact(path: string): Promise<Opened> {
  const file: OnnxFile = await openOnnx(path);
  try {
    return { tensors: new OnnxTensors(file), modules: await onnxModules(file) };
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** The ONNX model of an artifact that pcomp wrote. Other folders may have some too (exports of others): theirs are not ours to read. */
async function findOnnx(folder: string): Promise<string | undefined> {
  if (!(await entriesOf(folder)).includes('pcomp.json')) return undefined;
  const names = (await entriesOf(join(folder, 'onnx'))).filter((name) => name.endsWith('.onnx')).sort();
  return names.length === 0 ? undefined : join(folder, 'onnx', names[0]);
}

function gptqFormatOf(configPath: string, config: Readonly<Record<string, unknown>>): GptqFormat {
  const quantization = config['quantization_config'];
  const format =
    typeof quantization === 'object' && quantization !== null && 'checkpoint_format' in quantization
      ? quantization.checkpoint_format
      : undefined;
  if (format === 'gptq' || format === 'gptq_v2') return format;
  throw new FormatError(
    configPath,
    'gptq-checkpoint-format',
    `"quantization_config.checkpoint_format" is ${JSON.stringify(format)}, it must be "gptq" or "gptq_v2"`,
  );
}

async function readConfig(path: string): Promise<Readonly<Record<string, unknown>>> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw new EnvironmentError(
      'FILE_UNREADABLE',
      `${path}: cannot be read (${errorCode(error)}); a model needs its config.json beside its weights`,
      { cause: error },
    );
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FormatError(path, 'config-not-json', `not JSON: ${(error as Error).message}`, { cause: error });
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  throw new FormatError(path, 'config-not-an-object', 'the configuration must be a JSON object');
}

async function isFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory();
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be read (${errorCode(error)})`, { cause: error });
  }
}

async function entriesOf(folder: string): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(errorCode(error))) return [];
    throw error;
  }
}
