/**
 * Time, peak memory and share of this machine's GEMM rate of `pcomp quantize --bits 2`, each case a process of its own.
 * `npx tsx bench/speed.ts [lab] [7b-2] [7b-4] [1b-2]`; writes bench/results/speed.{json,md}. Synthetic checkpoints are made and removed.
 */
import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { createEngine } from '../src/compute/ort.ts';
import type { QuantizeOutcome } from '../src/index.ts';
import type { Model } from '../src/model/model.ts';
import { measureGemmRate } from './gemm-rate.ts';
import { type Row, writeResults } from './results.ts';
import { SHAPES, writeSynthetic } from './synthetic.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const LAB = root('fixtures/lab/base');
const TEXT = root('fixtures/lab/text/python.train.txt');

/** Name -> synthetic shape and blocks; `lab` is the model that ships. */
const CASES = {
  lab: { samples: 128, sequenceLength: 256 },
  '7b-2': { shape: SHAPES['7b'], blocks: 2, samples: 8, sequenceLength: 2048 },
  '7b-4': { shape: SHAPES['7b'], blocks: 4, samples: 8, sequenceLength: 2048 },
  '1b-2': { shape: SHAPES['1b'], blocks: 2, samples: 8, sequenceLength: 2048 },
} as const;

/**
 * Floating-point operations of the run, multiplications and additions each counted: two forward passes a block (one for the last), the
 * symmetric half of each Hessian, Cholesky and triangular inverse of each, slim-llm's trial products (the original, the uniform trial, and one
 * more in pieces for all the moves, where a layer has at least 4 groups), and the propagation of GPTQ. Attention, softmaxes and grid searches are left out.
 */
function countedWork(model: Model, tokens: number): number {
  let work = 0;
  for (const block of model.blocks) {
    const inputs = new Map(block.sites.map((site) => [site.input, site.inFeatures]));
    for (const n of inputs.values()) work += tokens * n * n + (2 / 3) * n ** 3;
    const passes = block === model.blocks.at(-1) ? 1 : 2;
    for (const { inFeatures: n, outFeatures: m } of block.sites) {
      const trials = Math.ceil(n / 128) >= 4 ? 3 : 0;
      work += 2 * tokens * m * n * (passes + trials) + m * n * n;
    }
  }
  return work;
}

async function run(name: keyof typeof CASES, scratch: string): Promise<Row> {
  const { samples, sequenceLength, ...synthetic } = CASES[name];
  const model = 'shape' in synthetic ? join(scratch, name) : LAB;
  if ('shape' in synthetic) await writeSynthetic(model, synthetic.shape, synthetic.blocks, LAB);
  const threads = availableParallelism();
  let rate: number;
  {
    await using engine = await createEngine({ threads });
    rate = await measureGemmRate(engine);
  }
  const flags = ['--bits', '2', '--samples', String(samples), '--sequence-length', String(sequenceLength), '--calibration', TEXT];
  const args = [
    '--import',
    'tsx',
    root('cli/pcomp.ts'),
    'quantize',
    model,
    ...flags,
    '-o',
    join(scratch, `${name}-out`),
    '--json',
  ];
  const { stdout } = await promisify(execFile)(process.execPath, args, { cwd: root('.'), maxBuffer: 2 ** 28 });
  const outcome = JSON.parse(stdout) as QuantizeOutcome;
  if (outcome.run === undefined) throw new Error(`${name}: nothing was run`);
  await using source = await openModelSource(model);
  const work = countedWork(source.model, samples * sequenceLength);
  const { seconds, peakBytes } = outcome.run;
  const achieved = work / seconds / 1e9;
  return {
    case: name,
    blocks: source.model.blocks.length,
    tokens: samples * sequenceLength,
    seconds,
    'seconds/block': seconds / source.model.blocks.length,
    'peak GB': peakBytes / 1e9,
    'counted TFLOP': work / 1e12,
    'GFLOP/s': achieved,
    'GEMM GFLOP/s': rate,
    share: achieved / rate,
  };
}

const names = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(CASES);
const scratch = await mkdtemp(join(tmpdir(), 'pcomp-speed-'));
const rows: Row[] = [];
try {
  for (const name of names) {
    if (!(name in CASES)) throw new Error(`no case ${name}; there are ${Object.keys(CASES).join(', ')}`);
    rows.push(await run(name as keyof typeof CASES, scratch));
    console.error(rows.at(-1));
    await rm(join(scratch, name), { recursive: true, force: true });
  }
} finally {
  await rm(scratch, { recursive: true, force: true });
}
await writeResults('speed', `npx tsx bench/speed.ts ${names.join(' ')}`, rows);
