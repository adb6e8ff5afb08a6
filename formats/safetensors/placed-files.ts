/** A checkpoint whose files stand at full size from the start: every tensor's place is known, and any number of writers fill them. */
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import type { TensorDeclaration } from '../tensor.ts';
import { encodeShardIndex, INDEX_NAME } from './index-file.ts';
import { layOut } from './layout.ts';
import { planShards, type ShardOptions, shardName } from './sharded-writer.ts';

/** Where a tensor's bytes go. */
export interface TensorPlace {
  /** Name of the file below the checkpoint's folder. */
  readonly file: string;
  /** First byte, counted from the file's start. */
  readonly position: number;
  readonly byteLength: number;
}

export interface CheckpointLayout {
  readonly files: readonly { readonly name: string; readonly prefix: Uint8Array; readonly byteLength: number }[];
  readonly places: ReadonlyMap<string, TensorPlace>;
  /** The index file and its text, when there are several files. */
  readonly index?: { readonly name: string; readonly text: string };
}

/** Says where every byte of a checkpoint will be, in files named as `createShardedSink` names them. Reads and writes nothing. */
export function layOutCheckpoint(declarations: readonly TensorDeclaration[], options: ShardOptions): CheckpointLayout {
  const { metadata = new Map() } = options;
  const shards = planShards(declarations, options);
  const places = new Map<string, TensorPlace>();
  const files = shards.map((shard, i) => {
    const name = shardName(i, shards.length);
    const own = typeof metadata === 'function' ? metadata(shard.map(({ name }) => name)) : metadata;
    const { prefix, tensors, fileByteLength } = layOut(shard, own);
    for (const { name: tensor, start, byteLength } of tensors.values()) {
      places.set(tensor, { file: name, position: prefix.byteLength + start, byteLength });
    }
    return { name, prefix, byteLength: fileByteLength };
  });
  if (files.length === 1) return { files, places };
  const placement = new Map([...places].map(([tensor, { file }]) => [tensor, file]));
  const total = [...places.values()].reduce((sum, { byteLength }) => sum + byteLength, 0);
  return { files, places, index: { name: INDEX_NAME, text: encodeShardIndex(placement, total) } };
}

/** Bytes of all files of a checkpoint, its index included. */
export function checkpointByteLength(declarations: readonly TensorDeclaration[], options: ShardOptions): number {
  const { files, index } = layOutCheckpoint(declarations, options);
  return files.reduce((sum, { byteLength }) => sum + byteLength, Buffer.byteLength(index?.text ?? ''));
}

/** Makes the files in `folder`, each with its header and at its full size, replacing files of their names. */
export async function createPlacedFiles(folder: string, { files }: CheckpointLayout): Promise<void> {
  for (const { name, prefix, byteLength } of files) {
    const handle = await open(join(folder, name), 'w');
    try {
      await handle.write(prefix, 0, prefix.byteLength, 0);
      await handle.truncate(byteLength);
      await handle.sync();
    } finally {
      await handle.close();
    }
  }
}

/** Whether the files are those that `createPlacedFiles` makes: their sizes and headers, whatever data they hold. */
export async function hasPlacedFiles(folder: string, { files }: CheckpointLayout): Promise<boolean> {
  for (const { name, prefix, byteLength } of files) {
    try {
      await using handle = await open(join(folder, name), 'r');
      if ((await handle.stat()).size !== byteLength) return false;
      const found = Buffer.alloc(prefix.byteLength);
      await handle.read(found, 0, found.byteLength, 0);
      if (Buffer.compare(found, prefix) !== 0) return false;
    } catch (error) {
      if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return false;
      throw error;
    }
  }
  return true;
}
