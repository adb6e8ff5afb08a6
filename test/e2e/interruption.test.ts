/** Whatever ends a run: nothing half under the final name, and a state that --resume turns into the same bytes. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { beforeAll, describe, expect, it, onTestFinished } from 'vitest';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { artifactTree, folderTree } from '../support/folder-tree.ts';
import { randomSource } from '../support/random.ts';
import { type RunningCli, runCli, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const cwd = scratch.path;
const BLOCKS = 8;
/** A moment, on a busy machine. */
const ANSWER_MS = 2000;
const at = (...path: string[]) => join(cwd, ...path);
const command = (output: string, ...more: string[]) => [
  ...['quantize', 'model', '--bits', '2', '--group-size', '32', '--calibration', 'text.txt', '--samples', '32', '--quiet'],
  ...['--preset', 'paper'],
  ...['-o', output, ...more],
];
const run = (output: string, ...more: string[]) => runCli(command(output, ...more), { cwd });
const start = (output: string, ...more: string[]) => startCli(command(output, ...more), { cwd });

/** What an uninterrupted run writes. */
let whole: Record<string, string>;

beforeAll(async () => {
  await saveCheckpoint(at('model'), groupedLlama('interruption', { num_hidden_layers: BLOCKS }));
  scratch.write('text.txt', tinyText(3000));
  expect(await run('whole')).toMatchObject({ code: 0 });
  whole = artifactTree(at('whole'));
});

/** Waits until block `index` is stored. */
async function untilStored(running: RunningCli, output: string, index: number): Promise<void> {
  const part = at(`${output}.partial`, 'parts', `block-0000${index}.safetensors`);
  while (!existsSync(part)) {
    if (running.process.exitCode !== null) throw new Error(`ended early: ${(await running.done).stderr}`);
    await delay(2);
  }
}

describe('a run that is killed', () => {
  it('at random moments, again and again, leaves no output and ends as if it had not been', async () => {
    const random = randomSource(20);
    const blocks: number[] = [];
    for (let kill = 0; kill < 6; kill++) {
      const running = start('random', '--resume');
      // Somewhere in one of the next blocks, or in the writing that follows the last.
      await untilStored(running, 'random', Math.min(blocksOf('random') + Math.floor(2 * random()), BLOCKS - 1));
      await delay((blocks.at(-1) === BLOCKS ? 1200 : 80) * random());
      running.process.kill('SIGKILL');
      await running.done;
      // Either not there, or moved there whole in the instant before the kill.
      if (existsSync(at('random'))) break;
      blocks.push(blocksOf('random'));
    }
    if (!existsSync(at('random'))) expect(await run('random', '--resume')).toMatchObject({ code: 0 });
    expect(artifactTree(at('random')), `killed with ${blocks} blocks finished`).toEqual(whole);
    expect(blocks).toEqual(blocks.toSorted((a, b) => a - b));
    expect(new Set(blocks).size).toBeGreaterThan(1);
  });

  it('goes on after its last finished block, when the recipe is the same', async () => {
    const running = start('mid');
    await untilStored(running, 'mid', 2);
    running.process.kill('SIGKILL');
    await running.done;
    expect(existsSync(at('mid'))).toBe(false);

    const again = await run('mid');
    expect(again).toMatchObject({
      code: 2,
      stderr: expect.stringMatching(/unfinished run\. Continue it with --resume, or discard it with --overwrite/),
    });
    const other = await run('mid', '--resume', '--seed', '5');
    expect(other).toMatchObject({
      code: 2,
      stderr: expect.stringMatching(/^pcomp: --resume: .*another recipe or from other inputs/),
    });
    writeFileSync(at('text.txt'), 'other text');
    const edited = await run('mid', '--resume');
    expect(edited).toMatchObject({ code: 2, stderr: expect.stringMatching(/another recipe or from other inputs/) });
    writeFileSync(at('text.txt'), tinyText(3000));

    const resumed = await run('mid', '--resume');
    expect(resumed.code).toBe(0);
    const finished = Number(/note: resuming: (\d) of 8 blocks are finished/.exec(resumed.stderr)?.[1]);
    expect(finished).toBeGreaterThanOrEqual(3);
    expect(artifactTree(at('mid'))).toEqual(whole);
    expect(existsSync(at('mid.partial'))).toBe(false);
  });
});

function blocksOf(output: string): number {
  const parts = at(`${output}.partial`, 'parts');
  return existsSync(parts) ? readdirSync(parts).filter((name) => name.endsWith('.safetensors')).length : 0;
}

