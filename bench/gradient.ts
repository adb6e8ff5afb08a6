/**
 * Speed of gradients: forward of one Llama block, and its backward pass with the forward made again, by all seven weights.
 * `npx tsx bench/gradient.ts`; writes bench/results/gradient.{json,md}. Counted work (gradients.md, section 8): forward 8 S D^2 + 4 S^2 D + 6 S D F
 * flops, forward and backward three times that.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openModelSource } from '../src/artifacts/model-source.ts';
import type { NdArray } from '../src/compute/engine.ts';
import { createEngine } from '../src/compute/ort.ts';
import { bestSeconds, measureGemmRate } from './gemm-rate.ts';
import { type Row, writeResults } from './results.ts';
import { writeSynthetic } from './synthetic.ts';

const LAB = fileURLToPath(new URL('../fixtures/lab/base', import.meta.url));
const RUNS = 15;
const CASES = [
  { hidden: 64, intermediate: 128, heads: 4, kvHeads: 4, context: 32 },
  { hidden: 512, intermediate: 1408, heads: 8, kvHeads: 8, context: 256 },
  { hidden: 1024, intermediate: 2816, heads: 16, kvHeads: 16, context: 512 },
];

const rows: Row[] = [];
for (const threads of [1, 2]) {
  await using engine = await createEngine({ threads });
  const gemm = await measureGemmRate(engine);
  for (const shape of CASES) {
    const folder = await mkdtemp(join(tmpdir(), 'pcomp-gradient-'));
    try {
      await writeSynthetic(folder, shape, 1, LAB);
      await using source = await openModelSource(folder);
      const { model, weights } = source;
      const { hidden: d, intermediate: f, context: s } = shape;
      const [block] = model.blocks;
      const forward = model.blockGraph(block, s);
      const backward = model.blockGradient(block, { batch: 1, sequence: s });
      const values: Record<string, NdArray> = {
        hidden: { dtype: 'F32', shape: [1, s, d], data: Float32Array.from({ length: s * d }, (_, i) => Math.sin(i)) },
        cotangent: { dtype: 'F32', shape: [1, s, d], data: Float32Array.from({ length: s * d }, (_, i) => Math.cos(i)) },
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
        return () => program.run(feeds, { outputs });
      };
      const ahead = await run(forward.model, ['hidden_out']);
      const back = await run(backward.model, ['hidden_cotangent', ...backward.sites.values()]);
      const seconds = { forward: await bestSeconds(RUNS, ahead), both: await bestSeconds(RUNS, back) };
      const flops = 8 * s * d * d + 4 * s * s * d + 6 * s * d * f;
      rows.push({
        block: `D ${d}, H ${shape.heads}, S ${s}, F ${f}`,
        threads,
        'forward, ms': 1000 * seconds.forward,
        'forward and backward, ms': 1000 * seconds.both,
        ratio: seconds.both / seconds.forward,
        'GFLOP/s': (3 * flops) / seconds.both / 1e9,
        'GEMM, GFLOP/s': gemm,
        'share, %': (100 * 3 * flops) / seconds.both / 1e9 / gemm,
      });
      console.error(JSON.stringify(rows.at(-1)));
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  }
}
await writeResults('gradient', 'npx tsx bench/gradient.ts', rows, [
  'Best of 15 runs. The forward pass is that of calibration, with fused attention; the backward pass makes a plain one again inside.',
]);
