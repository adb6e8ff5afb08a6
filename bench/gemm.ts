/** Speed of the matrix products that everything else stands on. Run: `npx tsx bench/gemm.ts [--large]`; the table goes to stdout. */

import { createEngine } from '../src/compute/ort.ts';
import { createBlas } from '../src/compute/ort-blas.ts';
import { Random } from '../src/compute/random.ts';
import { bestSeconds, measureGemmRate } from './gemm-rate.ts';

const large = process.argv.includes('--large');
await using engine = await createEngine();
const blas = createBlas(engine);

const random = new Random(0, 'bench/gemm');
const matrix = (rows: number, columns: number) => ({
  rows,
  columns,
  data: Float32Array.from({ length: rows * columns }, () => random.nextFloat() - 0.5),
});

const rate = await measureGemmRate(engine);
console.log(`${engine.runtime}, ${engine.device}, ${engine.threads} threads`);
console.log(`fp32 GEMM 2048^3            ${rate.toFixed(0)} GFLOP/s`);

const report = (name: string, seconds: number, flops: number): void => {
  const own = flops / seconds / 1e9;
  const share = `${((100 * own) / rate).toFixed(0)} % of GEMM`;
  console.log(`${name.padEnd(27)} ${(seconds * 1000).toFixed(0).padStart(6)} ms ${own.toFixed(0).padStart(6)} GFLOP/s ${share}`);
};

// The symmetric half is what has to be computed: tokens * features^2 flops.
for (const [tokens, features] of large
  ? [[2048, 11008]]
  : [
      [2048, 512],
      [2048, 4096],
    ]) {
  const x = matrix(tokens, features);
  const gram = blas.gram(features);
  report(`Gram ${tokens} x ${features}`, await bestSeconds(3, () => gram.add(x)), tokens * features ** 2);
}

for (const n of large ? [11008] : [1024, 2048, 4096]) {
  const hessian = await dampedGram(n);
  report(`inverseFactor ${n}`, await bestSeconds(large ? 1 : 2, () => blas.inverseFactor(hessian, n)), (2 / 3) * n ** 3);
}

for (const [rows, columns] of [
  [2048, 512],
  [512, 11008],
]) {
  const target = matrix(rows, columns);
  const trial = matrix(rows, columns);
  const direct = await bestSeconds(3, () => blas.meanKl(target, trial));
  const prepared = await blas.klTarget(target);
  const repeated = await bestSeconds(3, () => prepared.meanKl(trial));
  const perElement = (seconds: number): string => ((seconds * 1e9) / (rows * columns)).toFixed(2);
  console.log(`KL ${rows} x ${columns}`.padEnd(27), `${perElement(direct)} ns per logit, prepared ${perElement(repeated)}`);
}

async function dampedGram(n: number): Promise<Float64Array> {
  const gram = blas.gram(n);
  await gram.add(matrix(Math.min(2 * n, 4096), n));
  const hessian = gram.finish();
  for (let i = 0; i < n; i++) hessian[i * n + i] += 0.01;
  return hessian;
}
