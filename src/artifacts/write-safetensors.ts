/** Writes the checkpoint artifacts, layouts `planes` and `gptq`: quantized modules encoded, every other tensor copied byte for byte. */
import { basename } from 'node:path';
import { checkpointByteLength } from '../../formats/safetensors/placed-files.ts';
import { createShardedSink, type ShardOptions } from '../../formats/safetensors/sharded-writer.ts';
import type { Tensor, TensorDeclaration, TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { RecipeError } from '../errors.ts';
import type { QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import type { Model } from '../model/model.ts';
import { describeModules } from './describe-modules.ts';
import { encodeGptq, type GptqFormat, gptqDeclarations, isSymmetric, whyNotGptq } from './gptq.ts';
import { type GptqConfig, gptqConfig } from './gptq-config.ts';
import { encodePlanes, planesDeclarations, type QuantizedGrid, shapeOfGrid } from './planes.ts';
import { type LayoutName, type QuantizedModule, quantMetadata } from './quant-metadata.ts';
import type { QuantizedSource } from './quantized-source.ts';

/** Tensors in one file; larger checkpoints are split, as Hugging Face splits them. */
const MAX_SHARD_BYTES = 5_000_000_000;
/** Unquantized tensors are copied in pieces of about this size. */
const COPY_BYTES = 64 * 1024 * 1024;

export interface CheckpointOptions {
  readonly model: Model;
  /** The checkpoint that was quantized. */
  readonly tensors: TensorSource;
  readonly quantized: QuantizedSource;
  /** The artifact's folder. */
  readonly folder: string;
  readonly maxShardBytes?: number;
}

/** A quantized module's encoding in a layout. */
interface Encoding {
  readonly declarations: readonly TensorDeclaration[];
  encode(q: QuantizedLinear): readonly Tensor[];
}

/** Modules and their encodings in the layout `planes`, which holds every quantized module. */
async function planesEncodings({ model, quantized }: Pick<CheckpointOptions, 'model' | 'quantized'>) {
  const modules = await describeModules(model, quantized);
  const encodings = new Map<string, Encoding>();
  for (const name of modules.keys()) {
    const grid = await quantized.readGrid(name);
    // Modules that share an input share its order, which lies with the first of them.
    const own = modules.get(name)!.input === name;
    const declarations = planesDeclarations(name, shapeOfGrid(own ? grid : withoutTransform(grid)));
    encodings.set(name, { declarations, encode: (q) => encodePlanes(name, own ? q : withoutTransform(q)) });
  }
  // The layout keeps widths in a tensor of their own.
  const described = new Map([...modules].map(([name, { bits: _, ...module }]) => [name, module]));
  return { described, encodings };
}

/** Writes the layout `planes`. Returns the names of the files. */
export async function writePlanes(options: CheckpointOptions): Promise<readonly string[]> {
  const { described, encodings } = await planesEncodings(options);
  return writeCheckpoint('planes', options, described, encodings);
}

/** Bytes of the weight files that `writePlanes` makes. No codes are read. */
export async function planesArtifactBytes(options: Omit<CheckpointOptions, 'folder'>): Promise<number> {
  const { described, encodings } = await planesEncodings(options);
  const { declarations, shards } = layOutFiles('planes', options, described, encodings);
  return checkpointByteLength(declarations, shards);
}

function withoutTransform<T extends QuantizedGrid>({ transform: _, ...rest }: T): Omit<T, 'transform'> {
  return rest;
}

export interface WrittenGptq {
  readonly files: readonly string[];
  readonly config: GptqConfig;
  /** Modules the layout could not hold, left in float, with the reason. */
  readonly left: ReadonlyMap<string, string>;
}

/** Writes the layout `gptq`. Modules it cannot hold stay as the checkpoint has them. Throws RecipeError when that is all of them. */
export async function writeGptq(options: CheckpointOptions): Promise<WrittenGptq> {
  const { model, quantized } = options;
  const modules = await describeModules(model, quantized);
  const grids = new Map<string, QuantizedGrid>();
  const left = new Map<string, string>();
  for (const name of [...modules.keys()]) {
    const grid = await quantized.readGrid(name);
    const why = whyNotGptq(shapeOfGrid(grid));
    if (why === undefined) {
      grids.set(name, grid);
      continue;
    }
    left.set(name, why);
    modules.delete(name);
  }
  if (grids.size === 0) {
    const [name, why] = [...left][0] ?? ['', 'is not there'];
    throw new RecipeError(
      `--format gptq: the layout can hold none of the quantized modules; "${name}" ${why}. Use --format safetensors.`,
    );
  }
  const sites = model.blocks.flatMap((block) => block.sites.map((site) => site.name));
  const config = gptqConfig(
    grids,
    sites.filter((name) => !grids.has(name)),
    [...grids.values()].every(isSymmetric),
  );
  const format: GptqFormat = config.checkpoint_format;
  const encodings = new Map<string, Encoding>();
  for (const [name, grid] of grids) {
    encodings.set(name, { declarations: gptqDeclarations(name, grid), encode: (q) => encodeGptq(name, q, format) });
  }
  const described = new Map([...modules].map(([name, { bits: _, ...module }]) => [name, module]));
  return { files: await writeCheckpoint('gptq', options, described, encodings), config, left };
}

/** What goes into the files of a checkpoint, and how it is divided among them. */
function layOutFiles(
  layout: LayoutName,
  { model, tensors, maxShardBytes = MAX_SHARD_BYTES }: Omit<CheckpointOptions, 'folder'>,
  modules: ReadonlyMap<string, QuantizedModule>,
  encodings: ReadonlyMap<string, Encoding>,
): { copied: readonly TensorInfo[]; declarations: readonly TensorDeclaration[]; shards: ShardOptions } {
  const ownerOf = new Map<string, string>();
  for (const [name, { declarations }] of encodings) for (const tensor of declarations) ownerOf.set(tensor.name, name);
  const replaced = new Set([...modules.keys()].map((name) => `${name}.weight`));
  // A tied head stored twice has no meaning of its own: the quantized embedding takes its place.
  const tied = model.outputHead === model.tokenEmbedding && replaced.has(model.tokenEmbedding);
  const copied = [...tensors.tensors.values()].filter(({ name }) => !replaced.has(name) && !(tied && name === 'lm_head.weight'));
  const declarations = [
    ...copied.map(({ name, dtype, shape }) => ({ name, dtype, shape })),
    ...[...encodings.values()].flatMap((encoding) => encoding.declarations),
  ];
  const groupSize = [...modules.values()][0]?.groupSize ?? 1;
  const shards: ShardOptions = {
    maxShardBytes,
    // A module's tensors, and those of the modules that share its input, lie in one file.
    sameShard: (tensor) => modules.get(ownerOf.get(tensor) ?? '')?.input ?? tensor,
    metadata: (names) => {
      const present = new Set(names.map((name) => ownerOf.get(name)));
      const own = new Map([...modules].filter(([name]) => present.has(name)));
      return new Map([['format', 'pt'], ...quantMetadata(layout, groupSize, own)]);
    },
  };
  return { copied, declarations, shards };
}

async function writeCheckpoint(
  layout: LayoutName,
  options: CheckpointOptions,
  modules: ReadonlyMap<string, QuantizedModule>,
  encodings: ReadonlyMap<string, Encoding>,
): Promise<readonly string[]> {
  const { tensors, quantized, folder } = options;
  const { copied, declarations, shards } = layOutFiles(layout, options, modules, encodings);
  await using sink = await createShardedSink(folder, declarations, shards);
  for (const [name, { encode }] of encodings) {
    for (const tensor of encode(await quantized.read(name))) await sink.write(tensor.name, tensor.data);
  }
  for (const { name, shape, byteLength } of copied) {
    const [rows = 1] = shape;
    const step = Math.max(1, Math.floor(COPY_BYTES / Math.max(1, byteLength / rows)));
    if (shape.length === 0 || step >= rows) {
      await sink.write(name, (await tensors.read(name)).data);
      continue;
    }
    for (let row = 0; row < rows; row += step) {
      await sink.writeRows(name, row, (await tensors.readRows(name, row, Math.min(row + step, rows))).data);
    }
  }
  return (await sink.finalize()).map((path) => basename(path)).sort();
}
