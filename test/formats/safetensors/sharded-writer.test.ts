import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../../formats/checkpoint.ts';
import { byteLengthOf } from '../../../formats/dtype.ts';
import { createShardedSink, planShards } from '../../../formats/safetensors/sharded-writer.ts';
import type { TensorDeclaration } from '../../../formats/tensor.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';

const scratch = scratchFolder();
const INDEX = 'model.safetensors.index.json';

function bytes(name: string, length: number): TensorDeclaration {
  return { name, dtype: 'U8', shape: [length] };
}

function names(plan: readonly (readonly TensorDeclaration[])[]): string[][] {
  return plan.map((shard) => shard.map(({ name }) => name));
}

const three = [bytes('a', 60), bytes('b', 50), bytes('10', 40)];

describe('planShards', () => {
  it('fills files in order up to the limit', () => {
    expect(names(planShards(three, { maxShardBytes: 100 }))).toEqual([['a'], ['b', '10']]);
    expect(names(planShards(three, { maxShardBytes: 110 }))).toEqual([['a', 'b'], ['10']]);
    expect(names(planShards(three, { maxShardBytes: 150 }))).toEqual([['a', 'b', '10']]);
  });

  it('gives a tensor over the limit a file of its own', () => {
    expect(names(planShards([bytes('a', 1), bytes('b', 500), bytes('c', 1)], { maxShardBytes: 100 }))).toEqual([
      ['a'],
      ['b'],
      ['c'],
    ]);
  });

  it('begins no empty file, whatever comes first', () => {
    expect(names(planShards([bytes('a', 500), bytes('b', 1)], { maxShardBytes: 100 }))).toEqual([['a'], ['b']]);
  });

  it('keeps tensors of one key together', () => {
    const declarations = [bytes('x.1', 40), bytes('y.1', 40), bytes('x.2', 40), bytes('y.2', 40)];
    expect(names(planShards(declarations, { maxShardBytes: 100, sameShard: (name) => name[0] }))).toEqual([
      ['x.1', 'x.2'],
      ['y.1', 'y.2'],
    ]);
  });

  it('plans one file for nothing', () => {
    expect(planShards([], { maxShardBytes: 1 })).toEqual([[]]);
  });

  it('places every tensor once, splits no key, and exceeds the limit only for a single key', () => {
    const lengths = fc.array(fc.tuple(fc.nat(60), fc.nat(5)), { maxLength: 30 });
    fc.assert(
      fc.property(lengths, (list) => {
        const declarations = list.map(([length, key], i) => bytes(`${key}/${i}`, length));
        const sameShard = (name: string): string => name.split('/')[0];
        const plan = planShards(declarations, { maxShardBytes: 100, sameShard });
        expect(
          plan
            .flat()
            .map(({ name }) => name)
            .sort(),
        ).toEqual(declarations.map(({ name }) => name).sort());
        const keys = plan.map((shard) => new Set(shard.map(({ name }) => sameShard(name))));
        expect(keys.reduce((sum, { size }) => sum + size, 0)).toBe(new Set(declarations.map(({ name }) => sameShard(name))).size);
        for (const [i, shard] of plan.entries()) {
          const filled = shard.reduce((sum, { dtype, shape }) => sum + byteLengthOf(dtype, shape), 0);
          const nonEmptyKeys = [...keys[i]].filter((key) =>
            shard.some(({ name, shape }) => sameShard(name) === key && shape[0] > 0),
          );
          if (nonEmptyKeys.length > 1) expect(filled).toBeLessThanOrEqual(100);
        }
      }),
    );
  });
});

describe('createShardedSink', () => {
  async function writeThree(folder: string, maxShardBytes: number): Promise<readonly string[]> {
    const metadata = (contents: readonly string[]): ReadonlyMap<string, string> => new Map([['holds', contents.join(' ')]]);
    await using sink = await createShardedSink(folder, three, { maxShardBytes, metadata });
    await sink.writeRows('b', 25, new Uint8Array(25).fill(2));
    await sink.write('10', new Uint8Array(40).fill(3));
    await sink.writeRows('b', 0, new Uint8Array(25).fill(1));
    await sink.write('a', new Uint8Array(60));
    return await sink.finalize();
  }

  it('writes one model.safetensors without an index when everything fits', async () => {
    const folder = scratch.folder();
    expect(await writeThree(folder, 150)).toEqual([join(folder, 'model.safetensors')]);
    expect(readdirSync(folder)).toEqual(['model.safetensors']);
  });

  it('writes numbered files and an index that reads back', async () => {
    const folder = scratch.folder();
    const expected = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', INDEX];
    expect(await writeThree(folder, 100)).toEqual(expected.map((name) => join(folder, name)));
    expect(readdirSync(folder).sort()).toEqual(expected);
    expect(readFileSync(join(folder, INDEX), 'utf8')).toBe(`{
  "metadata": {
    "total_size": 150
  },
  "weight_map": {
    "10": "model-00002-of-00002.safetensors",
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00002-of-00002.safetensors"
  }
}
`);
    await using source = await openCheckpoint(folder);
    expect((await source.read('b')).data).toEqual(Uint8Array.from({ length: 50 }, (_, i) => (i < 25 ? 1 : 2)));
    expect(source.tensors.size).toBe(3);
  });

  it('gives each file the metadata of what it holds', async () => {
    const folder = scratch.folder();
    await writeThree(folder, 100);
    await using second = await openCheckpoint(join(folder, 'model-00002-of-00002.safetensors'));
    expect(second.metadata.get('holds')).toBe('b 10');
  });

  it('shows no file before all are whole, and leaves none when given up', async () => {
    const folder = scratch.folder();
    {
      await using sink = await createShardedSink(folder, three, { maxShardBytes: 100 });
      await sink.write('a', new Uint8Array(60));
      await expect(sink.finalize()).rejects.toThrow('never written');
      expect(readdirSync(folder).every((name) => name.endsWith('.partial'))).toBe(true);
    }
    expect(readdirSync(folder)).toEqual([]);
  });

  it('takes back published files when the index cannot be written', async () => {
    const folder = scratch.folder();
    // A folder in the place of the index's temporary file cannot be replaced by it.
    scratch.write(join(folder.slice(scratch.path.length), `${INDEX}.partial`, 'x'), '');
    await expect(writeThree(folder, 100)).rejects.toMatchObject({ code: 'FILE_UNREADABLE' });
    expect(readdirSync(folder)).toEqual([`${INDEX}.partial`]);
  });

  it('refuses undeclared tensors, and duplicates in different files', async () => {
    const folder = scratch.folder();
    const twice = [bytes('a', 60), bytes('b', 60), bytes('a', 60)];
    const apart = { maxShardBytes: 1, sameShard: (name: string) => name };
    await expect(createShardedSink(folder, twice, apart)).rejects.toThrow('declared twice');
    expect(readdirSync(folder)).toEqual([]);
    await using sink = await createShardedSink(folder, three, { maxShardBytes: 100 });
    await expect(sink.write('c', new Uint8Array(1))).rejects.toThrow('tensor "c" was not declared');
  });
});
