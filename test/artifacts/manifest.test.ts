import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { explainDiskError } from '../../src/artifacts/durable.ts';
import { hashFile, hashFolder, writeJson, writeManifest, writeReport } from '../../src/artifacts/manifest.ts';
import type { QuantizedModule } from '../../src/artifacts/quant-metadata.ts';
import type { StoredModules } from '../../src/artifacts/stored-modules.ts';
import { solvedHashes, verifyModules, weightHash } from '../../src/artifacts/verify.ts';
import { EnvironmentError, PcompError } from '../../src/errors.ts';
import { dequantize } from '../../src/methods/quantize/quantized-linear.ts';
import { randomLinear } from './random-linear.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'pcomp-manifest-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

describe('hashes of files', () => {
  it('are those of their bytes, by paths that mean the same on every system', async () => {
    mkdirSync(join(folder, 'onnx'));
    writeFileSync(join(folder, 'onnx', 'b'), 'bytes');
    writeFileSync(join(folder, 'a'), '');
    const sha256 = (text: string) => createHash('sha256').update(text).digest('hex');
    const hashes = await hashFolder(folder);
    expect(Object.entries(hashes)).toEqual([
      ['a', { bytes: 0, sha256: sha256('') }],
      ['onnx/b', { bytes: 5, sha256: sha256('bytes') }],
    ]);
    expect(await hashFile(join(folder, 'onnx', 'b'))).toEqual(hashes['onnx/b']);
  });
});

describe('the JSON of an artifact', () => {
  it('keeps every value, with lists of numbers on one line', async () => {
    const value = {
      bits: [1, 2, -3.5, 1e-7],
      text: '[\n 1,\n 2 ]  [ 3 ]',
      nested: { list: [[1, 2], []], mixed: [1, 'a'] },
      none: null,
    };
    await writeJson(join(folder, 'x.json'), value);
    const text = readFileSync(join(folder, 'x.json'), 'utf8');
    expect(JSON.parse(text)).toEqual(value);
    expect(text).toContain('"bits": [1, 2, -3.5, 1e-7]');
    expect(readdirSync(folder)).toEqual(['x.json']);
  });

  it('has the manifest and the report under the names that others look for', async () => {
    const empty = {
      command: 'quantize',
      recipe: {},
      plan: { modules: {} },
      seed: 0,
      device: 'cpu',
      versions: {},
      inputs: {},
      outputs: {},
      weights: {},
    };
    await writeManifest(folder, empty);
    await writeReport(folder, { seconds: 1 });
    expect(JSON.parse(readFileSync(join(folder, 'pcomp.json'), 'utf8'))).toEqual({ format: 1, ...empty });
    expect(JSON.parse(readFileSync(join(folder, 'report.json'), 'utf8'))).toEqual({ seconds: 1 });
  });
});

describe('verification', () => {
  const q = randomLinear({ rows: 3, columns: 40, groupSize: 32, bits: [2] });
  const module: QuantizedModule = { outFeatures: 3, inFeatures: 40, groupSize: 32, input: 'm', transposed: false };
  const stored = (weight: Float32Array): StoredModules => ({
    layout: 'planes',
    modules: new Map([['m', module]]),
    owns: () => false,
    decode: async () => weight,
    storage: () => Promise.reject(new Error('not used')),
  });

  it('passes weights that are the same to the bit, and calls any other a bug', async () => {
    const source = { has: () => true, readGrid: async () => q, read: async () => q };
    const expected = await solvedHashes(source, ['m']);
    expect(expected).toEqual(new Map([['m', weightHash(dequantize(q))]]));
    await verifyModules('out', stored(dequantize(q)), expected);
    const off = dequantize(q);
    off[7] = Math.fround(off[7] * (1 + 2 ** -23)) + 2 ** -40;
    const error = await verifyModules('out', stored(off), expected).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(Error);
    expect(error).not.toBeInstanceOf(PcompError);
    expect(String(error)).toMatch(/out: module "m" decodes to other weights/);
  });
});

describe('a full disk', () => {
  it('is one line that says where, and how to go on', () => {
    const full = Object.assign(new Error('write'), { code: 'ENOSPC' });
    const explained = explainDiskError(full, 'out.partial');
    expect(explained).toBeInstanceOf(EnvironmentError);
    expect(explained).toMatchObject({
      code: 'DISK_FULL',
      message: expect.stringMatching(/^out\.partial: no space.*--resume/),
      cause: full,
    });
    const other = new Error('other');
    expect(explainDiskError(other, 'x')).toBe(other);
  });
});
