import { symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openSharded } from '../../../formats/safetensors/shards.ts';
import { FormatError } from '../../../src/errors.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { entry, safetensorsBytes } from '../malformed/safetensors.ts';

const scratch = scratchFolder();
const INDEX = 'model.safetensors.index.json';

/** A shard whose tensors each hold one byte: its place in the list. */
function shard(names: readonly string[], metadata: Record<string, string> = {}): Uint8Array {
  const entries = names.map((name, i) => `${JSON.stringify(name)}:${entry('U8', '[1]', `[${i},${i + 1}]`)}`);
  const bytes = safetensorsBytes(`{${[`"__metadata__":${JSON.stringify(metadata)}`, ...entries].join(',')}}`, names.length);
  bytes.set(
    names.map((_, i) => i),
    bytes.byteLength - names.length,
  );
  return bytes;
}

/** Writes an index and files beside it; returns the index's path. */
function checkpoint(index: unknown, files: Readonly<Record<string, Uint8Array | string>> = {}): string {
  const folder = scratch.folder();
  for (const [name, content] of Object.entries(files)) writeFileSync(join(folder, name), content);
  writeFileSync(join(folder, INDEX), typeof index === 'string' || index instanceof Uint8Array ? index : JSON.stringify(index));
  return join(folder, INDEX);
}

const sound = { metadata: { total_size: 1 }, weight_map: { a: '1.safetensors', b: '2.safetensors', c: '1.safetensors' } };
const files = {
  '1.safetensors': shard(['a', 'c'], { format: 'pt', of: 'one' }),
  '2.safetensors': shard(['b'], { of: 'two', only: '2' }),
};

describe('openSharded', () => {
  it('reads each tensor from its shard, whatever total_size says', async () => {
    const path = checkpoint(sound, files);
    await using source = await openSharded(path);
    expect([...source.tensors.keys()]).toEqual(['a', 'c', 'b']);
    expect((await source.read('c')).data).toEqual(Uint8Array.of(1));
    expect((await source.readRows('b', 0, 1)).data).toEqual(Uint8Array.of(0));
    await expect(source.read('d')).rejects.toMatchObject({ rule: 'tensor-missing', path });
    expect(source.shards.map(({ tensors }) => tensors.size)).toEqual([2, 1]);
    expect(Object.fromEntries(source.metadata)).toEqual({ format: 'pt', of: 'one', only: '2' });
    expect(source.files.map((file) => file.path.slice(path.length - INDEX.length))).toEqual([
      INDEX,
      '1.safetensors',
      '2.safetensors',
    ]);
    const bytes = source.files.reduce((sum, file) => sum + file.byteLength, 0);
    expect(bytes).toBe(JSON.stringify(sound).length + files['1.safetensors'].byteLength + files['2.safetensors'].byteLength);
  });

  it('follows links that lead elsewhere, as download caches lay them out', async () => {
    const target = scratch.write('blobs/0123abcd', shard(['a']));
    const path = checkpoint({ weight_map: { a: 'x.safetensors' } });
    symlinkSync(target, join(path, '..', 'x.safetensors'));
    await using source = await openSharded(path);
    expect(source.tensors.size).toBe(1);
  });

  it.each([
    '../1.safetensors',
    'sub/../../1.safetensors',
    '/etc/passwd',
    '//host/share',
    './1.safetensors',
    '..',
    '.',
    '',
    'sub//1.safetensors',
    '..\\1.safetensors',
    'sub\\1.safetensors',
    'C:\\1.safetensors',
    'C:1.safetensors',
    'https://example.org/1.safetensors',
    'file:1.safetensors',
    '1.safetensors\0.txt',
  ])('refuses the shard name %j, which may leave the folder', async (name) => {
    const path = checkpoint({ weight_map: { a: name } }, files);
    await expect(openSharded(path)).rejects.toMatchObject({ rule: 'index-shard-outside-folder', path });
  });

  it.each<[string, string, unknown, Readonly<Record<string, Uint8Array | string>>]>([
    ['index-not-utf8', 'an index in Latin-1', Buffer.from('{"weight_map":{"\xe9":"1.safetensors"}}', 'latin1'), files],
    ['index-not-json', 'an index cut short', '{"weight_map":{"a":"1.safe', files],
    ['index-not-object', 'an index that is a list', [], files],
    ['index-weight-map-missing', 'an index without weight_map', { metadata: {} }, files],
    ['index-weight-map-missing', 'a weight_map that is a list', { weight_map: [] }, files],
    ['index-empty', 'an empty weight_map', { weight_map: {} }, files],
    ['index-shard-not-string', 'a shard that is a number', { weight_map: { a: 1 } }, files],
    ['index-key-duplicate', 'a tensor listed twice', '{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}', files],
    ['name-reserved', 'a tensor named __proto__', '{"weight_map":{"__proto__":"1.safetensors"}}', files],
    ['git-lfs-pointer', 'an index that is a Git LFS pointer', 'version https://git-lfs.github.com/spec/v1\noid sha256:00', files],
    ['index-shard-missing', 'a shard that is not there', sound, { '1.safetensors': files['1.safetensors'] }],
    ['index-tensor-missing', 'a tensor its shard lacks', { weight_map: { ...sound.weight_map, d: '2.safetensors' } }, files],
    [
      'index-tensor-missing',
      'a tensor that is in another shard',
      { weight_map: { ...sound.weight_map, c: '2.safetensors' } },
      files,
    ],
    [
      'index-tensor-unlisted',
      'a shard with more than the index lists',
      { weight_map: { a: '1.safetensors', b: '2.safetensors' } },
      files,
    ],
    ['tensor-duplicate', 'a tensor in two shards', sound, { ...files, '2.safetensors': shard(['b', 'a']) }],
    [
      'git-lfs-pointer',
      'a shard that is a Git LFS pointer',
      sound,
      { ...files, '2.safetensors': 'version https://git-lfs.github.com/spec/v1\n' },
    ],
    ['data-truncated', 'a shard cut short', sound, { ...files, '2.safetensors': files['2.safetensors'].subarray(0, -1) }],
  ])('refuses by %s %s', async (rule, _, index, shards) => {
    const error: unknown = await openSharded(checkpoint(index, shards)).catch((reason) => reason);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule });
  });

  it('says how much is in a shard that is not there', async () => {
    const path = checkpoint(sound, { '2.safetensors': files['2.safetensors'] });
    await expect(openSharded(path)).rejects.toThrow('shard "1.safetensors" with 2 of its 3 tensors cannot be opened');
  });
});
