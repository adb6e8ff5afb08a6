import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { FormatError, RecipeError, UnsupportedError } from '../../src/errors.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { entry, safetensorsBytes } from './malformed/safetensors.ts';

const scratch = scratchFolder();
const dataFolder = process.env['PCOMP_TEST_DATA'] ?? '../shared/data';

/** A file with one tensor of one byte. */
function holding(name: string): Uint8Array {
  return safetensorsBytes(`{"${name}":${entry('U8', '[1]', '[0,1]')}}`, 1);
}

function folderWith(files: Readonly<Record<string, Uint8Array | string>>): string {
  const folder = scratch.folder();
  for (const [name, content] of Object.entries(files)) writeFileSync(join(folder, name), content);
  return folder;
}

async function tensorsIn(path: string): Promise<string[]> {
  await using source = await openCheckpoint(path);
  return [...source.tensors.keys()];
}

const index = JSON.stringify({ weight_map: { indexed: 'part.safetensors' } });

describe('openCheckpoint', () => {
  it('prefers the index, then model.safetensors, then the only other file', async () => {
    const all = {
      'part.safetensors': holding('indexed'),
      'model.safetensors': holding('single'),
      'model.safetensors.index.json': index,
      'config.json': '{}',
    };
    expect(await tensorsIn(folderWith(all))).toEqual(['indexed']);
    const { 'model.safetensors.index.json': _, ...withoutIndex } = all;
    expect(await tensorsIn(folderWith(withoutIndex))).toEqual(['single']);
    expect(await tensorsIn(folderWith({ 'adapter_model.safetensors': holding('adapter') }))).toEqual(['adapter']);
  });

  it('opens a bare file or an index by its path, whatever the file is called', async () => {
    const folder = folderWith({ 'part.safetensors': holding('indexed'), 'other.index.json': index, weights: holding('bare') });
    expect(await tensorsIn(join(folder, 'part.safetensors'))).toEqual(['indexed']);
    expect(await tensorsIn(join(folder, 'other.index.json'))).toEqual(['indexed']);
    expect(await tensorsIn(join(folder, 'weights'))).toEqual(['bare']);
  });

  it('joins a complete series of files that lost its index', async () => {
    const series = { 'm-00001-of-00002.safetensors': holding('a'), 'm-00002-of-00002.safetensors': holding('b') };
    const folder = folderWith(series);
    await using source = await openCheckpoint(folder);
    expect([...source.tensors.keys()]).toEqual(['a', 'b']);
    expect(source.path).toBe(folder);
    expect(source.files).toHaveLength(2);
  });

  it('refuses a series with a file missing, and one tensor in two files', async () => {
    const incomplete = folderWith({ 'm-00001-of-00003.safetensors': holding('a'), 'm-00002-of-00003.safetensors': holding('b') });
    await expect(openCheckpoint(incomplete)).rejects.toMatchObject({ rule: 'shard-missing' });
    await expect(openCheckpoint(folderWith({ 'm-00001-of-00002.safetensors': holding('a') }))).rejects.toMatchObject({
      rule: 'shard-missing',
    });
    const twice = folderWith({ 'm-00001-of-00002.safetensors': holding('a'), 'm-00002-of-00002.safetensors': holding('a') });
    await expect(openCheckpoint(twice)).rejects.toMatchObject({ rule: 'tensor-duplicate' });
  });

  it('does not guess between several checkpoints', async () => {
    const error: unknown = await openCheckpoint(
      folderWith({ 'a.safetensors': holding('a'), 'b.safetensors': holding('b') }),
    ).catch((e) => e);
    expect(error).toBeInstanceOf(RecipeError);
    expect((error as Error).message).toContain('several checkpoints in this folder (a.safetensors, b.safetensors)');
  });

  it('says what it looked for and what it found in a folder without weights', async () => {
    const error: unknown = await openCheckpoint(folderWith({ 'config.json': '{}', 'README.md': '' })).catch((e) => e);
    expect(error).toBeInstanceOf(RecipeError);
    expect((error as Error).message).toMatch(
      /no weights in this folder\. Looked for model\.safetensors\.index\.json, model\.safetensors and other \*\.safetensors; it holds README\.md, config\.json$/,
    );
    await expect(openCheckpoint(scratch.folder())).rejects.toThrow('it is empty');
  });

  it('says so when the path does not exist', async () => {
    const path = join(scratch.path, 'absent');
    await expect(openCheckpoint(path)).rejects.toMatchObject({
      code: 'FILE_UNREADABLE',
      message: `${path}: no such file or folder`,
    });
  });

  it.skipIf(!existsSync(dataFolder))('opens trained checkpoints (skipped without PCOMP_TEST_DATA)', async () => {
    expect(await tensorsIn(join(dataFolder, 'lab/base'))).toContain('model.layers.5.mlp.down_proj.weight');
    expect(await tensorsIn(join(dataFolder, 'lab/lora-shakespeare'))).toContain(
      'base_model.model.model.layers.0.mlp.down_proj.lora_A.weight',
    );
    expect(await tensorsIn(join(dataFolder, 'stories260k'))).toContain('model.embed_tokens.weight');
  });
});

