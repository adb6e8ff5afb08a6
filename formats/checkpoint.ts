/** From what a user points at (a folder, an index, a file) to the tensors behind it. */
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { FormatError, RecipeError } from '../src/errors.ts';
import { openFile, unreadable } from './safetensors/file.ts';
import { INDEX_NAME } from './safetensors/index-file.ts';
import { openSafetensors, type PlacedSource } from './safetensors/reader.ts';
import { SINGLE_NAME } from './safetensors/sharded-writer.ts';
import { openSharded, openShards } from './safetensors/shards.ts';
import { refuseForeign, SNIFF_BYTES } from './sniff.ts';

/** Files that hold weights in formats that are not read: opened only to say what they are. */
const FOREIGN = /\.(bin|pt|pth|ckpt|gguf|onnx|h5|npz|npy|msgpack)$/;
const SERIES = /^(.*)-(\d{5})-of-(\d{5})\.safetensors$/;

/**
 * Opens a checkpoint: a `.safetensors` file, an index (`*.index.json`), or a folder, where the index counts before
 * `model.safetensors`, and that before a complete series `*-0000i-of-0000k.safetensors` or the only `.safetensors` file.
 * Throws FormatError (broken), UnsupportedError (PyTorch, GGUF, ONNX, ... by their bytes), RecipeError (a folder without
 * weights, or with several checkpoints), EnvironmentError `FILE_UNREADABLE`.
 */
export async function openCheckpoint(path: string): Promise<PlacedSource> {
  if (await isFolder(path)) return openFolder(path);
  return path.endsWith('.json') ? openSharded(path) : openSafetensors(path);
}

async function isFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory();
  } catch (error) {
    throw unreadable(path, error);
  }
}

async function openFolder(folder: string): Promise<PlacedSource> {
  const names = await list(folder);
  if (names.includes(INDEX_NAME)) return openSharded(join(folder, INDEX_NAME));
  if (names.includes(SINGLE_NAME)) return openSafetensors(join(folder, SINGLE_NAME));
  const candidates = names.filter((name) => name.endsWith('.safetensors'));
  if (candidates.length === 1 && !SERIES.test(candidates[0])) return openSafetensors(join(folder, candidates[0]));
  if (candidates.length > 0) return openSeries(folder, candidates);
  for (const name of names.filter((name) => FOREIGN.test(name))) await refuseFile(join(folder, name));
  const found = names.length === 0 ? 'it is empty' : `it holds ${some(names)}`;
  throw new RecipeError(
    `${folder}: no weights in this folder. Looked for ${INDEX_NAME}, ${SINGLE_NAME} and other *.safetensors; ${found}`,
  );
}

/** Shards without their index: still one checkpoint when every number of one series is there. */
async function openSeries(folder: string, names: readonly string[]): Promise<PlacedSource> {
  const series = names.map((name) => SERIES.exec(name));
  const [stem, count] = [series[0]?.[1], series[0]?.[3]];
  if (!series.every((match) => match !== null && match[1] === stem && match[3] === count)) {
    throw new RecipeError(
      `${folder}: several checkpoints in this folder (${some(names)}) and no ${INDEX_NAME}; name one of the files`,
    );
  }
  if (names.length !== Number(count)) {
    const detail = `${names.length} of the ${Number(count)} files of "${stem}-*-of-${count}.safetensors" are there: fetch the rest`;
    throw new FormatError(folder, 'shard-missing', detail);
  }
  return openShards(
    folder,
    names.map((name) => join(folder, name)),
  );
}

async function list(folder: string): Promise<readonly string[]> {
  try {
    // Sorted: the order in which a file system lists names is its own.
    return (await readdir(folder)).sort();
  } catch (error) {
    throw unreadable(folder, error);
  }
}

async function refuseFile(path: string): Promise<void> {
  const file = await openFile(path);
  try {
    refuseForeign(path, await file.read(0, Math.min(file.byteLength, SNIFF_BYTES)));
  } finally {
    await file.close();
  }
}

function some(names: readonly string[]): string {
  return names.length <= 5 ? names.join(', ') : `${names.slice(0, 5).join(', ')} and ${names.length - 5} more`;
}
