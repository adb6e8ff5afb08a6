/** What a run will cost, before it starts: for --dry-run and for the first line of a report. */
import {
  codeBitsOf,
  gptqStoredBits,
  lowRankBits,
  type ModuleStorage,
  onnxStorage,
  planesStoredBits,
  type Storage,
  summarizeStorage,
} from '../../artifacts/accounting.ts';
import { freeInputs } from '../../artifacts/folds.ts';
import { whyNotGptq } from '../../artifacts/gptq.ts';
import type { ModelSource } from '../../artifacts/model-source.ts';
import { layOutShape, type OnnxLinearLayout, type OnnxStorageOptions } from '../../artifacts/onnx/linear-layout.ts';
import type { ArtifactFormat } from '../../artifacts/write-artifact.ts';
import { shapeOfKind } from '../../methods/quantize/best/prepared-input.ts';
import { factorStorage } from '../../methods/quantize/low-rank.ts';
import type { Measuring, SitePlan } from '../../methods/quantize/quantizer.ts';
import type { LinearSite, Model } from '../../model/model.ts';

export interface MemoryEstimateOptions {
  /** Absent for a method that reads no text. */
  readonly measuring: Measuring | undefined;
  readonly selected: ReadonlySet<string>;
  readonly tokens: number;
  /** Bound on buffered activations. */
  readonly maxMemory: number;
  /** Whether low-rank branches are made. */
  readonly branches?: boolean;
}

const RUNTIME_BYTES = 250e6;
const BATCH_TOKENS = 2048;

/** Peak memory of a quantize run in bytes, from the largest block: an estimate, within about a third of what is measured. */
export function estimatePeakBytes(model: Model, options: MemoryEstimateOptions): number {
  const { hiddenSize } = model.shape;
  const { measuring } = options;
  const models = measuring?.drift ? 2 : 1;
  let peak = 0;
  for (const block of model.blocks) {
    const sites = block.sites.filter((site) => options.selected.has(site.name));
    const weights = sum(block.sites.map(({ inFeatures, outFeatures }) => 4 * inFeatures * outFeatures));
    const largest = Math.max(0, ...sites.map(({ inFeatures, outFeatures }) => inFeatures * outFeatures));
    // A site at work: W twice in float32, its transpose, codes; with a target of its own, that too and what it is corrected by.
    // A branch is made of the error, its product with H, and the eigenvectors of the smaller side.
    const work = ((measuring?.drift ? 25 : 13) + (options.branches ? 24 : 0)) * largest;
    if (!measuring) {
      peak = Math.max(peak, work);
      continue;
    }
    const features = [...new Map(sites.map((site) => [site.input, site.inFeatures])).values()];
    const widest = Math.max(0, ...features);
    const square = widest * widest;
    const hessians = measuring.sequential ? 8 * square : sum(features.map((n) => 8 * n * n));
    const drift = measuring.drift ? 8 * square : 0;
    const batch = 4 * models * BATCH_TOKENS * (sum(features) + 2 * hiddenSize);
    const factor = 12 * square;
    peak = Math.max(peak, Math.max(models * weights + hessians + drift / 2 + batch, hessians + drift + factor + work + batch));
  }
  if (!measuring) return RUNTIME_BYTES + peak;
  const floats = model.blocks.map(({ sites }) => {
    const widths = inputsOf(sites);
    const widest = Math.max(0, ...widths);
    // The hidden states, where the pass over the block has got to, what is replayed, and an eighth of the tokens held out twice.
    const cut = measuring.sequential ? models * (hiddenSize + widest) : 0;
    const replayed = measuring.replay ? (measuring.sequential ? widest : sum(widths)) : 0;
    return models * hiddenSize + cut + replayed + (measuring.drift ? widest / 4 : 0);
  });
  return RUNTIME_BYTES + peak + Math.min(options.maxMemory, 4 * options.tokens * Math.max(...floats));
}

