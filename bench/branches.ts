/**
 * Whether low-rank branches pay, by the width of their factors, at equal stored bits: on lab/base (perplexity), and on single synthetic layers of growing size
 * (relative error of outputs on tokens that no one has seen). `npx tsx bench/branches.ts lab [--rows N]` does the next N rows that are not there yet,
 * `npx tsx bench/branches.ts layers [--sizes 256,1024,2048]` those sizes. Rows are kept in bench/results/branches-{lab,layers}.{json,md}.
 *
 * A synthetic layer is square. Weights are Student's t with 4 degrees of freedom, each row of its own size; inputs have a covariance whose
 * eigenvalues fall as 1 / k along rotated axes, and one channel in 128 is 8 times as loud.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { planesStoredBits } from '../src/artifacts/accounting.ts';
import { shapeOfGrid } from '../src/artifacts/planes.ts';
import type { Matrix } from '../src/compute/blas.ts';
import { createEngine } from '../src/compute/ort.ts';
import { createBlas } from '../src/compute/ort-blas.ts';
import { Random } from '../src/compute/random.ts';
import { evaluate, type QuantizeRequest, quantize, quantizeRecipe } from '../src/index.ts';
import { BEST_QUANTIZERS } from '../src/methods/quantize/index.ts';
import { componentBits, FACTOR_BITS, factorStorage } from '../src/methods/quantize/low-rank.ts';
import { dequantize, type QuantizedLinear } from '../src/methods/quantize/quantized-linear.ts';
import type { QuantizeContext } from '../src/methods/quantize/quantizer.ts';
import { addBranchTo } from '../src/runs/quantize/branches.ts';
import { earlierRows, type Row, writeResults } from './results.ts';

const root = (path: string) => fileURLToPath(new URL(`../fixtures/lab/${path}`, import.meta.url));
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { rows: { type: 'string', default: '99' }, sizes: { type: 'string', default: '256,1024,2048' } },
});
const threads = availableParallelism();
const SHARED = 'The machine was shared: times are not comparable.';

if (positionals[0] === 'lab') await lab(Number(values.rows));
else if (positionals[0] === 'layers') await layers(values.sizes.split(',').map(Number));
else throw new Error('lab or layers?');

async function lab(most: number): Promise<void> {
  const branch = 'bpw=0.1';
  const requests: [string, QuantizeRequest][] = [
    ['--bits 2', { bits: 2 }],
    ...FACTOR_BITS.map((bits): [string, QuantizeRequest] => [
      `--bits 2 --lowrank ${branch} --lowrank-bits ${bits}`,
      { bits: 2, lowrank: branch, lowrankBits: bits },
    ]),
    ['--bpw 2.3', { bpw: 2.3 }],
    ...FACTOR_BITS.map((bits): [string, QuantizeRequest] => [
      `--bpw 2.2 --lowrank ${branch} --lowrank-bits ${bits}`,
      { bpw: 2.2, lowrank: branch, lowrankBits: bits },
    ]),
  ];
  const rows = [...(await earlierRows('branches-lab'))];
  const todo = requests.filter(([label]) => !rows.some(({ request }) => request === label)).slice(0, most);
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-branches-'));
  for (const [label, request] of todo) {
    const text = { calibration: [root('text/python.train.txt')], samples: 128, sequenceLength: 256, groupSize: 128 };
    const output = join(scratch, 'out');
    const recipe = quantizeRecipe({ ...request, ...text, formats: ['safetensors'] }, threads);
    const { plan } = await quantize(root('base'), output, recipe, { overwrite: true, resume: false, dryRun: false });
    const scored = await evaluate(output, {
      text: [root('text/python.eval.txt')],
      against: root('base'),
      sequenceLength: 256,
      accuracy: 'exact',
      device: 'cpu',
      threads,
      maxMemory: 2 ** 30,
    });
    rows.push({
      request: label,
      'code bits': scored.averageBits,
      'stored bpw': scored.bitsPerWeight,
      ranks: Object.values(plan!.modules).reduce((sum, { rank = 0 }) => sum + rank, 0),
      perplexity: scored.perplexity,
      'KL, nats': scored.kl ?? Number.NaN,
    });
    console.error(rows.at(-1));
    const order = new Map(requests.map(([name], i) => [name, i]));
    rows.sort((a, b) => order.get(a['request'] as string)! - order.get(b['request'] as string)!);
    await writeResults('branches-lab', 'npx tsx bench/branches.ts lab', rows, [SHARED]);
  }
  await rm(scratch, { recursive: true, force: true });
}

async function layers(sizes: readonly number[]): Promise<void> {
  await using engine = await createEngine({ threads });
  const blas = createBlas(engine);
  const rows: Row[] = [...(await earlierRows('branches-layers'))];
  for (const n of sizes) {
    const weight = weights(n);
    const seen = tokens(n, 4 * n, 'seen');
    const unseen = tokens(n, 1024, 'unseen');
    const gram = await blas.gemm(seen, seen, { transposeA: true, alpha: 1 / seen.rows });
    const stats = () => ({
      input: 'x',
      features: n,
      tokenCount: seen.rows,
      hessian: Float64Array.from(gram.data),
      async *batches() {
        yield seen;
      },
    });
    const groupSize = n >= 1024 ? 128 : 32;
    const groups = n / groupSize;
    // Two groups of 16 more by one bit cost an eighth of a bit; so may a branch.
    const wide = Math.max(1, Math.round(groups / 8));
    const extra = wide / groups;
    const site = { name: 'layer', outFeatures: n, inFeatures: n, hasBias: false, transposed: false, input: 'x' };
    const context: QuantizeContext = {
      blas,
      note: (_, message) => console.error(message),
      options: {
        preset: 'best',
        bits: 2,
        groupSize,
        dampening: 0.01,
        actOrder: false,
        staticGroups: false,
        symmetric: false,
        lambdaSalience: 1,
        salience: 'code',
      },
    };
    const quantizer = BEST_QUANTIZERS.gptq;
    const clean = (await blas.gemm(unseen, { rows: n, columns: n, data: weight }, { transposeB: true })).data;
    const errorOf = async (q: QuantizedLinear) => {
      const made = (await blas.gemm(unseen, { rows: n, columns: n, data: dequantize(q) }, { transposeB: true })).data;
      let [lost, all] = [0, 0];
      for (let i = 0; i < made.length; i++) {
        lost += (made[i] - clean[i]) ** 2;
        all += clean[i] ** 2;
      }
      return lost / all;
    };
    const add = async (what: string, q: QuantizedLinear) => {
      rows.push({
        layer: `${n} x ${n}`,
        what,
        rank: q.lowRank?.rank ?? 0,
        'stored bpw': planesStoredBits(shapeOfGrid(q)) / (n * n),
        'relative error': await errorOf(q),
      });
      console.error(rows.at(-1));
      await writeResults('branches-layers', 'npx tsx bench/branches.ts layers', rows, [SHARED]);
    };
    const kept = rows.filter(({ layer }) => layer !== `${n} x ${n}`);
    rows.splice(0, rows.length, ...kept);
    const decided = await quantizer.decide(context, site, weight, stats());
    const plain = { ...decided, bits: new Array<number>(groups).fill(2) };
    const codes = await quantizer.apply(context, site, weight, stats(), plain);
    await add('2 bits', codes.quantized);
    // Stored order puts the loudest inputs first, where the transform sorts them.
    const mixed = { ...decided, bits: Array.from({ length: groups }, (_, g) => (g < wide ? 3 : 2)) };
    await add(`2 bits, ${wide} of ${groups} groups 3`, (await quantizer.apply(context, site, weight, stats(), mixed)).quantized);
    for (const bits of FACTOR_BITS) {
      const rank = Math.floor((extra * n * n) / (2 * componentBits(factorStorage(bits), n)));
      if (rank < 1) continue;
      const plan = { ...plain, rank };
      // Statistics are the method's once it has had them.
      const own = stats();
      const result = await quantizer.apply(context, site, weight, own, plan);
      const done = { context, quantizer, site, weight, stats: own, plan, result };
      const { quantized } = await addBranchTo(done, { variant: 'exact', rounds: 2, bits });
      await add(`2 bits and a branch of ${bits} bits`, quantized);
    }
  }
}

/** Student's t with 4 degrees of freedom, rows of unequal size. */
function weights(n: number): Float32Array {
  const random = new Random(0, `weights ${n}`);
  const data = new Float32Array(n * n);
  for (let i = 0; i < n; i++) {
    const size = 0.02 * Math.exp(0.3 * normal(random));
    for (let j = 0; j < n; j++) {
      let chi = 0;
      for (let k = 0; k < 4; k++) chi += normal(random) ** 2;
      data[i * n + j] = (size * normal(random)) / Math.sqrt(chi / 4);
    }
  }
  return data;
}

