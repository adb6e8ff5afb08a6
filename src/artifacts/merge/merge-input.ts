/** A checkpoint that takes part in a merge: a Hugging Face folder, a bare file, a series of shards, or a PEFT adapter. */
import { readFile, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { openCheckpoint } from '../../../formats/checkpoint.ts';
import { quote } from '../../../formats/safetensors/header.ts';
import { openSafetensors, type PlacedSource } from '../../../formats/safetensors/reader.ts';
import { openShards } from '../../../formats/safetensors/shards.ts';
import type { TensorSource } from '../../../formats/tensor.ts';
import { EnvironmentError, FormatError, RecipeError, UnsupportedError } from '../../errors.ts';
import { errorCode } from '../process-lock.ts';
import { layoutOf } from '../quant-metadata.ts';

export type InputKind = 'folder' | 'file' | 'series' | 'adapter';

/** What to open, as plain data. */
export interface InputPlace {
  readonly kind: InputKind;
  /** As the user named it; for a series, its first file. */
  readonly path: string;
  /** Files of a series, in order. */
  readonly files?: readonly string[];
}

/** An open input. */
export interface MergeInput {
  readonly place: InputPlace;
  /** How people and parameters call it. */
  readonly label: string;
  readonly tensors: PlacedSource;
  /** config.json, for folders. */
  readonly config?: Readonly<Record<string, unknown>>;
  /** adapter_config.json, for adapters. */
  readonly adapter?: Readonly<Record<string, unknown>>;
}

/** Where the tensors of a PEFT adapter are. */
const ADAPTER_FILE = 'adapter_model.safetensors';
export const ADAPTER_CONFIG = 'adapter_config.json';
const SERIES = /^(.*)-(\d{5})-of-(\d{5})\.safetensors$/;

/** Groups paths into inputs: shards of one series are one input. Sorted by path, so that the order they were named in does not matter. */
export async function placesOf(paths: readonly string[]): Promise<readonly InputPlace[]> {
  const series = new Map<string, string[]>();
  const places: InputPlace[] = [];
  for (const path of [...new Set(paths)].sort(compareBytes)) {
    const match = SERIES.exec(basename(path));
    if (match && match[3] !== '00001') {
      const key = `${join(dirname(path), match[1])}-of-${match[3]}`;
      series.set(key, [...(series.get(key) ?? []), path]);
    } else {
      places.push({ kind: await kindOf(path), path });
    }
  }
  for (const files of series.values()) {
    const count = Number(SERIES.exec(basename(files[0]))?.[3]);
    if (files.length !== count) {
      const detail = `${files.length} of the ${count} files of its series were given`;
      throw new RecipeError(`${files[0]}: ${detail}; give all of them, or the folder they are in`);
    }
    places.push({ kind: 'series', path: files[0], files });
  }
  return places.sort((a, b) => compareBytes(a.path, b.path));
}

async function kindOf(path: string): Promise<InputKind> {
  try {
    if (!(await stat(path)).isDirectory()) return 'file';
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `${path}: no such file or folder`, { cause: error });
  }
  return (await exists(join(path, ADAPTER_CONFIG))) ? 'adapter' : 'folder';
}

/** A name for people: that of the file or folder, without extension and shard number. */
export function labelOf({ kind, path }: InputPlace): string {
  const name = basename(resolve(path));
  if (kind === 'series') return SERIES.exec(name)?.[1] ?? name;
  return kind === 'file' ? name.replace(/\.safetensors$/, '') : name;
}

/** Opens the tensors of an input; reads headers only. Throws as `openCheckpoint` does. */
async function openTensors({ kind, path, files }: InputPlace): Promise<PlacedSource> {
  switch (kind) {
    case 'series':
      return openShards(path, files ?? []);
    case 'adapter':
      return openSafetensors(join(path, ADAPTER_FILE));
    case 'folder':
    case 'file':
      return openCheckpoint(path);
    default:
      return kind satisfies never;
  }
}

/** Opens an input and refuses what cannot be merged: quantized weights, adapters without their file. */
export async function openInput(place: InputPlace, label: string): Promise<MergeInput> {
  const tensors = await openTensors(place);
  try {
    const config = await readConfig(place);
    const adapter = place.kind === 'adapter' ? await readJsonObject(join(place.path, ADAPTER_CONFIG)) : undefined;
    refuseQuantized(place.path, tensors, config);
    return { place, label, tensors, ...(config ? { config } : {}), ...(adapter ? { adapter } : {}) };
  } catch (error) {
    await tensors.close();
    throw error;
  }
}

/** The config.json of a folder; a bare file has none of its own. */
async function readConfig({ kind, path }: InputPlace): Promise<Readonly<Record<string, unknown>> | undefined> {
  const file = join(path, 'config.json');
  return kind === 'folder' && (await exists(file)) ? readJsonObject(file) : undefined;
}

/** Reads a JSON object. Throws FormatError, EnvironmentError. */
export async function readJsonObject(path: string): Promise<Readonly<Record<string, unknown>>> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be read (${errorCode(error)})`, { cause: error });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FormatError(path, 'config-not-json', `not JSON: ${(error as Error).message}`, { cause: error });
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  throw new FormatError(path, 'config-not-an-object', 'a JSON object is expected');
}

/** Names that only packed weights have. */
const PACKED = /\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|SCB|absmax|quant_map|quant_state\..*)$/;

function refuseQuantized(path: string, tensors: TensorSource, config: Readonly<Record<string, unknown>> | undefined): void {
  const advice = 'merge the float models, and quantize the result';
  if (config?.['quantization_config']) {
    throw new UnsupportedError(`${path}: is quantized (its config.json has a quantization_config); ${advice}`);
  }
  const files = 'shards' in tensors ? (tensors.shards as readonly TensorSource[]) : [tensors];
  const layout = files.map((file) => layoutOf(file.path, file.metadata)).find((found) => found !== undefined);
  if (layout) throw new UnsupportedError(`${path}: is quantized (layout ${layout}); ${advice}`);
  for (const { name, dtype } of tensors.tensors.values()) {
    if (dtype.startsWith('F8') || PACKED.test(name)) {
      throw new UnsupportedError(`${path}: tensor ${quote(name)} (${dtype}) holds quantized weights; ${advice}`);
    }
  }
}

/** By UTF-8 bytes: the same everywhere. */
export function compareBytes(a: string, b: string): number {
  return Buffer.compare(Buffer.from(a), Buffer.from(b));
}

async function exists(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch {
    return false;
  }
}
