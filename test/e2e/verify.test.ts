/** `inspect --verify`: a folder is what pcomp wrote, or it says what is not. */
import { appendFileSync, cpSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { verifyArtifact } from '../../src/runs/inspect/verify-artifact.ts';
import { groupedLlama, saveCheckpoint } from '../support/checkpoint-folder.ts';
import { runCli, runCliJson } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...names: string[]) => join(cwd, ...names);

beforeAll(async () => {
  await saveCheckpoint(at('base'), groupedLlama('base'));
  await saveCheckpoint(at('expert'), groupedLlama('expert'));
  const quantize = ['quantize', 'base', '--method', 'rtn', '--bits', '2', '--group-size', '32', '-o', 'quantized'];
  await runCliJson(quantize, { cwd });
  await runCliJson(['merge', 'base', 'expert', '--method', 'linear', '-o', 'merged'], { cwd });
});

/** A copy of an artifact, changed. */
function changed(from: string, change: (...path: string[]) => void): string {
  const folder = scratch.folder();
  cpSync(at(from), folder, { recursive: true });
  change(folder);
  return folder;
}

function flipLastByte(path: string): void {
  const bytes = readFileSync(path);
  bytes[bytes.length - 1] ^= 1;
  writeFileSync(path, bytes);
}

it.each(['quantized', 'merged'])('what was %s is as it was written; other files in the folder do not matter', async (name) => {
  appendFileSync(at(name, 'notes.txt'), 'mine');
  const { code, stdout, stderr } = await runCli(['inspect', name, '--verify'], { cwd });
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  expect(stdout).toMatch(/^\d+ files, [\d.]+ kB: all are as they were written\n$/);
});

describe('a changed artifact', () => {
  it('gives a line for each file, and code 1', async () => {
    const folder = changed('quantized', (path) => {
      rmSync(join(path, 'tokenizer.json'));
      appendFileSync(join(path, 'config.json'), ' ');
      flipLastByte(join(path, 'onnx', 'model_q2.onnx_data'));
    });
    const { code, stdout, stderr } = await runCli(['inspect', folder, '--verify'], { cwd });
    expect(code).toBe(1);
    expect(stdout.trimEnd().split('\n').sort()).toEqual([
      expect.stringMatching(/^config\.json: has \d+ bytes, \d+ were written$/),
      expect.stringMatching(/^onnx\/model_q2\.onnx_data: has SHA-256 [0-9a-f]{64}, [0-9a-f]{64} was written$/),
      'tokenizer.json: is missing',
    ]);
    expect(stderr).toMatch(/^pcomp: \S+: 3 of \d+ files or their tensors differ from pcomp\.json \[not-as-written\]\n$/);
  });

  it('that was merged names the tensor', async () => {
    const folder = changed('merged', (path) => flipLastByte(join(path, 'model.safetensors')));
    const { mismatches } = await verifyArtifact(folder);
    expect(mismatches).toEqual([
      expect.stringMatching(/^model\.safetensors: tensor "\S+" has SHA-256 [0-9a-f]{64}, [0-9a-f]{64} was written$/),
    ]);
  });

  it('that was merged may also have another header', async () => {
    const folder = changed('merged', (path) => {
      const file = join(path, 'model.safetensors');
      const bytes = readFileSync(file);
      bytes[bytes.indexOf('F32')] = 'I'.charCodeAt(0);
      writeFileSync(file, bytes);
    });
    expect((await verifyArtifact(folder)).mismatches).toEqual(['model.safetensors: its header is not the one that was written']);
  });
});

it.each([
  ['{', 'manifest-not-json'],
  ['{}', 'manifest-outputs'],
  ['{"outputs":{"config.json":{"bytes":3}}}', 'manifest-outputs'],
])('a pcomp.json that is %s is refused', async (text, rule) => {
  const folder = changed('quantized', (path) => writeFileSync(join(path, 'pcomp.json'), text));
  await expect(verifyArtifact(folder)).rejects.toMatchObject({ rule });
});
