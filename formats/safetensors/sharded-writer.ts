/** Writes a checkpoint in one file, or in several of bounded size with an index, named as Hugging Face names them. */
import { rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { byteLengthOf } from '../dtype.ts';
import type { TensorDeclaration, TensorSink } from '../tensor.ts';
import { quote } from './header.ts';
import { encodeShardIndex, INDEX_NAME } from './index-file.ts';
import { OutputFile } from './output-file.ts';
import { createSafetensorsSink, type SafetensorsSink } from './writer.ts';

/** Name of a checkpoint that is one file. */
export const SINGLE_NAME = 'model.safetensors';

export interface ShardOptions {
  /** Bytes of tensors in one file; a tensor (or group) larger than that gets a file of its own. */
  readonly maxShardBytes: number;
  /** What each file carries: the same for all, or made from the names of its tensors. */
  readonly metadata?: ReadonlyMap<string, string> | ((names: readonly string[]) => ReadonlyMap<string, string>);
  /** Tensors of equal key share a file. Default: each may go anywhere. */
  readonly sameShard?: (name: string) => string;
}

/** Splits declarations, in order of their groups' first tensors: a file is closed when the next group would exceed `maxShardBytes`. */
export function planShards(
  declarations: readonly TensorDeclaration[],
  { maxShardBytes, sameShard = (name) => name }: Pick<ShardOptions, 'maxShardBytes' | 'sameShard'>,
): readonly (readonly TensorDeclaration[])[] {
  const groups = new Map<string, TensorDeclaration[]>();
  for (const declaration of declarations) {
    const key = sameShard(declaration.name);
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [declaration]);
    else group.push(declaration);
  }
  const shards: TensorDeclaration[][] = [[]];
  let filled = 0;
  for (const group of groups.values()) {
    const byteLength = byteLengthOfAll(group);
    if (filled > 0 && filled + byteLength > maxShardBytes) {
      shards.push([]);
      filled = 0;
    }
    shards[shards.length - 1].push(...group);
    filled += byteLength;
  }
  return shards;
}

/**
 * Starts a checkpoint in an existing folder: `model.safetensors` when everything fits in one file, otherwise
 * `model-00001-of-0000k.safetensors` and so on, with `model.safetensors.index.json`. Throws as `createSafetensorsSink` does.
 */
export async function createShardedSink(
  folder: string,
  declarations: readonly TensorDeclaration[],
  options: ShardOptions,
): Promise<TensorSink> {
  const { metadata = new Map() } = options;
  const plan = planShards(declarations, options);
  const shards: SafetensorsSink[] = [];
  const shardOf = new Map<string, SafetensorsSink>();
  try {
    for (const [i, shard] of plan.entries()) {
      const names = shard.map(({ name }) => name);
      const path = join(folder, shardName(i, plan.length));
      const sink = await createSafetensorsSink(path, shard, typeof metadata === 'function' ? metadata(names) : metadata);
      shards.push(sink);
      for (const name of names) {
        if (shardOf.has(name)) throw new RangeError(`tensor ${quote(name)} is declared twice`);
        shardOf.set(name, sink);
      }
    }
    return new ShardedSink(folder, shards, shardOf, byteLengthOfAll(declarations));
  } catch (error) {
    for (const shard of shards) await shard[Symbol.asyncDispose]();
    throw error;
  }
}

/** The name of file `index` (from 0) of `count`. */
export function shardName(index: number, count: number): string {
  if (count === 1) return SINGLE_NAME;
  const five = (n: number): string => String(n).padStart(5, '0');
  return `model-${five(index + 1)}-of-${five(count)}.safetensors`;
}

function byteLengthOfAll(declarations: readonly TensorDeclaration[]): number {
  return declarations.reduce((sum, { dtype, shape }) => sum + byteLengthOf(dtype, shape), 0);
}

class ShardedSink implements TensorSink {
  readonly #folder: string;
  readonly #shards: readonly SafetensorsSink[];
  readonly #shardOf: ReadonlyMap<string, SafetensorsSink>;
  readonly #totalByteLength: number;
  /** Files under their final names before all are: removed when the rest fails. */
  readonly #published: string[] = [];
  #finished = false;

  constructor(
    folder: string,
    shards: readonly SafetensorsSink[],
    shardOf: ReadonlyMap<string, SafetensorsSink>,
    totalByteLength: number,
  ) {
    this.#folder = folder;
    this.#shards = shards;
    this.#shardOf = shardOf;
    this.#totalByteLength = totalByteLength;
  }

  async write(name: string, data: Uint8Array): Promise<void> {
    await this.#shard(name).write(name, data);
  }

  async writeRows(name: string, start: number, data: Uint8Array): Promise<void> {
    await this.#shard(name).writeRows(name, start, data);
  }

  async finalize(): Promise<readonly string[]> {
    for (const shard of this.#shards) await shard.complete();
    for (const shard of this.#shards) {
      await shard.publish();
      this.#published.push(shard.path);
    }
    // Last: a reader that finds the index finds every file it names.
    if (this.#shards.length > 1) await this.#writeIndex();
    this.#finished = true;
    return this.#published;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#finished) return;
    this.#finished = true;
    for (const shard of this.#shards) await shard[Symbol.asyncDispose]();
    for (const path of this.#published) await rm(path, { force: true });
  }

  async #writeIndex(): Promise<void> {
    const placement = new Map([...this.#shardOf].map(([name, shard]) => [name, basename(shard.path)]));
    const bytes = Buffer.from(encodeShardIndex(placement, this.#totalByteLength));
    const file = await OutputFile.create(join(this.#folder, INDEX_NAME), bytes.byteLength);
    try {
      await file.write(bytes, 0);
      await file.sync();
      await file.publish();
    } catch (error) {
      await file.discard();
      throw error;
    }
    this.#published.push(file.path);
  }

  #shard(name: string): SafetensorsSink {
    const shard = this.#shardOf.get(name);
    if (shard === undefined) throw new RangeError(`${this.#folder}: tensor ${quote(name)} was not declared`);
    return shard;
  }
}