describe('files of another kind', () => {
  const supportedElsewhere: readonly [name: string, bytes: Uint8Array, says: RegExp][] = [
    ['pytorch_model.bin', Buffer.from('PK\x03\x04\x00\x00\x08\x08pytorch_model/data.pkl', 'latin1'), /zip archive, as PyTorch's/],
    ['old.pt', Buffer.from('\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.', 'latin1'), /Python pickle/],
    ['model.gguf', Buffer.from('GGUF\x03\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00', 'latin1'), /GGUF file \(llama\.cpp\)/],
    ['model.onnx', Buffer.from('\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80\x01', 'latin1'), /ONNX model/],
    ['tf_model.h5', Buffer.from('\x89HDF\r\n\x1a\n\x00\x00\x00\x00', 'latin1'), /HDF5 file, as Keras/],
    ['array.npy', Buffer.from('\x93NUMPY\x01\x00v\x00', 'latin1'), /NumPy array/],
  ];

  it.each(supportedElsewhere)(
    '%s is named for what it is, alone, under a wrong name, and in a folder',
    async (name, bytes, says) => {
      const asNamed = scratch.write(name, bytes);
      const renamed = scratch.write(`renamed-${name}.safetensors`, bytes);
      const paths = [asNamed, renamed, folderWith({ [name]: bytes, 'config.json': '{}' })];
      for (const path of paths) {
        const error: unknown = await openCheckpoint(path).catch((e) => e);
        expect(error).toBeInstanceOf(UnsupportedError);
        expect((error as Error).message).toMatch(says);
        expect((error as Error).message).toMatch(/^[^\n]+$/);
      }
    },
  );

  it.each([
    ['git-lfs-pointer', 'version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 10498456\n', 'run "git lfs pull"'],
    ['html-page', '\n<!DOCTYPE html>\n<html lang="en"><title>Sign in</title>', 'web page'],
    ['html-page', '<html><body>504 Gateway Time-out</body></html>', 'web page'],
    ['text-file', 'Entry not found', 'error message that was saved as a file'],
    ['text-file', '{"error":"Repository not found"}', 'error message that was saved as a file'],
  ])('a download that went wrong is refused by %s', async (rule, content, says) => {
    const path = scratch.write(`${rule}-${content.length}.safetensors`, content);
    const error: unknown = await openCheckpoint(path).catch((e) => e);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule, path });
    expect((error as Error).message).toContain(says);
  });

  it('does not mistake a safetensors file for one, whatever its header length looks like', async () => {
    // Lengths whose bytes read "PK\3\0", "\x80\2", "\x08\x0a\x12": headers padded to 0x034b50, 0x0280 and 0x120a08 bytes.
    for (const length of [0x034b50, 0x0280, 0x120a08, 0x2020]) {
      const header = `{"a":${entry('U8', '[1]', '[0,1]')}}`.padEnd(length);
      expect(await tensorsIn(scratch.write(`length-${length}.safetensors`, safetensorsBytes(header, 1)))).toEqual(['a']);
    }
  });
});
