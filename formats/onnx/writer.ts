/** Writes ONNX models: a small .onnx file, and the weights beside it as external data, streamed. */
import { rename, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { UnsupportedError } from '../../src/errors.ts';
import { assemble, type ExternalPlace, initializersOf, layoutModel, readExactly } from './encoder.ts';
import {
  DataPlaces,
  ExternalDataWriter,
  MAX_SHARD_BYTES,
  temporaryName,
  type WrittenFile,
  writeDurably,
} from './external-data.ts';
import type { Initializer, OnnxModel } from './model.ts';
import { LARGE_BYTES } from './tensor-reader.ts';

/** At most this much of an initializer is asked for at once. */
const CHUNK_BYTES = 8 * 1024 * 1024;

/** Protobuf's own limit on a message. */
const MAX_MESSAGE_BYTES = 2 ** 31 - 1;

export interface WriteOptions {
  /** Every data file stays shorter than this, save one that holds a single tensor which is not. Default 2 GB. */
  readonly maxShardBytes?: number;
}

/** What was written. */
export interface WrittenOnnx {
  /** The .onnx file. */
  readonly model: WrittenFile;
  /** Its data files, `<fileName>_data`, `<fileName>_data_1`, ...; none for a model without large initializers. */
  readonly data: readonly WrittenFile[];
}

/**
 * Writes a model into an existing folder: initializers of 1 KB and more to external data, the rest inside. Files get their
 * names when all are whole, the .onnx file last. The same model gives the same bytes.
 * @param fileName `model_q2.onnx`
 * @throws EnvironmentError DISK_FULL
 */
export async function writeOnnx(
  model: OnnxModel,
  folder: string,
  fileName: string,
  options: WriteOptions = {},
): Promise<WrittenOnnx> {
  await using external = new ExternalDataWriter(folder, fileName, options.maxShardBytes ?? MAX_SHARD_BYTES);
  const placement = new Map<Initializer, ExternalPlace>();
  for (const initializer of initializersOf(model.graph)) {
    if (initializer.byteLength >= LARGE_BYTES)
      placement.set(initializer, await external.add(initializer.byteLength, chunksOf(initializer)));
  }
  const layout = await layoutModel(model, placement);
  const bytes = await assembleWithin(layout);
  const path = join(folder, fileName);
  const temporaryPath = join(folder, temporaryName(fileName));
  try {
    await writeDurably(temporaryPath, bytes);
    const data = await external.finalize();
    await rename(temporaryPath, path);
    return { model: { path, byteLength: bytes.byteLength }, data };
  } catch (error) {
    await rm(temporaryPath, { force: true });
    throw error;
  }
}

/** Bytes of all files that `writeOnnx` makes of a model. No initializer is read. */
export async function onnxByteLength(model: OnnxModel, fileName: string, options: WriteOptions = {}): Promise<number> {
  const places = new DataPlaces(fileName, options.maxShardBytes ?? MAX_SHARD_BYTES);
  const placement = new Map<Initializer, ExternalPlace>();
  for (const initializer of initializersOf(model.graph)) {
    if (initializer.byteLength >= LARGE_BYTES) placement.set(initializer, places.add(initializer.byteLength));
  }
  const { byteLength } = await layoutModel(model, placement);
  return places.shards.reduce((sum, shard) => sum + shard.byteLength, byteLength);
}

/**
 * A model in one piece, all initializers inside.
 * @throws UnsupportedError when that takes 2 GB or more
 */
export async function encodeOnnx(model: OnnxModel): Promise<Uint8Array> {
  return assembleWithin(await layoutModel(model));
}

function assembleWithin(layout: Awaited<ReturnType<typeof layoutModel>>): Promise<Uint8Array> {
  if (layout.byteLength > MAX_MESSAGE_BYTES) {
    throw new UnsupportedError(
      `the model takes ${layout.byteLength} bytes in one piece, protobuf allows ${MAX_MESSAGE_BYTES}: write it with external data`,
    );
  }
  return assemble(layout);
}

async function* chunksOf(initializer: Initializer): AsyncGenerator<Uint8Array> {
  for (let start = 0; start < initializer.byteLength; start += CHUNK_BYTES) {
    yield await readExactly(initializer, start, Math.min(start + CHUNK_BYTES, initializer.byteLength));
  }
}
