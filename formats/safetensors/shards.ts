/** A checkpoint in several safetensors files: `model.safetensors.index.json` says which file ("shard") holds which tensor. */
import { stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { EnvironmentError, FormatError } from '../../src/errors.ts';
import type { Tensor, TensorInfo } from '../tensor.ts';
import { unreadable } from './file.ts';
import { quote } from './header.ts';
import { readShardIndex, type ShardIndex } from './index-file.ts';
import { type FilePlace, missingTensor, openSafetensors, type PlacedSource } from './reader.ts';

/** Several files as one source. */
export interface ShardedSource extends PlacedSource {
  /** The files one by one. The whole's `metadata` joins theirs; where they differ, the first file's value counts. */
  readonly shards: readonly PlacedSource[];
}

/**
 * Opens a checkpoint by its index file. Every tensor of the index must be in its shard and nowhere else, and the shards must hold
 * nothing more: otherwise index and shards come from different checkpoints. Throws as `openSafetensors` does.
 */
export async function openSharded(indexPath: string): Promise<ShardedSource> {
  const index = await readShardIndex(indexPath);
  const names = [...new Set(index.placement.values())];
  const paths = names.map((name) => join(dirname(indexPath), name));
  for (const [i, path] of paths.entries()) await checkPresent(indexPath, index, names[i], path);
  const source = await openShards(indexPath, paths, index.byteLength);
  try {
    checkPlacement(indexPath, index, names, source);
    return source;
  } catch (error) {
    await source.close();
    throw error;
  }
}

/**
 * Opens files that together are one checkpoint. No tensor may be in two of them.
 * @param path what the user named, @param indexByteLength size of the index file, when `path` is one
 */
export async function openShards(path: string, shardPaths: readonly string[], indexByteLength?: number): Promise<ShardedSource> {
  const shards: PlacedSource[] = [];
  try {
    for (const shardPath of shardPaths) shards.push(await openSafetensors(shardPath));
    return new JoinedSource(path, shards, indexByteLength);
  } catch (error) {
    await Promise.all(shards.map((shard) => shard.close()));
    throw error;
  }
}

async function checkPresent(indexPath: string, { placement }: ShardIndex, name: string, path: string): Promise<void> {
  try {
    await stat(path);
  } catch (error) {
    const reason = unreadable(path, error);
    if (!(reason instanceof EnvironmentError)) throw error;
    const count = [...placement.values()].filter((shard) => shard === name).length;
    const detail = `shard ${quote(name)} with ${count} of its ${placement.size} tensors cannot be opened (${reason.message})`;
    throw new FormatError(indexPath, 'index-shard-missing', detail, { cause: error });
  }
}

function checkPlacement(indexPath: string, { placement }: ShardIndex, names: readonly string[], { shards }: ShardedSource): void {
  const byName = new Map(names.map((name, i) => [name, shards[i]]));
  for (const [tensor, name] of placement) {
    if (byName.get(name)?.tensors.has(tensor)) continue;
    throw new FormatError(indexPath, 'index-tensor-missing', `tensor ${quote(tensor)} should be in ${quote(name)}, but is not`);
  }
  for (const [name, shard] of byName) {
    const unlisted = [...shard.tensors.keys()].filter((tensor) => !placement.has(tensor));
    if (unlisted.length === 0) continue;
    const examples = unlisted.slice(0, 3).map(quote).join(', ');
    const detail = `${quote(name)} holds ${unlisted.length} tensors that the index does not list, such as ${examples}`;
    throw new FormatError(indexPath, 'index-tensor-unlisted', detail);
  }
}

class JoinedSource implements ShardedSource {
  readonly path: string;
  readonly shards: readonly PlacedSource[];
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: readonly { readonly path: string; readonly byteLength: number }[];
  readonly #shardOf: ReadonlyMap<string, PlacedSource>;

  constructor(path: string, shards: readonly PlacedSource[], indexByteLength: number | undefined) {
    const tensors = new Map<string, TensorInfo>();
    const shardOf = new Map<string, PlacedSource>();
    for (const shard of shards) {
      for (const [name, info] of shard.tensors) {
        const other = shardOf.get(name);
        if (other !== undefined) {
          throw new FormatError(path, 'tensor-duplicate', `tensor ${quote(name)} is both in ${other.path} and in ${shard.path}`);
        }
        tensors.set(name, info);
        shardOf.set(name, shard);
      }
    }
    this.path = path;
    this.shards = shards;
    this.tensors = tensors;
    this.metadata = new Map([...shards].reverse().flatMap((shard) => [...shard.metadata]));
    const index = indexByteLength === undefined ? [] : [{ path, byteLength: indexByteLength }];
    this.files = [...index, ...shards.flatMap((shard) => shard.files)];
    this.#shardOf = shardOf;
  }

  async read(name: string): Promise<Tensor> {
    return this.#shard(name).read(name);
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    return this.#shard(name).readRows(name, start, end);
  }

  placeOf(name: string): FilePlace {
    return this.#shard(name).placeOf(name);
  }

  #shard(name: string): PlacedSource {
    const shard = this.#shardOf.get(name);
    if (shard === undefined) throw missingTensor(this.path, name, this.tensors.size);
    return shard;
  }

  async close(): Promise<void> {
    await Promise.all(this.shards.map((shard) => shard.close()));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
