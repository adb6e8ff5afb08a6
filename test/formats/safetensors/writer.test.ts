import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { byteLengthOf } from '../../../formats/dtype.ts';
import { SAFETENSORS_DTYPES } from '../../../formats/safetensors/header.ts';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../../formats/safetensors/writer.ts';
import type { DType, TensorDeclaration } from '../../../formats/tensor.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';

const scratch = scratchFolder();
const pair: readonly TensorDeclaration[] = [
  { name: 'bytes', dtype: 'U8', shape: [3] },
  { name: 'matrix', dtype: 'F32', shape: [4, 2] },
];

function bytesOf(length: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 31 + seed * 17) % 251);
}

async function writeAll(
  path: string,
  declarations: readonly TensorDeclaration[],
  metadata?: ReadonlyMap<string, string>,
): Promise<Uint8Array> {
  await using sink = await createSafetensorsSink(path, declarations, metadata);
  for (const [i, { name, dtype, shape }] of [...declarations].sort((a, b) => (a.name < b.name ? -1 : 1)).entries()) {
    await sink.write(name, bytesOf(byteLengthOf(dtype, shape), i));
  }
  await sink.finalize();
  return readFileSync(path);
}

const declarations = fc.uniqueArray(
  fc.record({
    name: fc.oneof(
      fc.string({ unit: 'binary' }),
      fc.constantFrom('constructor', '0', '10', '2', 'a"b\\c\n', '\u{1f600}', '\uffee'),
    ),
    dtype: fc.constantFrom(...([...SAFETENSORS_DTYPES] as DType[])),
    shape: fc.array(fc.nat(4), { maxLength: 4 }),
  }),
  { selector: ({ name }) => name, maxLength: 8 },
);
const metadata = fc
  .dictionary(fc.string(), fc.string({ unit: 'binary' }), { maxKeys: 3 })
  .map((object) => new Map(Object.entries(object)));

