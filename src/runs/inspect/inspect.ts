/** `inspect`: what is in a model or an artifact: tensors, widths, sizes, and where the bytes went. Reads headers only. */
import type { ModuleStorage } from '../../artifacts/accounting.ts';
import { openModelSource } from '../../artifacts/model-source.ts';

export interface InspectedTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: number;
}

export interface InspectedModule {
  readonly name: string;
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly groupSize: number;
  /** Width of each group, in natural column order. */
  readonly bits: readonly number[];
  readonly averageBits: number;
  readonly bitsPerWeight: number;
  readonly bytes: number;
  /** Of a low-rank branch, whose bits are among the others; absent: it has none. */
  readonly rank?: number;
}

/** What a model or artifact holds. Sizes in bytes. */
export interface Inspection {
  readonly path: string;
  /** `float`, or the layout: `onnx`, `planes`, `gptq`. */
  readonly kind: string;
  readonly architecture: string;
  readonly averageBits: number;
  readonly bitsPerWeight: number;
  /** Weight files. */
  readonly bytes: number;
  readonly files: readonly { readonly path: string; readonly bytes: number }[];
  /** Bytes by kind; they add up to `bytes`. */
  readonly where: Readonly<Record<'linears' | 'embeddings' | 'other' | 'headers', number>>;
  /** Width -> groups that have it. */
  readonly widths: Readonly<Record<string, number>>;
  /** Quantized modules: linears of the blocks, then embeddings. */
  readonly modules: readonly InspectedModule[];
  /** Tensors as the files store them. */
  readonly tensors: readonly InspectedTensor[];
}

/** Reads the headers of the model or artifact at `path`. Throws FormatError, UnsupportedError, EnvironmentError FILE_UNREADABLE. */
export async function inspect(path: string): Promise<Inspection> {
  await using source = await openModelSource(path);
  const { model, storage, storedTensors } = source;
  const quantized = [...storage.modules, ...storage.embeddings];
  const tensors = storedTensors.map(({ name, dtype, shape, byteLength }) => ({ name, dtype, shape, bytes: byteLength }));

  const linearNames = new Set(
    model.blocks.flatMap((block) => block.sites.flatMap(({ name }) => [`${name}.weight`, `${name}.bias`])),
  );
  const embeddingNames = new Set([
    model.tokenEmbedding,
    model.outputHead,
    ...(model.positionEmbedding ? [model.positionEmbedding] : []),
  ]);
  const byName = (names: ReadonlySet<string>) => sum(tensors.filter(({ name }) => names.has(name)).map(({ bytes }) => bytes));
  const linears = sum(storage.modules.map(bytesOf)) + byName(linearNames);
  const embeddings = sum(storage.embeddings.map(bytesOf)) + byName(embeddingNames);
  const stored = sum(tensors.map(({ bytes }) => bytes));
  const widths = new Map<number, number>();
  for (const { bits } of quantized) for (const width of bits) widths.set(width, (widths.get(width) ?? 0) + 1);
  return {
    path,
    kind: source.kind,
    architecture: model.architecture,
    averageBits: storage.averageBits,
    bitsPerWeight: storage.bitsPerWeight,
    bytes: source.weightBytes,
    files: source.files.map((file) => ({ path: file.path, bytes: file.byteLength })),
    where: { linears, embeddings, other: stored - linears - embeddings, headers: source.weightBytes - stored },
    widths: Object.fromEntries([...widths].sort(([a], [b]) => a - b)),
    modules: quantized.map(describe),
    tensors,
  };
}

function describe(module: ModuleStorage): InspectedModule {
  const { name, outFeatures, inFeatures, groupSize, bits, codeBits, storedBits, lowRank } = module;
  const weights = outFeatures * inFeatures;
  return {
    name,
    outFeatures,
    inFeatures,
    groupSize,
    bits,
    averageBits: codeBits / weights,
    bitsPerWeight: storedBits / weights,
    bytes: storedBits / 8,
    ...(lowRank && { rank: lowRank.rank }),
  };
}

function bytesOf(module: ModuleStorage): number {
  return module.storedBits / 8;
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}
