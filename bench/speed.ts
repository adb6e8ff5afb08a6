/**
 * Speed and memory of `pcomp quantize --method slim-llm` on real shapes: `npx tsx bench/speed.ts [lab] [7b-1] [7b-2] [7b-4] [1b-2]`.
 * Each case is two runs of the command line, one for each preset, in processes of their own. Rows replace those of the same case in
 * bench/results/speed.{json,md}. Needs 2 GB of disk for the largest case.
 *
 * Counted work, in flops (a multiply-add is two). Per block, T tokens in windows of S, sites (m, n), inputs of n features:
 *   forward       2 T m n per site, and 2 T S d for attention: two products over the causal half, d = heads x head size. Once to measure
 *                 the block, once more to move the text on, which the last block does not need
 *   Hessian       T n^2 per input: the symmetric half is computed
 *   allocation    per site of four groups or more, 2 T m n for its outputs, 2 T m n for the outputs at N bits, 2 T m c for all moves,
 *                 c being the columns that move: 2 groups x (floor(G / 2) - 1)
 *   factor        n^3 / 3 for the Cholesky factorization and n^3 / 3 for the triangular inverse per input, in fp64
 *   GPTQ          m n^2 per site
 * Preset best goes forward once in the float model to share the budget out, then once in the float and once in the quantized model, input
 * by input. It makes every Hessian twice, factors it four times (three transforms, then the one chosen, whose factor alone is inverted), and has no
 * allocation by outputs, but
 *   drift         2 T n^2 per input for the moment between the two models (7/8 of the tokens), 4 m n^2 per site for the correction
 *   polish        6 m n^2 per site: three sweeps, in each the errors times H
 *   sensitivity   forward on the first 2048 tokens (fewer in models of more than 12 blocks): the float block, the block with an error, and every earlier block's error once more; on
 *                 512 tokens: the block with the error of one site, for each
 * Softmaxes, the search of scales, decoding, packing, hashing, reading and writing count as no work: they lower the share.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { createEngine } from '../src/compute/ort.ts';
import type { Model } from '../src/model/model.ts';
import { nominalGroupSize, quantizeRecipe } from '../src/runs/quantize/recipe.ts';
import { measureGemm } from './gemm-rate.ts';
import { quantizeInProcess } from './quantize-process.ts';
import { earlierRows, type Row, writeResults } from './results.ts';
import { SHAPES, writeSynthetic } from './synthetic.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const LAB = root('fixtures/lab/base');

const PRESETS = ['paper', 'best'] as const;
type Preset = (typeof PRESETS)[number];

interface Case {
  /** Makes the model in `folder`, or names one that is there. */
  readonly model: (folder: string) => Promise<string>;
  readonly samples: number;
  readonly sequenceLength: number;
}

const synthetic = (shape: keyof typeof SHAPES, blocks: number): Case => ({
  model: async (folder) => {
    await writeSynthetic(folder, SHAPES[shape], blocks, LAB);
    return folder;
  },
  samples: 8,
  sequenceLength: 2048,
});

const CASES: Readonly<Record<string, Case>> = {
  lab: { model: async () => LAB, samples: 128, sequenceLength: 256 },
  '7b-1': synthetic('7b', 1),
  '7b-2': synthetic('7b', 2),
  '7b-4': synthetic('7b', 4),
  '1b-2': synthetic('1b', 2),
};

const names = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(CASES);
for (const name of names) {
  if (!Object.hasOwn(CASES, name)) throw new Error(`no case "${name}"; there are ${Object.keys(CASES).join(', ')}`);
}
for (const name of names) {
  const made = await measure(name, CASES[name]);
  const rows = [...(await earlierRows('speed')).filter((earlier) => earlier['case'] !== name), ...made];
  rows.sort((a, b) => order(a) - order(b));
  await writeResults('speed', 'npx tsx bench/speed.ts', rows, [
    'Share: counted work (see bench/speed.ts) over seconds, against the fp32 GEMM rate (2048 cubed) measured before and after the run. ' +
      'Share of CPU time: the same over processor seconds; where it is well above the share, other work held the cores or one of them idled.',
  ]);
}