function inputsOf(sites: readonly LinearSite[]): number[] {
  return [...new Map(sites.map((site) => [site.input, site.inFeatures])).values()];
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

/** Sizes of one format of an artifact. */
export interface ArtifactSizes {
  /** Mean code bits over the quantized weights of the blocks. */
  readonly averageBits: number;
  /** All stored bits of those modules over their weights. */
  readonly bitsPerWeight: number;
  /** Those of low-rank branches among them; absent: there are none. */
  readonly lowRankBitsPerWeight?: number;
  /** What quantized modules take in the weight files, embeddings included. */
  readonly quantizedBytes: number;
  /** Everything else in the weight files: float tensors, graph, headers, padding. */
  readonly unquantizedBytes: number;
  /** The weight files. */
  readonly bytes: number;
  /** Quantized operands as the runtime holds them; ONNX only. */
  readonly runtimeBytes?: number;
}

/** Sizes of an artifact of `weightBytes` in weight files. */
export function sizesOf(storage: Storage, weightBytes: number, format: ArtifactFormat): ArtifactSizes {
  const { modules, embeddings, averageBits, bitsPerWeight, lowRankBitsPerWeight } = storage;
  const quantizedBytes = sum([...modules, ...embeddings].map((module) => module.storedBits)) / 8;
  return {
    averageBits,
    bitsPerWeight,
    ...(lowRankBitsPerWeight > 0 && { lowRankBitsPerWeight }),
    quantizedBytes,
    unquantizedBytes: weightBytes - quantizedBytes,
    bytes: weightBytes,
    ...(format === 'onnx'
      ? { runtimeBytes: sum([...modules, ...embeddings].map(({ runtimeBits }) => runtimeBits ?? 0)) / 8 }
      : {}),
  };
}

/**
 * What an artifact with these widths would take; graph, headers and padding of the files are left out.
 * @param linears layers of the blocks with their widths, @param embeddings the same of embeddings and output head,
 * @param onnx how an ONNX file is to store codes
 */
export function predictSizes(
  { tensors, model }: Pick<ModelSource, 'tensors' | 'model'>,
  linears: ReadonlyMap<LinearSite, SitePlan>,
  embeddings: ReadonlyMap<LinearSite, SitePlan>,
  format: ArtifactFormat,
  onnx: OnnxStorageOptions = {},
): ArtifactSizes {
  const free = freeInputs(model, new Set([...linears.keys()].map(({ name }) => name)));
  const storage = summarizeStorage(storageOf(linears, format, onnx, free), storageOf(embeddings, format, onnx), 0);
  const modules = [...storage.modules, ...storage.embeddings];
  const replaced = new Set(modules.map(({ name }) => `${name}.weight`));
  const kept = [...tensors.tensors.values()].filter(({ name }) => !replaced.has(name));
  const quantizedBytes = sum(modules.map((module) => module.storedBits)) / 8;
  return sizesOf(storage, quantizedBytes + sum(kept.map(({ byteLength }) => byteLength)), format);
}

/** @param free inputs whose order is folded */
function storageOf(
  sites: ReadonlyMap<LinearSite, SitePlan>,
  format: ArtifactFormat,
  options: OnnxStorageOptions,
  free: ReadonlySet<string> = new Set(),
): ModuleStorage[] {
  const inputs = new Set<string>();
  const all = [...sites].map(([site, { groupSize, bits, transform: kind, rank, rankBits }]) => {
    const lowRank = rank === undefined ? {} : { lowRank: { rank, dtype: factorStorage(rankBits) } };
    const plain = { ...site, groupSize, bits: Uint8Array.from(bits), scaleDtype: 'F16' as const, ...lowRank };
    const first = !inputs.has(site.input);
    inputs.add(site.input);
    const made = kind && shapeOfKind(kind, groupSize, site.inFeatures);
    const transform = made && free.has(site.input) ? { ...made, permuted: false } : made;
    // The order of an input lies with the first module that reads it.
    return {
      site,
      own: first && transform ? { ...plain, transform } : plain,
      shape: transform ? { ...plain, transform } : plain,
    };
  });
  // What the gptq layout cannot hold stays float in it.
  const shapes = format === 'gptq' ? all.filter(({ shape }) => whyNotGptq(shape) === undefined) : all;
  const onnx =
    format === 'onnx'
      ? onnxStorage(
          shapes.map(({ site, shape }): [string, string, OnnxLinearLayout] => [
            site.name,
            site.input,
            layOutShape(shape, options),
          ]),
        )
      : undefined;
  return shapes.map(({ site, own, shape }) => {
    const bits = onnx?.get(site.name) ?? { storedBits: format === 'gptq' ? gptqStoredBits(shape) : planesStoredBits(own) };
    const { lowRank, ...rest } = shape;
    const dtype = format === 'onnx' && options.compact === false ? 'F32' : lowRank?.dtype;
    const branch = lowRank && {
      rank: lowRank.rank,
      storedBits: lowRankBits({ ...shape, lowRank: { ...lowRank, dtype: dtype! } }),
    };
    return { ...rest, bits: [...shape.bits], codeBits: codeBitsOf(shape), ...(branch && { lowRank: branch }), ...bits };
  });
}

/** What a budget for codes does not change. */
export function fixedCosts(
  linears: Iterable<LinearSite>,
  embeddings: ReadonlyMap<LinearSite, SitePlan>,
  format: ArtifactFormat,
  onnx: OnnxStorageOptions = {},
): { weights: number; runtimeBytes: number } {
  const storage = storageOf(embeddings, format, onnx);
  return {
    weights: sum([...linears].map(({ inFeatures, outFeatures }) => inFeatures * outFeatures)),
    runtimeBytes: sum(storage.map(({ storedBits, runtimeBits = storedBits }) => runtimeBits)) / 8,
  };
}
