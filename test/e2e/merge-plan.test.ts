/** A learned merge, from text to plan to result; and its plan, followed again. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, it } from 'vitest';
import { saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { folderTree } from '../support/folder-tree.ts';
import { nudged, saveFile, weightsOf } from '../support/merge-models.ts';
import { runCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

/** Making models takes a while on a busy machine. */
const SETUP_MS = 120_000;
const scratch = scratchFolder();
const cwd = scratch.path;
const EXPERTS = ['a.safetensors', 'b.safetensors', '--base', 'base', '--quiet'];
const SETTINGS = ['samples=8', 'length=16', 'updates=2', 'chunk_updates=2', 'start=none'];

const run = (output: string, ...args: string[]) => runCli(['merge', ...EXPERTS, ...args, '-o', output], { cwd });

beforeAll(async () => {
  const base = tinyLlama('plan');
  await saveCheckpoint(join(cwd, 'base'), base);
  await saveFile(join(cwd, 'a.safetensors'), nudged(weightsOf(base), 1));
  await saveFile(join(cwd, 'b.safetensors'), nudged(weightsOf(base), 2));
  scratch.write('texts/a.txt', tinyText(600, 1));
  scratch.write('texts/b.txt', tinyText(600, 2));
  const learned = await run('learned', '--set', ...SETTINGS, '--calibration', 'a=texts/a.txt', 'b=texts/b.txt');
  expect(learned.code, learned.stderr).toBe(0);
  expect(learned.stderr).toMatch(/note: merging by expert-merging\+\+, the default with --calibration/);
}, SETUP_MS);

it('a learned merge names its texts by their content, and no folder of the machine', () => {
  const text = readFileSync(join(cwd, 'learned', 'pcomp.json'), 'utf8');
  const manifest = JSON.parse(text) as { recipe: { calibration: string[] }; texts: Record<string, { bytes: number }> };
  expect(manifest.recipe.calibration).toEqual(['a=a.txt', 'b=b.txt']);
  expect(Object.keys(manifest.texts)).toEqual(['calibration/0/a.txt', 'calibration/1/b.txt']);
  expect(text).not.toContain('texts/');
  expect(text).not.toContain(cwd);
});

it('its plan followed again gives the same weights, and is refused for other models', async () => {
  const again = await run('again', '--plan', 'learned/pcomp.json', '--threads', '1', '--max-memory', '64MiB');
  expect(again.code, again.stderr).toBe(0);
  const weights = (folder: string) => folderTree(join(cwd, folder))['model.safetensors'];
  expect(weights('again')).toBe(weights('learned'));

  const bytes = readFileSync(join(cwd, 'b.safetensors'));
  writeFileSync(join(cwd, 'b.safetensors'), bytes.with(bytes.byteLength - 2, bytes[bytes.byteLength - 2] ^ 1));
  const other = await run('other', '--plan', 'learned/pcomp.json');
  writeFileSync(join(cwd, 'b.safetensors'), bytes);
  expect(other).toMatchObject({
    code: 2,
    stdout: '',
    stderr: expect.stringMatching(
      /^pcomp: --plan learned\/pcomp\.json: was learned from other files of b; learn a plan for these\n$/,
    ),
  });
});

it('a text that is not there is one line', async () => {
  const missing = await run('missing', '--calibration', 'a=nowhere.txt', 'b=texts/b.txt');
  expect(missing).toMatchObject({ code: 1, stdout: '' });
  expect(missing.stderr).toMatch(/\npcomp: --calibration nowhere\.txt: cannot be read \(ENOENT\)\n$/);
});