function tokens(n: number, count: number, name: string): Matrix {
  const random = new Random(0, `tokens ${n} ${name}`);
  const signs = new Random(0, `signs ${n}`);
  const flips = Float32Array.from({ length: n }, () => (signs.nextFloat() < 0.5 ? -1 : 1));
  const data = new Float32Array(count * n);
  for (let t = 0; t < count; t++) {
    const row = data.subarray(t * n, (t + 1) * n);
    for (let k = 0; k < n; k++) row[k] = flips[k] * normal(random) * Math.sqrt(n / (k + 1) / Math.log(n));
    rotate(row);
    for (let j = 0; j < n; j += 128) row[j] *= 8;
  }
  return { rows: count, columns: n, data };
}

/** Times the normalized Hadamard matrix, in place. */
function rotate(row: Float32Array): void {
  for (let half = 1; half < row.length; half *= 2) {
    for (let start = 0; start < row.length; start += 2 * half) {
      for (let j = start; j < start + half; j++) [row[j], row[j + half]] = [row[j] + row[j + half], row[j] - row[j + half]];
    }
  }
  for (let j = 0; j < row.length; j++) row[j] /= Math.sqrt(row.length);
}

function normal(random: Random): number {
  return Math.sqrt(-2 * Math.log(1 - random.nextFloat())) * Math.cos(2 * Math.PI * random.nextFloat());
}
