/** Whatever ends a merge: nothing under the final name, and a state that --resume turns into the same bytes. */
import { appendFileSync, existsSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import { artifactTree } from '../support/folder-tree.ts';
import { type NamedTensor, nudged, randomTensor, saveFile } from '../support/merge-models.ts';
import { randomSource } from '../support/random.ts';
import { type RunningCli, runCli, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

/** Making models takes a while on a busy machine. */
const SETUP_MS = 120_000;
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);
const TENSORS = 24;
const ARGS = ['a.safetensors', 'b.safetensors', '--base', 'base.safetensors', '--method', 'ties', '--set', 'density=0.3'];
const SETTINGS = [...ARGS, '--shard-size', '8MB', '--threads', '2', '--quiet'];

const run = (output: string, ...flags: string[]) => runCli(['merge', ...SETTINGS, '-o', output, ...flags], { cwd });
const start = (output: string, ...flags: string[]) => startCli(['merge', ...SETTINGS, '-o', output, ...flags], { cwd });

let whole: Record<string, string>;

beforeAll(async () => {
  const base = new Map<string, NamedTensor>();
  for (let i = 0; i < TENSORS; i++) base.set(`layers.${i}.weight`, randomTensor([512, 1024], i));
  await saveFile(at('base.safetensors'), base);
  await saveFile(at('a.safetensors'), nudged(base, 101));
  await saveFile(at('b.safetensors'), nudged(base, 102));
  const first = await run('whole');
  expect(first.code, first.stderr).toBe(0);
  whole = artifactTree(at('whole'));
}, SETUP_MS);

function finished(output: string): number {
  const journal = at(`${output}.partial`, 'parts', 'journal.ndjson');
  return existsSync(journal) ? readFileSync(journal, 'utf8').split('\n').length - 1 : 0;
}

/** Waits until `count` tensors are in the journal. */
async function untilFinished(running: RunningCli, output: string, count: number): Promise<void> {
  while (finished(output) < count) {
    if (running.process.exitCode !== null) throw new Error(`ended early: ${(await running.done).stderr}`);
    await delay(1);
  }
}

describe('a merge that is killed', () => {
  it('at random moments, again and again, ends as if it had not been', async () => {
    const random = randomSource(7);
    const counts: number[] = [];
    for (let kill = 0; kill < 5 && !existsSync(at('random')); kill++) {
      const running = start('random', '--resume');
      await Promise.race([untilFinished(running, 'random', finished('random') + 1).catch(() => undefined), running.done]);
      await delay(60 * random());
      running.process.kill('SIGKILL');
      await running.done;
      counts.push(finished('random'));
    }
    if (!existsSync(at('random'))) expect(await run('random', '--resume')).toMatchObject({ code: 0 });
    expect(artifactTree(at('random')), `killed with ${counts} tensors finished`).toEqual(whole);
    expect(existsSync(at('random.partial'))).toBe(false);
  });

  it('keeps what is in its journal, mistrusts a torn line, and refuses another recipe or other inputs', async () => {
    const running = start('mid');
    await untilFinished(running, 'mid', 2);
    running.process.kill('SIGKILL');
    await running.done;
    expect(existsSync(at('mid'))).toBe(false);
    expect(await run('mid')).toMatchObject({
      code: 2,
      stderr: expect.stringMatching(/unfinished run\. Continue it with --resume/),
    });
    for (const flags of [
      ['--seed', '1'],
      ['--set', 'density=0.4'],
      ['--dtype', 'f16'],
    ]) {
      const other = await run('mid', '--resume', ...flags);
      expect(other).toMatchObject({ code: 2, stderr: expect.stringMatching(/another recipe or from other inputs/) });
    }
    const edited = readFileSync(at('b.safetensors'));
    writeFileSync(at('b.safetensors'), edited.with(edited.byteLength - 1, edited[edited.byteLength - 1] ^ 1));
    expect(await run('mid', '--resume')).toMatchObject({ code: 2, stderr: expect.stringMatching(/from other inputs/) });
    writeFileSync(at('b.safetensors'), edited);

    appendFileSync(at('mid.partial', 'parts', 'journal.ndjson'), '{"tensor":"layers.23.wei');
    const count = finished('mid');
    const { code, stderr } = await run('mid', '--resume', '--threads', '1', '--max-memory', '64MiB');
    expect(code, stderr).toBe(0);
    expect(Number(/note: resuming: (\d+) of 24 tensors are finished/.exec(stderr)?.[1])).toBe(count);
    expect(artifactTree(at('mid'))).toEqual(whole);
  });

  it('starts over when its files were touched', async () => {
    const running = start('touched');
    await untilFinished(running, 'touched', 1);
    running.process.kill('SIGKILL');
    await running.done;
    const artifact = at('touched.partial', 'artifact');
    truncateSync(join(artifact, readdirSync(artifact)[0]), 100);
    const { code, stderr } = await run('touched', '--resume');
    expect({ code }, stderr).toEqual({ code: 0 });
    expect(stderr).toMatch(/note: resuming: 0 of 24/);
    expect(artifactTree(at('touched'))).toEqual(whole);
  });
});

it('Ctrl-C stops a merge with code 130 and leaves what --resume goes on from', async () => {
  const running = start('stopped');
  await untilFinished(running, 'stopped', 1);
  running.process.kill('SIGINT');
  const { code, stdout } = await running.done;
  expect({ code, stdout }).toEqual({ code: 130, stdout: '' });
  expect(existsSync(at('stopped'))).toBe(false);
  expect(finished('stopped')).toBeGreaterThan(0);
  const resumed = await run('stopped', '--resume');
  expect(resumed.code, resumed.stderr).toBe(0);
  expect(artifactTree(at('stopped'))).toEqual(whole);
});

it('--overwrite keeps the old result until the new one is whole', async () => {
  expect((await runCli(['merge', 'a.safetensors', '-o', 'old', '--quiet'], { cwd })).code).toBe(0);
  const old = artifactTree(at('old'));
  expect(await run('old')).toMatchObject({ code: 2, stderr: expect.stringMatching(/old: exists\. Replace it with --overwrite/) });
  const running = start('old', '--overwrite');
  await untilFinished(running, 'old', 1);
  running.process.kill('SIGKILL');
  await running.done;
  expect(artifactTree(at('old'))).toEqual(old);
  expect((await run('old', '--resume')).code).toBe(0);
  expect(artifactTree(at('old'))).toEqual(whole);
});