async function measure(name: string, { model, samples, sequenceLength }: Case): Promise<Row[]> {
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-speed-'));
  try {
    const folder = await model(join(scratch, 'model'));
    const rows: Row[] = [];
    for (const preset of PRESETS) {
      const row: Row = { case: name, ...(await measurePreset(folder, join(scratch, preset), preset, samples, sequenceLength)) };
      const times = (key: string) => (rows.length === 0 ? 1 : Math.round((100 * Number(row[key])) / Number(rows[0][key])) / 100);
      rows.push({ ...row, 'seconds / paper': times('seconds'), 'CPU seconds / paper': times('CPU seconds') });
      console.error(JSON.stringify(rows.at(-1)));
    }
    return rows;
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

async function measurePreset(
  folder: string,
  output: string,
  preset: Preset,
  samples: number,
  sequenceLength: number,
): Promise<Row> {
  const before = await gemm();
  const { passes, run, cpuSeconds } = await quantizeInProcess(folder, output, { preset, samples, sequenceLength });
  const after = await gemm();
  const rate = (before.rate + after.rate) / 2;
  const perCpuSecond = (before.perCpuSecond + after.perCpuSecond) / 2;
  const tokens = samples * sequenceLength;
  if (!passes.includes(`${tokens} tokens`)) throw new Error(`${folder} should take ${tokens} tokens, but: ${passes}`);
  await using source = await openModelSource(folder);
  const flops = countFlops(source.model, tokens, sequenceLength, preset);
  const achieved = flops / run.seconds / 1e9;
  return {
    preset,
    blocks: source.model.blocks.length,
    tokens,
    seconds: Math.round(run.seconds * 10) / 10,
    'CPU seconds': Math.round(cpuSeconds * 10) / 10,
    'peak RSS, MB': Math.round(run.peakBytes / 1e6),
    'counted TFLOP': Math.round(flops / 1e10) / 100,
    'GFLOP/s': Math.round(achieved),
    'GEMM, GFLOP/s': Math.round(rate),
    'share, %': Math.round((100 * achieved) / rate),
    'share of CPU time, %': Math.round((100 * flops) / cpuSeconds / 1e9 / perCpuSecond),
  };
}

/** Measured on an engine of its own, so that its memory and threads are gone while the command runs. */
async function gemm(): Promise<{ rate: number; perCpuSecond: number }> {
  await using engine = await createEngine();
  return await measureGemm(engine);
}

/** Work of a whole run; see the top of this file. */
function countFlops({ blocks, shape }: Model, tokens: number, sequence: number, preset: Preset): number {
  const groupSize = nominalGroupSize(quantizeRecipe({ method: 'slim-llm', bits: 2 }, 1));
  const best = preset === 'best';
  let flops = 0;
  for (const block of blocks) {
    let forward = 2 * tokens * sequence * shape.headCount * shape.headDim;
    for (const { outFeatures, inFeatures } of block.sites) {
      const groups = Math.ceil(inFeatures / groupSize);
      const product = 2 * tokens * outFeatures * inFeatures;
      forward += product;
      if (best) flops += 10 * outFeatures * inFeatures ** 2;
      else if (groups >= 4) flops += 2 * product + 2 * tokens * outFeatures * 2 * groupSize * (Math.floor(groups / 2) - 1);
      flops += outFeatures * inFeatures ** 2;
    }
    for (const features of new Map(block.sites.map((site) => [site.input, site.inFeatures])).values()) {
      flops += (best ? 2 : 1) * tokens * features ** 2 + ((best ? 5 : 2) / 3) * features ** 3;
      if (best) flops += (7 / 8) * 2 * tokens * features ** 2;
    }
    const last = block === blocks.at(-1);
    // To the last input only, the down projection being the rest; counted whole.
    flops += forward * (best ? 3 : last ? 1 : 2);
    if (best)
      flops += (forward / tokens) * ((2 + block.index) * Math.min(tokens, 2048) + block.sites.length * Math.min(tokens, 512));
  }
  return flops;
}

function order(row: Row): number {
  return Object.keys(CASES).indexOf(String(row['case']));
}
