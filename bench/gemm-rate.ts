/** This machine's fp32 GEMM rate: what other benchmarks give their own rates as a share of, measured in the same run. */

import type { Engine } from '../src/compute/engine.ts';
import { createBlas } from '../src/compute/ort-blas.ts';

const SIZE = 2048;
const RUNS = 5;

/** GFLOP/s (2 n^3 per product) of a (2048, 2048) by (2048, 2048) fp32 product on the engine, best of five. */
export async function measureGemmRate(engine: Engine): Promise<number> {
  return (await measureGemm(engine)).rate;
}

/** The same, and GFLOP per second of processor time: on a machine with other work the first suffers, the second hardly. */
export async function measureGemm(engine: Engine): Promise<{ rate: number; perCpuSecond: number }> {
  const blas = createBlas(engine);
  const matrix = () => ({ rows: SIZE, columns: SIZE, data: new Float32Array(SIZE * SIZE).fill(0.5) });
  const [a, b, out] = [matrix(), matrix(), matrix()];
  const product = () => blas.gemm(a, b, { out });
  await product();
  const before = process.cpuUsage();
  const seconds = await bestSeconds(RUNS, product);
  const { user, system } = process.cpuUsage(before);
  const gflop = (2 * SIZE ** 3) / 1e9;
  return { rate: gflop / seconds, perCpuSecond: ((RUNS + 1) * gflop) / ((user + system) / 1e6) };
}

/** Shortest of some runs, in seconds, after one that is not counted. */
export async function bestSeconds(runs: number, task: () => Promise<unknown>): Promise<number> {
  await task();
  let best = Number.POSITIVE_INFINITY;
  for (let run = 0; run < runs; run++) {
    const start = performance.now();
    await task();
    best = Math.min(best, performance.now() - start);
  }
  return best / 1000;
}
