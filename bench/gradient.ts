/**
 * Speed of gradients: forward of one Llama block, and its backward pass with what it needs of the forward made again, by the hidden states and all seven weights; beside
 * tfjs with the same block, whose gradients must be the same. `npx tsx bench/gradient.ts`; writes bench/results/gradient.{json,md}. Counted work
 * (gradients.md, section 8): forward 8 S D^2 + 4 S^2 D + 6 S D F flops, forward and backward three times that.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openModelSource } from '../src/artifacts/model-source.ts';
import type { NdArray } from '../src/compute/engine.ts';
import { createEngine } from '../src/compute/ort.ts';
import { pruneModel } from '../src/graph/prune.ts';
import { measureGemm } from './gemm-rate.ts';
import { type Row, writeResults } from './results.ts';
import { writeSynthetic } from './synthetic.ts';
import { tfjsBlock } from './tfjs-block.ts';

const LAB = fileURLToPath(new URL('../fixtures/lab/base', import.meta.url));
const RUNS = 20;
/** `rival`: runs of tfjs. */
const CASES = [
  { hidden: 64, intermediate: 128, heads: 4, kvHeads: 4, context: 32, rival: 5 },
  { hidden: 512, intermediate: 1408, heads: 8, kvHeads: 8, context: 256, rival: 1 },
  { hidden: 1024, intermediate: 2816, heads: 16, kvHeads: 16, context: 512, rival: 0 },
];
/** Of the largest gradient: two orders of sums in float32. */
const SAME = 1e-3;

type Run = () => unknown;

/** Least processor milliseconds of each, run in turns: other work on the machine then slows all of them alike. */
async function leastMilliseconds(runs: readonly Run[], times: number): Promise<number[]> {
  const least = runs.map(() => Number.POSITIVE_INFINITY);
  for (let time = 0; time < times; time++) {
    for (const [i, run] of runs.entries()) {
      const before = process.cpuUsage();
      await run();
      const { user, system } = process.cpuUsage(before);
      least[i] = Math.min(least[i], (user + system) / 1000);
    }
  }
  return least;
}

function largestDifference(a: Float32Array, b: Float32Array): number {
  let [difference, most] = [0, 0];
  for (let i = 0; i < a.length; i++) {
    difference = Math.max(difference, Math.abs(a[i] - b[i]));
    most = Math.max(most, Math.abs(b[i]));
  }
  return difference / most;
}

const rows: Row[] = [];
await using engine = await createEngine({ threads: 1 });
const gemm = (await measureGemm(engine)).perCpuSecond;
for (const { rival, ...shape } of CASES) {
  const folder = await mkdtemp(join(tmpdir(), 'pcomp-gradient-'));
  try {
    await writeSynthetic(folder, shape, 1, LAB);
    await using source = await openModelSource(folder);
    const { model, weights } = source;
    const { hidden: d, intermediate: f, context: s, heads } = shape;
    const [block] = model.blocks;
    const forward = model.blockGraph(block, s);
    const backward = model.blockGradient(block, { batch: 1, sequence: s });
    const gradients = ['hidden_cotangent', ...backward.sites.values()];
    const states = Float32Array.from({ length: s * d }, (_, i) => Math.sin(i));
    const cotangent = Float32Array.from({ length: s * d }, (_, i) => Math.cos(i));
    const values: Record<string, NdArray> = {
      hidden: { dtype: 'F32', shape: [1, s, d], data: states },
      cotangent: { dtype: 'F32', shape: [1, s, d], data: cotangent },
      lengths: { dtype: 'I32', shape: [1], data: Int32Array.of(s) },
    };
    for (const [name, from] of backward.weights) {
      const data = typeof from === 'string' ? await weights.load(from) : await weights.loadSite(from);
      const dims = typeof from === 'string' ? [data.length] : [from.outFeatures, from.inFeatures];
      values[name] = { dtype: 'F32', shape: dims, data };
    }
    const run = async (graph: typeof forward.model, outputs: readonly string[]) => {
      const program = await engine.compile(graph);
      const feeds = Object.fromEntries(program.inputNames.map((name) => [name, values[name]]));
      // Results go where those of the last run are, as they do on the way through a model.
      const into = await program.run(feeds, { outputs });
      return () => program.run(feeds, { outputs, into });
    };
    const ahead = await run(forward.model, ['hidden_out']);
    const back = await run(pruneModel(backward.model, gradients), gradients);
    await ahead();
    await back();
    const [forwardMs, bothMs] = await leastMilliseconds([ahead, back], RUNS);
    const flops = 8 * s * d * d + 4 * s * s * d + 6 * s * d * f;
    let tfjs: Row = {};
    if (rival > 0) {
      const find = (suffix: string) => Object.entries(values).find(([name]) => name.endsWith(`${suffix}.weight`))![1];
      const theirs = tfjsBlock(
        { hidden: d, heads, context: s },
        (suffix) => ({ data: find(suffix).data as Float32Array, shape: find(suffix).shape }),
        states,
        cotangent,
      );
      const own = await back();
      let made: Float32Array[] = [];
      // The small case before this one has warmed it up.
      const [tfjsMs] = await leastMilliseconds([() => (made = theirs.gradients())], rival);
      const [ofHidden, ...ofMatrices] = made;
      const found = theirs.names.slice(1).map((name) => {
        const site = block.sites.find((other) => other.name.endsWith(name))!;
        return own[backward.sites.get(site.name)!].data as Float32Array;
      });
      const differences = [
        largestDifference(own['hidden_cotangent'].data as Float32Array, ofHidden),
        ...found.map((gradient, i) => largestDifference(gradient, ofMatrices[i])),
      ];
      const difference = Math.max(...differences);
      if (!(difference < SAME)) throw new Error(`gradients differ from those of tfjs by ${difference} of the largest`);
      tfjs = { 'tfjs, ms': tfjsMs, 'times faster': tfjsMs / bothMs, 'largest difference': difference };
    }
    rows.push({
      block: `D ${d}, H ${heads}, S ${s}, F ${f}`,
      'forward, ms': forwardMs,
      'forward and backward, ms': bothMs,
      ratio: bothMs / forwardMs,
      'GFLOP/s': (3 * flops) / bothMs / 1e6,
      'share of GEMM, %': (100 * 3 * flops) / bothMs / 1e6 / gemm,
      ...tfjs,
    });
    console.error(JSON.stringify(rows.at(-1)));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
await writeResults('gradient', 'npx tsx bench/gradient.ts', rows, [
  'Least processor time of 20 runs in turns, one thread (tfjs: of 5 at D 64, 1 at D 512). The forward pass is that of calibration, with fused attention; the backward pass makes a plain one again inside, up to what it needs (not the last product). tfjs is @tensorflow/tfjs with its cpu backend: the block in its own operators, forward and backward by tf.grads; the differences are of the largest entry of each gradient. The rate of GEMM is per second of processor time too, taken first: shares above 100 % say that the machine was busier then.',
]);
