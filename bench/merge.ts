/**
 * Speed and memory of `pcomp merge` beside a copy of the same bytes: `npm run build && npx tsx bench/merge.ts [GB of each checkpoint, default 1]`.
 * Three BF16 checkpoints of 7B block shapes: two experts and their base, or three experts for methods without a base. Each row is one run of
 * the command line in a process of its own. `copy` reads the inputs and writes a result of their size, with nothing in between, by one
 * thread, until it is on the disk, as a merge's is when it ends; "copy to memory" is the same without waiting for the disk. `share` is the copy's time over
 * the run's, start of the process included, and `share of CPU` the same of processor seconds of all threads together: on a machine with other work only
 * these mean something. Rows go to bench/results/merge.{json,md}.
 */
import { execFile } from 'node:child_process';
import { closeSync, fdatasyncSync, openSync, readSync, writeSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { fromFloat32 } from '../formats/dtype.ts';
import { createSafetensorsSink } from '../formats/safetensors/writer.ts';
import { type Row, writeResults } from './results.ts';

const PROGRAM = fileURLToPath(new URL('../dist/cli/pcomp.js', import.meta.url));
const NAMES = ['a', 'b', 'base'] as const;
/** Of one block of a 7B model: q, k, v, o, gate, up, down, and two norms. */
const SHAPES: readonly (readonly number[])[] = [
  ...Array.from({ length: 4 }, () => [4096, 4096]),
  [11008, 4096],
  [11008, 4096],
  [4096, 11008],
  [4096],
  [4096],
];
const PIECE = 16 * 1024 * 1024;

/** Numbers that look like weights; where in this noise a tensor begins tells models and tensors apart. */
const noise = fromFloat32(
  'BF16',
  Float32Array.from({ length: 1 << 23 }, (_, i) => Math.sin(i * 12.9898 + Math.floor(i / 7) * 78.233) * 0.05),
);

async function writeCheckpoint(path: string, gigabytes: number, seed: number): Promise<void> {
  const blockBytes = SHAPES.reduce((sum, shape) => sum + 2 * shape.reduce((product, size) => product * size, 1), 0);
  const blocks = Math.max(1, Math.round((gigabytes * 1e9) / blockBytes));
  const tensors = Array.from({ length: blocks }, (_, block) =>
    SHAPES.map((shape, i) => ({ name: `model.layers.${block}.${i}.weight`, dtype: 'BF16' as const, shape })),
  ).flat();
  await using sink = await createSafetensorsSink(path, tensors);
  for (const [i, { name, shape }] of tensors.entries()) {
    const rowBytes = 2 * (shape[1] ?? 1);
    const rows = Math.floor(PIECE / 2 / rowBytes);
    for (let row = 0; row < shape[0]; row += rows) {
      const length = rowBytes * Math.min(rows, shape[0] - row);
      const offset = ((seed * 7919 + i * 104_729 + row) * 64) % (noise.byteLength - length);
      await sink.writeRows(name, row, noise.subarray(offset, offset + length));
    }
  }
  await sink.finalize();
}

interface CopyTimes {
  readonly seconds: number;
  /** Until the bytes are on the disk, which is when a merge ends too. */
  readonly syncedSeconds: number;
  readonly cpuSeconds: number;
}

/** On the clock and of the processor, to read the inputs and write as many bytes as one of them has. */
function copySeconds(inputs: readonly string[], output: string): CopyTimes {
  const started = performance.now();
  const before = process.cpuUsage();
  const buffer = new Uint8Array(PIECE);
  const out = openSync(output, 'w');
  for (const [i, input] of inputs.entries()) {
    const file = openSync(input, 'r');
    for (let length = readSync(file, buffer); length > 0; length = readSync(file, buffer)) {
      if (i === 0) writeSync(out, buffer, 0, length);
    }
    closeSync(file);
  }
  const written = performance.now();
  fdatasyncSync(out);
  closeSync(out);
  const { user, system } = process.cpuUsage(before);
  return {
    seconds: (written - started) / 1000,
    syncedSeconds: (performance.now() - started) / 1000,
    cpuSeconds: (user + system) / 1e6,
  };
}

/** The least of two: the first may wait for what was written before it. */
async function leastCopy(inputs: readonly string[], output: string): Promise<CopyTimes> {
  const times: CopyTimes[] = [];
  for (let run = 0; run < 2; run++) {
    times.push(copySeconds(inputs, output));
    await rm(output);
  }
  const least = (key: keyof CopyTimes) => Math.min(...times.map((time) => time[key]));
  return { seconds: least('seconds'), syncedSeconds: least('syncedSeconds'), cpuSeconds: least('cpuSeconds') };
}

const gigabytes = Number(process.argv[2] ?? 1);
const folder = await mkdtemp(join(tmpdir(), 'pcomp-bench-merge-'));
const rows: Row[] = [];
try {
  await mkdir(folder, { recursive: true });
  const path = (name: string) => join(folder, `${name}.safetensors`);
  for (const [seed, name] of NAMES.entries()) await writeCheckpoint(path(name), gigabytes, seed);
  const { size } = await stat(path('base'));
  const merges: [string, string[], string[]][] = [
    ['linear', NAMES.map(path), []],
    ['task-arithmetic', [path('a'), path('b')], ['--base', path('base')]],
    ['ties', [path('a'), path('b')], ['--base', path('base'), '--set', 'density=0.2']],
    ['dare-ties', [path('a'), path('b')], ['--base', path('base'), '--set', 'density=0.2']],
    ['slerp', [path('a')], ['--base', path('base'), '--set', 't=0.3']],
  ];
  for (const [method, experts, flags] of merges) {
    const inputs = method === 'linear' ? experts : [...experts, path('base')];
    const copy = await leastCopy(inputs, path('copy'));
    const out = join(folder, 'out');
    const started = performance.now();
    const args = ['merge', ...experts, ...flags, '--method', method, '-o', out, '--max-memory', '512MiB', '--quiet'];
    await promisify(execFile)(process.execPath, [PROGRAM, ...args]);
    const seconds = (performance.now() - started) / 1000;
    const { run } = JSON.parse(await readFile(join(out, 'report.json'), 'utf8')) as {
      run: { peakBytes: number; cpuSeconds: number };
    };
    await rm(out, { recursive: true });
    rows.push({
      method,
      'checkpoint GB': size / 1e9,
      'copy s': copy.syncedSeconds,
      'merge s': seconds,
      share: copy.syncedSeconds / seconds,
      'copy to memory s': copy.seconds,
      'share of it': copy.seconds / seconds,
      'copy CPU s': copy.cpuSeconds,
      'merge CPU s': run.cpuSeconds,
      'GB/s': ((inputs.length + 1) * size) / 1e9 / seconds,
      'MB per CPU s': ((inputs.length + 1) * size) / 1e6 / run.cpuSeconds,
      'share of CPU': copy.cpuSeconds / run.cpuSeconds,
      'peak RSS MB': Math.round(run.peakBytes / 1e6),
    });
    console.log(rows.at(-1));
  }
  await writeResults('merge', `npm run build && npx tsx bench/merge.ts ${gigabytes}`, rows, [
    'Inputs in the page cache. GB and MB count the bytes of the inputs, once, and of the result. --max-memory 512MiB.',
    ...process.argv.slice(3),
  ]);
} finally {
  await rm(folder, { recursive: true, force: true });
}