describe('the written file', () => {
  it('is, byte for byte, the one the format describes', async () => {
    const json =
      '{"__metadata__":{"format":"pt"},' +
      '"b.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},' +
      '"a.weight":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]},' +
      '"c":{"dtype":"U8","shape":[],"data_offsets":[10,11]}}';
    expect(json).toHaveLength(209);
    const path = join(scratch.path, 'vector.safetensors');
    await using sink = await createSafetensorsSink(
      path,
      [
        { name: 'c', dtype: 'U8', shape: [] },
        { name: 'a.weight', dtype: 'BF16', shape: [1] },
        { name: 'b.weight', dtype: 'F32', shape: [1, 2] },
      ],
      new Map([['format', 'pt']]),
    );
    await sink.write('a.weight', Uint8Array.of(0x80, 0x3f));
    await sink.write('c', Uint8Array.of(0xaa));
    await sink.write('b.weight', Uint8Array.of(0, 0, 0x80, 0x3f, 0, 0, 0, 0x40));
    expect(await sink.finalize()).toEqual([path]);
    // 209 bytes of header become 216, a multiple of 8, with spaces.
    const expected = [
      216,
      0,
      0,
      0,
      0,
      0,
      0,
      0,
      ...Buffer.from(`${json}       `),
      0,
      0,
      0x80,
      0x3f,
      0,
      0,
      0,
      0x40,
      0x80,
      0x3f,
      0xaa,
    ];
    expect([...readFileSync(path)]).toEqual(expected);
    expect(sink.byteLength).toBe(expected.length);
  });

  it('reads back as it was declared and written, with every tensor aligned to its element size', async () => {
    const path = join(scratch.path, 'property.safetensors');
    await fc.assert(
      fc.asyncProperty(declarations, metadata, async (declared, strings) => {
        const sound = declared.filter(({ name }) => name !== '__metadata__' && name !== '__proto__');
        const written = await writeAll(path, sound, strings);
        await using source = await openSafetensors(path);
        const byName = [...sound].sort((a, b) => (a.name < b.name ? -1 : 1));
        for (const [i, { name, dtype, shape }] of byName.entries()) {
          const byteLength = byteLengthOf(dtype, shape);
          const tensor = await source.read(name);
          expect(tensor).toEqual({ name, dtype, shape, byteLength, data: bytesOf(byteLength, i) });
          const { start } = source.tensors.get(name) as unknown as { start: number };
          expect((start + 8 + Number(Buffer.from(written).readBigUInt64LE(0))) % byteLengthOf(dtype, [1])).toBe(0);
        }
        expect(source.tensors.size).toBe(sound.length);
        expect(new Map(source.metadata)).toEqual(strings);
      }),
      { numRuns: 60 },
    );
  });

  it('does not depend on the order of declarations or of metadata', async () => {
    const strings = new Map([
      ['b', '2'],
      ['a', '1'],
    ]);
    const one = await writeAll(join(scratch.path, 'one.safetensors'), pair, strings);
    const other = await writeAll(join(scratch.path, 'other.safetensors'), [...pair].reverse(), new Map([...strings].reverse()));
    expect(Buffer.compare(one, other)).toBe(0);
  });

  it('sorts names by their UTF-8 bytes', async () => {
    const path = join(scratch.path, 'names.safetensors');
    // In UTF-16, JavaScript's own order, the last name would come before the one before it; "Z" and "a" differ under locales.
    const sorted = ['Z', 'a', 'a.b', '\uffee', '\u{1f600}'];
    await writeAll(
      path,
      [...sorted].reverse().map((name) => ({ name, dtype: 'U8', shape: [1] })),
    );
    await using source = await openSafetensors(path);
    expect([...source.tensors.keys()]).toEqual(sorted);
  });

  it('takes rows in any order', async () => {
    const path = join(scratch.path, 'rows.safetensors');
    const matrix = bytesOf(32);
    await using sink = await createSafetensorsSink(path, pair);
    await sink.writeRows('matrix', 3, matrix.subarray(24));
    await Promise.all([sink.writeRows('matrix', 0, matrix.subarray(0, 8)), sink.writeRows('bytes', 0, bytesOf(3))]);
    await sink.writeRows('matrix', 1, matrix.subarray(8, 24));
    await sink.writeRows('matrix', 4, new Uint8Array(0));
    await sink.finalize();
    await using source = await openSafetensors(path);
    expect((await source.read('matrix')).data).toEqual(matrix);
  });

  it('may hold no tensors, or only empty ones', async () => {
    const none = await writeAll(join(scratch.path, 'none.safetensors'), []);
    expect(Buffer.from(none).toString('latin1')).toBe('\x08\0\0\0\0\0\0\0{}      ');
    await using sink = await createSafetensorsSink(join(scratch.path, 'empty.safetensors'), [
      { name: 'e', dtype: 'F16', shape: [0, 5] },
    ]);
    await sink.finalize();
    await using source = await openSafetensors(join(scratch.path, 'empty.safetensors'));
    expect(source.tensors.get('e')).toMatchObject({ shape: [0, 5], byteLength: 0 });
  });
});

