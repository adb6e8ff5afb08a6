import { spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { OutputFolder } from '../../src/artifacts/output-folder.ts';
import { EnvironmentError, RecipeError } from '../../src/errors.ts';

let root: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'pcomp-output-'));
});
afterEach(() => rmSync(root, { recursive: true }));

const request = (flags: { overwrite?: boolean; resume?: boolean; recipeHash?: string } = {}) => ({
  path: join(root, 'out'),
  recipeHash: 'r1',
  overwrite: false,
  resume: false,
  ...flags,
});

function fill(folder: OutputFolder, text: string): void {
  writeFileSync(join(folder.artifactPath, 'pcomp.json'), text);
  mkdirSync(join(folder.artifactPath, 'onnx'));
  writeFileSync(join(folder.artifactPath, 'onnx', 'model.onnx'), text);
}

async function finished(text: string, flags = {}): Promise<void> {
  await using folder = await OutputFolder.open(request(flags));
  fill(folder, text);
  await folder.finalize();
}

/** What kill -9 leaves: the files as they are, and a lock whose owner is gone. */
async function killed(act: (folder: OutputFolder) => Promise<void> | void, flags = {}): Promise<void> {
  const folder = await OutputFolder.open(request(flags));
  await act(folder);
  const dead = spawnSync(process.execPath, ['-e', '']).pid;
  writeFileSync(join(root, 'out.partial', 'lock'), JSON.stringify({ pid: dead, host: hostname(), start: '1' }));
}

async function withPart(folder: OutputFolder): Promise<void> {
  writeFileSync(join(folder.partsPath, 'block-00000.safetensors'), 'part');
  await folder.keepForResume();
}

const published = () => readFileSync(join(root, 'out', 'onnx', 'model.onnx'), 'utf8');

describe('an output folder', () => {
  it('appears whole under its name at the end, and nothing is left beside it', async () => {
    await using folder = await OutputFolder.open(request());
    fill(folder, 'new');
    expect(existsSync(join(root, 'out'))).toBe(false);
    await folder.finalize();
    expect(published()).toBe('new');
    expect(readdirSync(root)).toEqual(['out']);
  });

  it('is refused before any work when it exists, and replaced when asked', async () => {
    await finished('old');
    await expect(OutputFolder.open(request())).rejects.toThrow(/--overwrite/);
    await expect(OutputFolder.check(request())).rejects.toThrow(RecipeError);
    expect(readdirSync(root)).toEqual(['out']);
    await finished('new', { overwrite: true });
    expect(published()).toBe('new');
    expect(readdirSync(root)).toEqual(['out']);
  });

  it('never replaces what pcomp did not write', async () => {
    mkdirSync(join(root, 'out'));
    writeFileSync(join(root, 'out', 'thesis.txt'), 'mine');
    await expect(OutputFolder.open(request({ overwrite: true }))).rejects.toThrow(/no pcomp\.json/);
    rmSync(join(root, 'out'), { recursive: true });
    mkdirSync(join(root, 'out.partial'));
    writeFileSync(join(root, 'out.partial', 'thesis.txt'), 'mine');
    await expect(OutputFolder.open(request({ overwrite: true }))).rejects.toThrow(/not an unfinished pcomp run/);
    expect(readdirSync(join(root, 'out.partial'))).toEqual(['thesis.txt']);
  });

  it('takes a link to nowhere for something that exists', async () => {
    symlinkSync(join(root, 'nowhere'), join(root, 'out'));
    await expect(OutputFolder.check(request())).rejects.toThrow(/out: exists/);
    await expect(OutputFolder.check(request({ overwrite: true }))).rejects.toThrow(/no pcomp\.json/);
  });

  it('takes a state that says nothing for none', async () => {
    mkdirSync(join(root, 'out.partial'));
    writeFileSync(join(root, 'out.partial', 'state.json'), 'null');
    await using folder = await OutputFolder.open(request({ resume: true }));
    expect(folder.resumed).toBe(false);
  });

  it('leaves nothing when it is given up before the first finished part', async () => {
    {
      await using folder = await OutputFolder.open(request());
      fill(folder, 'half');
    }
    expect(readdirSync(root)).toEqual([]);
  });

  it('leaves its parts when it is given up after one, and resumes them', async () => {
    {
      await using folder = await OutputFolder.open(request());
      await withPart(folder);
      fill(folder, 'half');
    }
    expect(readdirSync(join(root, 'out.partial')).sort()).toEqual(['parts', 'state.json']);
    await expect(OutputFolder.open(request())).rejects.toThrow(/--resume/);
    await expect(OutputFolder.open(request({ resume: true, recipeHash: 'r2' }))).rejects.toThrow(/another recipe/);
    await using folder = await OutputFolder.open(request({ resume: true }));
    expect(folder.resumed).toBe(true);
    expect(readdirSync(folder.partsPath)).toEqual(['block-00000.safetensors']);
    expect(readdirSync(folder.artifactPath)).toEqual([]);
  });

  it('discards an unfinished run when asked to overwrite', async () => {
    await killed(withPart);
    await using folder = await OutputFolder.open(request({ overwrite: true, recipeHash: 'r2' }));
    expect(folder.resumed).toBe(false);
    expect(readdirSync(folder.partsPath)).toEqual([]);
  });

  it('has nothing to resume once it is finished, and starts afresh when there never was anything', async () => {
    {
      await using folder = await OutputFolder.open(request({ resume: true }));
      expect(folder.resumed).toBe(false);
    }
    await finished('new');
    await expect(OutputFolder.open(request({ resume: true }))).rejects.toThrow(/nothing to resume/);
  });
});