describe('Ctrl-C', () => {
  it('stops a run with code 130 and leaves what --resume goes on from', async () => {
    const running = start('stopped');
    await untilStored(running, 'stopped', 1);
    running.process.kill('SIGINT');
    const { code, stdout, stderr } = await running.done;
    expect({ code, stdout }).toEqual({ code: 130, stdout: '' });
    expect(stderr).toMatch(/pcomp: stopping; what --resume can use is kept\n$/);
    expect(existsSync(at('stopped'))).toBe(false);
    expect(readdirSync(at('stopped.partial'))).toEqual(expect.arrayContaining(['parts', 'state.json']));

    const resumed = await run('stopped', '--resume');
    expect(resumed).toMatchObject({ code: 0, stderr: expect.stringMatching(/note: resuming: [2-8] of 8/) });
    expect(artifactTree(at('stopped'))).toEqual(whole);
  });

  it('is answered at once, and ends a run that comes to no safe point', async ({ skip }) => {
    const pipe = at('pipe.txt');
    skip(spawnSync('mkfifo', [pipe]).status !== 0, 'this system has no named pipes');
    const running = startCli(['evaluate', 'model', '--text', pipe], { cwd });
    // Opened when the run opens it, and nothing is written: the run waits for its text, and hears nothing.
    await using writer = await open(pipe, 'w');
    expect(writer.fd).toBeGreaterThan(0);
    const asked = performance.now();
    running.process.kill('SIGINT');
    const answered = new Promise<number>((resolve) => {
      running.process.stderr.once('data', () => resolve(performance.now() - asked));
    });
    expect(await running.done).toEqual({ code: 130, stdout: '', stderr: '\npcomp: stopping; what --resume can use is kept\n' });
    expect(await answered).toBeLessThan(ANSWER_MS);
    expect(performance.now() - asked).toBeLessThan(1000 + ANSWER_MS);
  });

  it('twice stops at once, and evaluate stops too', async () => {
    const running = start('twice');
    await untilStored(running, 'twice', 0);
    running.process.kill('SIGINT');
    running.process.kill('SIGINT');
    expect((await running.done).code).toBe(130);
    expect(existsSync(at('twice'))).toBe(false);
    expect((await run('twice', '--resume')).code).toBe(0);

    const evaluation = startCli(['evaluate', 'model', '--text', 'text.txt', '--sequence-length', '2'], { cwd });
    evaluation.process.stderr.once('data', () => evaluation.process.kill('SIGINT'));
    expect(await evaluation.done).toMatchObject({ code: 130, stdout: '' });
  });
});

it('of two runs on one output the second is refused and the first is not disturbed', async () => {
  const first = start('shared');
  await untilStored(first, 'shared', 0);
  for (const flags of [[], ['--resume'], ['--overwrite']]) {
    const second = await run('shared', ...flags);
    if (existsSync(at('shared'))) break;
    expect(second).toMatchObject({ code: 1, stdout: '' });
    expect(second.stderr).toMatch(new RegExp(`^pcomp: .*lock: process ${first.process.pid} on .* is working on this output\\.`));
    expect(second.stderr.trim().split('\n')).toHaveLength(1);
  }
  expect(await first.done).toMatchObject({ code: 0 });
  expect(artifactTree(at('shared'))).toEqual(whole);
});

it('--overwrite keeps the old output until the new one is whole', async () => {
  expect(
    await runCli(['quantize', 'model', '--bits', '4', '--method', 'rtn', '--preset', 'paper', '--quiet', '-o', 'old'], { cwd }),
  ).toMatchObject({
    code: 0,
  });
  const old = folderTree(at('old'));
  const running = start('old', '--overwrite');
  await untilStored(running, 'old', 3);
  running.process.kill('SIGKILL');
  await running.done;
  expect(folderTree(at('old'))).toEqual(old);
  expect((await run('old', '--resume')).code).toBe(0);
  expect(artifactTree(at('old'))).toEqual(whole);
  expect(existsSync(at('old.partial'))).toBe(false);
});

describe('a full disk', () => {
  it.for([
    ['before the first block is finished', '24k', 0],
    ['while the artifact is written', '330k', BLOCKS],
  ] as const)('%s is one line, and leaves room for --resume', async ([, size, finished], { skip }) => {
    const disk = at(`disk-${size}`);
    mkdirSync(disk);
    const mount = (options: string) => spawnSync('mount', ['-t', 'tmpfs', '-o', options, 'tmpfs', disk], { encoding: 'utf8' });
    const mounted = mount(`size=${size}`);
    skip(mounted.status !== 0, `a small disk cannot be mounted here (${mounted.error?.message ?? mounted.stderr.trim()})`);
    onTestFinished(() => {
      spawnSync('umount', [disk]);
    });
    const output = join(disk, 'out');
    const full = await run(output);
    expect({ code: full.code, stdout: full.stdout }).toEqual({ code: 1, stdout: '' });
    expect(full.stderr).toMatch(/^pcomp: .*(disk is full|no space left).*\n$/);
    expect(existsSync(output)).toBe(false);
    if (finished === 0) expect(readdirSync(disk)).toEqual([]);
    else expect(readdirSync(join(`${output}.partial`, 'parts'))).toHaveLength(finished);

    expect(mount(`remount,size=8m`).status).toBe(0);
    const resumed = await run(output, '--resume');
    expect(resumed.code, resumed.stderr).toBe(0);
    expect(artifactTree(output)).toEqual(whole);
    expect(JSON.parse(readFileSync(join(output, 'report.json'), 'utf8')).resumed).toBe(finished > 0);
  });
});
