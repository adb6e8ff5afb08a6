/**
 * How time and memory of `pcomp quantize` grow with rows, columns, tokens and depth: `npx tsx bench/scaling.ts [rows]
 * [columns] [tokens] [depth]`, about two minutes on an idle machine of two cores. Small synthetic blocks; each point is a run of the command line in a process of its own. Along rows the layers
 * quantized are gate_proj and up_proj of (rows, 1024), along columns down_proj of (1024, columns); forward passes take the whole block.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { quantizeInProcess } from './quantize-process.ts';
import { earlierRows, type Row, writeResults } from './results.ts';
import { writeSynthetic } from './synthetic.ts';

const LAB = fileURLToPath(new URL('../fixtures/lab/base', import.meta.url));
const PRESETS = ['paper', 'best'] as const;
const SEQUENCE = 256;

/** What one axis does to the model and the text. */
interface Axis {
  readonly sizes: readonly number[];
  /** Globs of what is quantized; default: everything. */
  readonly only?: readonly string[];
  readonly hidden?: number;
  /** Width of the MLP; default 1024. */
  readonly intermediate?: (size: number) => number;
  readonly tokens?: (size: number) => number;
  readonly blocks?: (size: number) => number;
}

const AXES: Readonly<Record<string, Axis>> = {
  rows: { sizes: [1024, 2048, 4096], only: ['*.mlp.gate_proj', '*.mlp.up_proj'], hidden: 1024, intermediate: (size) => size },
  columns: { sizes: [1024, 2048, 4096], only: ['*.mlp.down_proj'], hidden: 1024, intermediate: (size) => size },
  tokens: { sizes: [2048, 4096, 8192], tokens: (size) => size },
  depth: { sizes: [1, 2, 4], blocks: (size) => size },
};

const names = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(AXES);
for (const name of names) {
  if (!Object.hasOwn(AXES, name)) throw new Error(`no axis "${name}"; there are ${Object.keys(AXES).join(', ')}`);
}
for (const name of names) {
  const rows = [...(await earlierRows('scaling')).filter(({ axis }) => axis !== name), ...(await measure(name, AXES[name]))];
  rows.sort((a, b) => order(a) - order(b));
  await writeResults('scaling', 'npx tsx bench/scaling.ts', rows, [
    'CPU seconds are of the whole process: 3 to 4 of them start it and compile the program from source. Elsewhere than along its own axis: 2048 tokens in ' +
      'windows of 256, one block. Made on a machine shared with other work: compare rows of one axis, and no seconds.',
  ]);
}

async function measure(axis: string, { sizes, only, hidden = 512, intermediate, tokens, blocks }: Axis): Promise<Row[]> {
  const rows: Row[] = [];
  for (const preset of PRESETS) {
    let before: number | undefined;
    for (const size of sizes) {
      const scratch = await mkdtemp(join(tmpdir(), 'pcomp-scaling-'));
      try {
        const model = join(scratch, 'model');
        const shape = { hidden, intermediate: intermediate?.(size) ?? 1024, heads: 8, kvHeads: 8, context: SEQUENCE };
        await writeSynthetic(model, shape, blocks?.(size) ?? 1, LAB);
        const samples = (tokens?.(size) ?? 2048) / SEQUENCE;
        const options = { preset, samples, sequenceLength: SEQUENCE, ...(only && { only }) };
        const { run, cpuSeconds } = await quantizeInProcess(model, join(scratch, 'out'), options);
        rows.push({
          axis,
          size,
          preset,
          seconds: round(run.seconds),
          'CPU seconds': round(cpuSeconds),
          'CPU, times the row before': before === undefined ? '' : round(cpuSeconds / before),
          'peak RSS, MB': Math.round(run.peakBytes / 1e6),
        });
        before = cpuSeconds;
        console.error(JSON.stringify(rows.at(-1)));
      } finally {
        await rm(scratch, { recursive: true, force: true });
      }
    }
  }
  return rows;
}

function order({ axis, preset, size }: Row): number {
  return 1e7 * Object.keys(AXES).indexOf(String(axis)) + 1e6 * PRESETS.indexOf(preset as (typeof PRESETS)[number]) + Number(size);
}

function round(value: number): number {
  return Math.round(100 * value) / 100;
}