describe('the lock of an output folder', () => {
  it('keeps a second run out while the first lives, whatever its flags', async () => {
    await using _first = await OutputFolder.open(request());
    for (const flags of [{}, { overwrite: true }, { resume: true }]) {
      const error = await OutputFolder.open(request(flags)).then(
        () => undefined,
        (thrown: unknown) => thrown,
      );
      expect(error).toBeInstanceOf(EnvironmentError);
      expect(error).toMatchObject({ code: 'OUTPUT_BUSY', message: expect.stringContaining(`process ${process.pid}`) });
    }
  });

  it('is taken over from a dead process, from a reused pid, and from a torn file', async () => {
    for (const lock of [
      '',
      JSON.stringify({ pid: 2 ** 22 - 3, host: hostname(), start: '1' }),
      JSON.stringify({ pid: process.pid, host: hostname(), start: '1' }),
    ]) {
      mkdirSync(join(root, 'out.partial'));
      writeFileSync(join(root, 'out.partial', 'lock'), lock);
      const folder = await OutputFolder.open(request());
      await folder[Symbol.asyncDispose]();
    }
    expect(readdirSync(root)).toEqual([]);
  });

  it('is believed when it names another machine', async () => {
    mkdirSync(join(root, 'out.partial'));
    writeFileSync(join(root, 'out.partial', 'lock'), JSON.stringify({ pid: 1, host: `not-${hostname()}`, start: '' }));
    await expect(OutputFolder.open(request())).rejects.toMatchObject({ code: 'OUTPUT_BUSY' });
  });
});

describe('a run killed at a bad moment', () => {
  it('before its first part leaves nothing in the way', async () => {
    await killed((folder) => fill(folder, 'half'));
    expect(existsSync(join(root, 'out'))).toBe(false);
    await finished('new');
    expect(published()).toBe('new');
  });

  it('while the artifact is written, is resumed from its parts', async () => {
    await killed(async (folder) => {
      await withPart(folder);
      fill(folder, 'half');
    });
    await using folder = await OutputFolder.open(request({ resume: true }));
    expect([readdirSync(folder.partsPath).length, readdirSync(folder.artifactPath).length]).toEqual([1, 0]);
  });

  it.each([
    ['before the old output is moved aside', []],
    ['between the two renames', ['aside']],
    ['after the artifact has its name', ['aside', 'named']],
  ])('%s, loses neither the old output nor the work', async (_, moves) => {
    await finished('old');
    await killed(
      async (folder) => {
        await withPart(folder);
        fill(folder, 'new');
        const partial = join(root, 'out.partial');
        writeFileSync(join(partial, 'state.json'), JSON.stringify({ recipeHash: 'r1', overwrite: true, publishing: true }));
        if (moves.includes('aside')) renameSync(join(root, 'out'), join(partial, 'replaced'));
        if (moves.includes('named')) renameSync(folder.artifactPath, join(root, 'out'));
      },
      { overwrite: true },
    );
    await using folder = await OutputFolder.open(request({ resume: true }));
    expect(published()).toBe(moves.includes('named') ? 'new' : 'old');
    expect(folder.resumed).toBe(true);
    fill(folder, 'newer');
    await folder.finalize();
    expect(published()).toBe('newer');
    expect(readdirSync(root)).toEqual(['out']);
  });
});
