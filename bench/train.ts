/**
 * Speed of training an adapter: steps of 16 windows of 256 tokens on lab/base, LoRA of rank 8 on all linear layers. `npx tsx bench/train.ts [--steps 3]
 * [--threads 2]`; writes bench/results/train.{json,md}.
 *
 * Counted work, in flops (a multiply-add is two), T tokens in windows of S, sites (m, n), hidden size d, vocabulary v:
 *   forward      2 T m n per site, 2 T S d a block for attention (two products over the causal half); twice: the backward pass makes it again,
 *                but for the last product of a block
 *   backward     2 T m n per site for the gradient of its input, 4 T S d a block for attention
 *   weights      2 T m n per site: the gradient of the weight, multiplied down to the factors by 4 r m n, and the update put into it, 2 r m n, twice
 *   head         2 T v d for logits, 2 T v d back
 * `needed` leaves the weights' gradients out: what a branch beside each layer would compute, 2 T m n for 6 T r (m + n). Norms, softmaxes and the optimizer
 * count as no work: they lower the share.
 */
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { Spool } from '../src/calibration/state-store.ts';
import { createEngine } from '../src/compute/ort.ts';
import { createBlas } from '../src/compute/ort-blas.ts';
import { Random } from '../src/compute/random.ts';
import { spendable } from '../src/methods/rank/rank-budget.ts';
import { TRAINING_SCHEDULES } from '../src/methods/rank/training/index.ts';
import type { TrainedModule } from '../src/methods/rank/training/schedule.ts';
import { Trainer } from '../src/runs/adapt/train.ts';
import { measureGemm } from './gemm-rate.ts';
import { earlierRows, writeResults } from './results.ts';

const BASE = fileURLToPath(new URL('../fixtures/lab/base', import.meta.url));
const [WINDOWS, LENGTH, RANK] = [16, 256, 8];

const { values } = parseArgs({
  options: { steps: { type: 'string', default: '3' }, threads: { type: 'string', default: `${availableParallelism()}` } },
});
const [steps, threads] = [Number(values.steps), Number(values.threads)];
await using source = await openModelSource(BASE);
await using engine = await createEngine({ threads });
await using spool = new Spool({ ramBytes: 2 ** 29 });
const { model, weights } = source;
const forward = { model, engine, blas: createBlas(engine), spool, path: BASE };
const sites = model.blocks.flatMap(({ index, sites: own }) => own.map((site) => ({ ...site, block: index })));
const modules: TrainedModule[] = sites.map(({ name, outFeatures, inFeatures, block }) => ({
  ...{ name, outFeatures, inFeatures, block },
  ...{ scale: 1, rank: 0, parameters: new Map() },
}));
const random = new Random(0, 'windows');
const training = Array.from({ length: WINDOWS }, () =>
  Int32Array.from({ length: LENGTH }, () => random.nextBelow(model.shape.vocabSize)),
);
const schedule = TRAINING_SCHEDULES.uniform({
  ...{ steps: 1000, preset: 'best', seed: 0 },
  budget: spendable({ kind: 'r', amount: RANK }, modules),
});
schedule.init(modules);
const rules = { steps: 1000, batch: WINDOWS, learningRate: 2e-4, patience: 0, seed: 0, keptBytes: 2 ** 29 };
const trainer = new Trainer(forward, weights, modules, schedule, { training, heldOut: training.slice(0, 1) }, rules);
await trainer.step();
const [cpu, started] = [process.cpuUsage(), performance.now()];
let best = Infinity;
for (let step = 0; step < steps; step++) {
  const from = performance.now();
  await trainer.step();
  best = Math.min(best, performance.now() - from);
}
const { user, system } = process.cpuUsage(cpu);
const cpuSeconds = (user + system) / 1e6 / steps;
const seconds = (performance.now() - started) / 1000 / steps;
const peak = process.resourceUsage().maxRSS * 1024;
const gemm = await measureGemm(engine);

const T = WINDOWS * LENGTH;
const { hiddenSize: d, vocabSize: v } = model.shape;
const linear = sites.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
const attention = 2 * T * LENGTH * d * model.blocks.length;
const head = 4 * T * v * d;
const last = sites.filter(({ name }) => name.endsWith('.down_proj'));
const again = last.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
const needed = 2 * T * (3 * linear - again) + 4 * attention + head;
const done = needed + 2 * T * linear + 8 * RANK * linear;
const row = {
  threads,
  'seconds a step': seconds,
  'best step, s': best / 1000,
  'CPU seconds a step': cpuSeconds,
  'GFLOP a step': done / 1e9,
  'GFLOP/s, best step': done / best / 1e6,
  'needed GFLOP/s, best step': needed / best / 1e6,
  'GFLOP a CPU second': done / cpuSeconds / 1e9,
  'GEMM, GFLOP/s': gemm.rate,
  'GEMM, GFLOP a CPU second': gemm.perCpuSecond,
  'share, % of CPU time': (100 * done) / cpuSeconds / 1e9 / gemm.perCpuSecond,
  'peak RSS, GB': peak / 1e9,
};
console.error(row);
const others = (await earlierRows('train')).filter((other) => other['threads'] !== threads);
await writeResults(
  'train',
  'npx tsx bench/train.ts',
  [...others, row].sort((a, b) => Number(a['threads']) - Number(b['threads'])),
  ['The machine was shared: compare shares of CPU time; the rate of products is from the same run.'],
);