describe('a sink', () => {
  it('shows nothing under the final name before finalize, and leaves nothing when it is given up', async () => {
    const folder = scratch.folder();
    const path = join(folder, 'model.safetensors');
    {
      await using sink = await createSafetensorsSink(path, pair);
      await sink.write('bytes', bytesOf(3));
      expect(readdirSync(folder)).toEqual(['model.safetensors.partial']);
    }
    expect(readdirSync(folder)).toEqual([]);
    await writeAll(path, pair);
    expect(readdirSync(folder)).toEqual(['model.safetensors']);
  });

  it('keeps a file of that name until the new one is whole, and clears what a killed run left', async () => {
    const path = join(scratch.folder(), 'model.safetensors');
    writeFileSync(path, 'old');
    writeFileSync(`${path}.partial`, 'left over, and longer than the header that replaces it'.repeat(100));
    {
      await using _ = await createSafetensorsSink(path, pair);
      expect(readFileSync(path, 'utf8')).toBe('old');
    }
    expect(readFileSync(path, 'utf8')).toBe('old');
    writeFileSync(`${path}.partial`, 'left over, and longer than the header that replaces it'.repeat(100));
    await writeAll(path, pair);
    await using source = await openSafetensors(path);
    expect(source.tensors.size).toBe(2);
  });

  it.each<[string, (sink: Awaited<ReturnType<typeof createSafetensorsSink>>) => Promise<void>, string]>([
    ['bytes that were written before', (sink) => sink.write('matrix', bytesOf(32)), 'written twice'],
    [
      'rows that were written before',
      (sink) => sink.writeRows('matrix', 1, bytesOf(8)),
      'bytes [8, 16) of tensor "matrix" are written twice',
    ],
    ['tensors it was not told of', (sink) => sink.write('other', bytesOf(1)), 'tensor "other" was not declared'],
    ['too few bytes', (sink) => sink.write('bytes', bytesOf(2)), 'takes 3 bytes, but 2 were given'],
    ['part of a row', (sink) => sink.writeRows('matrix', 2, bytesOf(7)), '7 bytes from row 2 on'],
    ['rows past the end', (sink) => sink.writeRows('matrix', 3, bytesOf(16)), '4 rows of 8 bytes, but 16 bytes from row 3 on'],
    ['rows before the start', (sink) => sink.writeRows('matrix', -1, bytesOf(8)), '8 bytes from row -1 on'],
  ])('refuses %s', async (_, write, message) => {
    await using sink = await createSafetensorsSink(join(scratch.folder(), 'x.safetensors'), pair);
    await sink.writeRows('matrix', 0, bytesOf(16));
    await expect(write(sink)).rejects.toThrow(message);
  });

  it('refuses rows of a scalar', async () => {
    await using sink = await createSafetensorsSink(join(scratch.folder(), 'x.safetensors'), [
      { name: 's', dtype: 'U8', shape: [] },
    ]);
    await expect(sink.writeRows('s', 0, bytesOf(1))).rejects.toThrow('is a scalar and has no rows');
  });

  it('does not finalize a file with a gap, and names the gap', async () => {
    const path = join(scratch.folder(), 'x.safetensors');
    await using sink = await createSafetensorsSink(path, pair);
    await sink.write('bytes', bytesOf(3));
    await sink.writeRows('matrix', 0, bytesOf(8));
    await sink.writeRows('matrix', 3, bytesOf(8));
    await expect(sink.finalize()).rejects.toThrow('bytes [8, 24) of tensor "matrix" were never written');
    expect(existsSync(path)).toBe(false);
    await sink.writeRows('matrix', 1, bytesOf(16));
    await sink.finalize();
    await expect(sink.write('bytes', bytesOf(3))).rejects.toThrow('is published');
    await expect(sink.finalize()).rejects.toThrow('is published');
  });

  it.each<[string, readonly TensorDeclaration[], string]>([
    ['a name twice', [pair[0], pair[0]], 'declared twice'],
    ['an element type the format lacks', [{ name: 'a', dtype: 'U4', shape: [2] }], 'U4, which a safetensors file cannot hold'],
    ['the metadata key as a name', [{ name: '__metadata__', dtype: 'U8', shape: [2] }], 'cannot hold a tensor named'],
    ['a name readers refuse', [{ name: '__proto__', dtype: 'U8', shape: [2] }], 'cannot hold a tensor named'],
    ['a name without UTF-8', [{ name: '\ud800', dtype: 'U8', shape: [2] }], 'cannot hold a tensor named'],
    ['a negative dimension', [{ name: 'a', dtype: 'U8', shape: [-1] }], 'is no shape'],
  ])('refuses %s before it creates a file', async (_, declared, message) => {
    const folder = scratch.folder();
    await expect(createSafetensorsSink(join(folder, 'x.safetensors'), declared)).rejects.toThrow(message);
    expect(readdirSync(folder)).toEqual([]);
  });
});

describe('a full disk', () => {
  afterEach(() => {
    vi.restoreAllMocks();
  });

  it('is one clear line with the file and its size, and leaves nothing', async () => {
    const folder = scratch.folder();
    const path = join(folder, 'model.safetensors');
    {
      await using sink = await createSafetensorsSink(path, pair);
      const handle = await open(`${path}.partial`);
      const write = vi.spyOn(Object.getPrototypeOf(handle) as typeof handle, 'write');
      await handle.close();
      write.mockRejectedValue(Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' }));
      await expect(sink.write('bytes', bytesOf(3))).rejects.toMatchObject({
        code: 'DISK_FULL',
        message: `${path}: the disk is full; the file takes ${sink.byteLength} bytes`,
      });
      write.mockRestore();
      await expect(sink.finalize()).rejects.toThrow('is failed');
    }
    expect(readdirSync(folder)).toEqual([]);
  });

  it('is told apart from a folder that is not there', async () => {
    const path = join(scratch.path, 'absent', 'x.safetensors');
    await expect(createSafetensorsSink(path, pair)).rejects.toMatchObject({ code: 'FILE_UNREADABLE' });
  });
});
