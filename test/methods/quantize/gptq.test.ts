import { describe, expect, test } from 'vitest';
import type { CalibrationStats } from '../../../src/calibration/statistics.ts';
import { type Blas, NotPositiveDefiniteError } from '../../../src/compute/blas.ts';
import { inlineKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { UnsupportedError } from '../../../src/errors.ts';
import { DampedFactor } from '../../../src/methods/quantize/damped-factor.ts';
import { gptq } from '../../../src/methods/quantize/gptq.ts';
import { sweep } from '../../../src/methods/quantize/gptq-core.ts';
import { QUANTIZERS } from '../../../src/methods/quantize/index.ts';
import { dequantize, type QuantizedLinear } from '../../../src/methods/quantize/quantized-linear.ts';
import { rtn } from '../../../src/methods/quantize/rtn.ts';
import { factorOf, naiveBlas, upperOf } from '../../support/naive-blas.ts';
import { damp, gptqOracle, minMaxGrid, outputEnergy, searchedGrid } from '../../support/quantize-oracle.ts';
import { statsOf } from '../../support/reference-layer.ts';
import { contextOf, randomTokens, randomWeight, siteOf } from './support.ts';

/** sum e^2 against the loss, in doubles: exact but for rounding. */
const IDENTITY_TOLERANCE = 1e-8;
/** The same in float32: weights of 0.1 carry errors of 1e-8, errors of 0.01 then 1e-6 each, and the sum is over hundreds of them. */
const FLOAT32_IDENTITY_TOLERANCE = 1e-5;

const SMALL_HESSIAN = Float64Array.of(4, 2, 1, 0, 2, 3, 1, 1, 1, 1, 2, 0.5, 0, 1, 0.5, 1);
const SMALL_WEIGHT = [-0.4, -1.4, -1.4, 1.6];

function statsOfHessian(hessian: Float64Array, features: number): CalibrationStats {
  return { input: 'x', features, tokenCount: 1, hessian, async *batches() {} };
}

/** Counts the factorizations. */
function countingBlas(): Blas & { calls: number } {
  const blas = naiveBlas();
  const counting = {
    ...blas,
    calls: 0,
    inverseFactor: (hessian: Float64Array, n: number) => {
      counting.calls++;
      return blas.inverseFactor(hessian, n);
    },
  };
  return counting;
}

async function naturalFactor(hessian: Float64Array, n: number): Promise<DampedFactor> {
  const upper = await upperOf(naiveBlas(), hessian, n);
  return new DampedFactor(
    factorOf(upper, n),
    Uint32Array.from({ length: n }, (_, j) => j),
    new Set(),
    0,
  );
}

describe('the small vector', () => {
  test('has the factor of the specification', async () => {
    const factor = await naturalFactor(SMALL_HESSIAN, 4);
    const explained = [1.84615385, 1.85714286, 1.75, 1];
    factor.squaredDiagonal().forEach((value, j) => {
      expect(1 / value).toBeCloseTo(explained[j], 6);
    });
    const row = [0.73598007, -0.67936622, -0.22645541, 0.79259392];
    factor
      .diagonalBlock(0, 4)
      .subarray(0, 4)
      .forEach((value, j) => {
        expect(value).toBeCloseTo(row[j], 6);
      });
    expect([...factor.laterBlock(0, 1, 1, 4).data]).toEqual([...factor.diagonalBlock(0, 4).subarray(1, 4)]);
    // [H^-1]_jj by Cramer's rule.
    const inverse = [4, 4, 4, 4].map((n, j) => minor(SMALL_HESSIAN, n, j) / determinant(SMALL_HESSIAN, 4));
    factor.inverseDiagonal().forEach((value, j) => {
      expect(value).toBeCloseTo(inverse[j], 5);
    });
  });

  test.each([4, 2, 1, 3])('ends at loss 2.36, blocks of %i', async (blockSize) => {
    const factor = await naturalFactor(SMALL_HESSIAN, 4);
    const codes = new Uint8Array(4);
    const grid = { scale: Float32Array.of(1), shift: Float32Array.of(1) };
    const loss = await sweep(
      naiveBlas(),
      inlineKernels(),
      factor,
      Float32Array.from(SMALL_WEIGHT),
      blockSize,
      ({ group }) => ({ bits: new Uint8Array(group.columns).fill(2), grid }),
      ({ start }, blockCodes) => codes.set(blockCodes, start),
    );
    expect([...codes].map((code) => code - 1)).toEqual([0, -1, -1, 1]);
    expect(loss).toBeCloseTo(2.36, 6);
  });

  test('blocks of U lie as they should, whatever the tile', async () => {
    const n = 70;
    const hessian = damp(statsOf(randomTokens(200, n)).hessian, n, 0.01);
    const upper = await upperOf(naiveBlas(), hessian, n);
    const factor = await naturalFactor(hessian, n);
    const block = factor.laterBlock(3, 20, 25, 69);
    expect([block.rows, block.columns]).toEqual([44, 17]);
    for (let k = 25; k < 69; k++) {
      for (let j = 3; j < 20; j++) expect(block.data[(k - 25) * 17 + j - 3]).toBe(Math.fround(upper[j * n + k]));
    }
  });

  test('has the errors of the specification', async () => {
    const upper = await upperOf(naiveBlas(), SMALL_HESSIAN, 4);
    const { errors, values } = gptqOracle(Float64Array.from(SMALL_WEIGHT), 1, upper, 4, () => ({ bits: 2, scale: 1, shift: 1 }));
    [-0.54349298, -1.04828484, -0.98270763, 0].forEach((value, j) => {
      expect(errors[j]).toBeCloseTo(value, 8);
    });
    expect(
      outputEnergy(
        values.map((value, j) => value - SMALL_WEIGHT[j]),
        SMALL_HESSIAN,
        4,
      ),
    ).toBeCloseTo(2.36, 12);
  });
});

describe('on a random layer', () => {
  const [rows, n, groupSize] = [19, 70, 16];
  const site = siteOf(rows, n);
  const weight = randomWeight(rows, n, 3);
  const stats = statsOf(randomTokens(300, n));
  const options = { bits: 3, groupSize };

  test('sum e^2 is the loss for the damped Hessian, in doubles and in float32', async () => {
    const damped = damp(stats.hessian, n, 0.01);
    const upper = await upperOf(naiveBlas(), damped, n);
    const oracle = gptqOracle(Float64Array.from(weight), rows, upper, groupSize, (row) => minMaxGrid(row, 3));
    const loss = outputEnergy(
      oracle.values.map((value, i) => value - weight[i]),
      damped,
      n,
    );
    expect(Math.abs(oracle.errors.reduce((sum, e) => sum + e * e, 0) / loss - 1)).toBeLessThan(IDENTITY_TOLERANCE);

    const columns = Float32Array.from({ length: n * rows }, (_, i) => weight[(i % rows) * n + Math.floor(i / rows)]);
    const decoded = new Float64Array(rows * n);
    const grids = { scale: new Float32Array(rows).fill(0.04), shift: new Float32Array(rows).fill(4) };
    const claimed = await sweep(
      naiveBlas(),
      inlineKernels(),
      await naturalFactor(damped, n),
      columns,
      groupSize,
      ({ group }) => ({ bits: new Uint8Array(group.columns).fill(3), grid: grids }),
      ({ start, group }, codes) => {
        for (let i = 0; i < codes.length; i++) {
          decoded[(i % group.rows) * n + start + Math.floor(i / group.rows)] = Math.fround(grids.scale[0] * (codes[i] - 4));
        }
      },
    );
    const actual = outputEnergy(
      decoded.map((value, i) => value - weight[i]),
      damped,
      n,
    );
    expect(Math.abs(claimed / actual - 1)).toBeLessThan(FLOAT32_IDENTITY_TOLERANCE);
  });

  test('codes are those of the column-by-column oracle in doubles', async () => {
    const { quantized } = await gptq.apply(
      contextOf(options),
      site,
      weight,
      stats,
      await gptq.decide(contextOf(options), site, weight, stats),
    );
    const upper = await upperOf(naiveBlas(), damp(stats.hessian, n, 0.01), n);
    const groups = quantized.bits.length;
    const { codes } = gptqOracle(Float64Array.from(weight), rows, upper, groupSize, (_, g, row) => ({
      bits: 3,
      scale: quantized.scales[row * groups + g],
      shift: quantized.zeroPoints[row * groups + g],
    }));
    expect(quantized.codes).toEqual(codes);
  });

  test('with act-order codes are those of the oracle in that order, and groups and grids stay in natural order', async () => {
    const context = contextOf({ ...options, actOrder: true });
    const plan = { groupSize, bits: [3, 2, 4, 1, 3] };
    const { quantized } = await gptq.apply(context, site, weight, stats, plan);
    const diagonal = Float64Array.from({ length: n }, (_, j) => stats.hessian[j * n + j]);
    const order = Array.from(diagonal.keys()).sort((a, b) => diagonal[b] - diagonal[a] || a - b);
    const damped = damp(stats.hessian, n, 0.01);
    const upper = await upperOf(
      naiveBlas(),
      Float64Array.from({ length: n * n }, (_, i) => damped[order[Math.floor(i / n)] * n + order[i % n]]),
      n,
    );
    const permuted = Float64Array.from({ length: rows * n }, (_, i) => weight[Math.floor(i / n) * n + order[i % n]]);
    const { codes } = gptqOracle(permuted, rows, upper, 1, (_, visited, row) => {
      const g = Math.floor(order[visited] / groupSize);
      const at = row * 5 + g;
      return {
        bits: plan.bits[g],
        scale: quantized.scales[at],
        shift: plan.bits[g] === 1 ? quantized.offsets![at] : quantized.zeroPoints[at],
      };
    });
    for (let i = 0; i < codes.length; i++) expect(quantized.codes[Math.floor(i / n) * n + order[i % n]]).toBe(codes[i]);
    const original = await rtn.apply(contextOf(options), site, weight, undefined, plan);
    expect(quantized.scales).toEqual(original.quantized.scales);
    expect(quantized.zeroPoints).toEqual(original.quantized.zeroPoints);
  });

  test('static groups keep the grids of the original weights, other groups follow the compensated ones', async () => {
    const plan = { groupSize, bits: new Array<number>(5).fill(3) };
    const run = async (extra: object) =>
      (await gptq.apply(contextOf({ ...options, ...extra }), site, weight, stats, plan)).quantized;
    const original = (await rtn.apply(contextOf(options), site, weight, undefined, plan)).quantized;
    expect((await run({ staticGroups: true })).scales).toEqual(original.scales);
    const moving = await run({});
    expect(moving.scales).not.toEqual(original.scales);
    expect(moving.codes).not.toEqual((await run({ staticGroups: true })).codes);
  });

  test('loses less output than rounding does, and act-order less again', async () => {
    const plan = { groupSize, bits: new Array<number>(5).fill(3) };
    const error = async (quantizer: typeof gptq, extra = {}) =>
      (await quantizer.apply(contextOf({ ...options, ...extra }), site, weight, stats, plan)).relativeError!;
    const [plain, compensated, ordered] = [await error(rtn), await error(gptq), await error(gptq, { actOrder: true })];
    expect(compensated).toBeLessThan(plain);
    expect(ordered).toBeLessThan(compensated);
  });

  test('the reported error is that of the decoded weights', async () => {
    const { quantized, relativeError } = await gptq.apply(
      contextOf(options),
      site,
      weight,
      stats,
      await gptq.decide(contextOf(options), site, weight, stats),
    );
    const difference = Float64Array.from(dequantize(quantized), (wq, i) => wq - weight[i]);
    const expected = outputEnergy(difference, stats.hessian, n) / outputEnergy(Float64Array.from(weight), stats.hessian, n);
    expect(relativeError! / expected).toBeCloseTo(1, 5);
  });

  test.each([2, 3, 4, 8])('a layer already on a grid of %i bits is reproduced without error', async (bits) => {
    const levels = 2 ** bits - 1;
    const onGrid = Float32Array.from(randomWeight(rows, n, 9, 1), (z, i) => {
      const within = (i % n) % groupSize;
      const code = within === 0 ? 0 : within === 1 ? levels : Math.floor(Math.abs(z) * 1000) % (levels + 1);
      const zero = Math.floor(levels / 2);
      return 0.0625 * (code - zero);
    });
    for (const name of ['rtn', 'gptq', 'slim-llm'] as const) {
      const plan = { groupSize, bits: new Array<number>(5).fill(bits) };
      const { quantized, relativeError } = await QUANTIZERS[name].apply(
        contextOf({ groupSize, bits: 3 }),
        site,
        onGrid,
        stats,
        plan,
      );
      expect(dequantize(quantized)).toEqual(onGrid);
      if (name !== 'rtn') expect(relativeError).toBe(0);
    }
  });
});

test('a layer wider than a span is swept as the oracle sweeps it', async () => {
  const [rows, n, blockSize] = [3, 1100, 200];
  // Any upper triangle will do: factoring a Hessian of this size would be slow.
  const upper = Float64Array.from(randomWeight(n, n, 42, 0.01), (z, i) => {
    const [row, column] = [Math.floor(i / n), i % n];
    return column === row ? 1 + Math.abs(z) : column > row ? z : 0;
  });
  const weight = randomWeight(rows, n, 41);
  const factor = new DampedFactor(
    factorOf(upper, n),
    Uint32Array.from({ length: n }, (_, j) => j),
    new Set(),
    0,
  );
  const grid = { scale: new Float32Array(rows).fill(0.0625), shift: new Float32Array(rows).fill(4) };
  const found = new Uint8Array(rows * n);
  await sweep(
    naiveBlas(),
    inlineKernels(),
    factor,
    Float32Array.from({ length: n * rows }, (_, i) => weight[(i % rows) * n + Math.floor(i / rows)]),
    blockSize,
    ({ group }) => ({ bits: new Uint8Array(group.columns).fill(3), grid }),
    ({ start }, codes) => {
      for (let i = 0; i < codes.length; i++) found[(i % rows) * n + start + Math.floor(i / rows)] = codes[i];
    },
  );
  const { codes } = gptqOracle(Float64Array.from(weight), rows, upper, blockSize, () => ({ bits: 3, scale: 0.0625, shift: 4 }));
  // Float32 may flip a tie, and what follows it in the row.
  expect(found.filter((code, i) => code === codes[i]).length / codes.length).toBeGreaterThan(0.98);
});

describe('the Hessian', () => {
  const n = 12;
  const site = siteOf(6, n);
  const weight = randomWeight(6, n, 4);
  const plan = { groupSize: 4, bits: [2, 3, 2] };

  test('is factored once for all sites of an input, and again for another input, damping or order', async () => {
    const blas = countingBlas();
    const stats = statsOf(randomTokens(40, n));
    await gptq.apply(contextOf({}, blas), site, weight, stats, plan);
    await gptq.apply(contextOf({}, blas), siteOf(6, n, 'other'), weight, stats, plan);
    await QUANTIZERS['slim-llm'].apply(contextOf({}, blas), site, weight, stats, plan);
    expect(blas.calls).toBe(1);
    await gptq.apply(contextOf({ dampening: 0.02 }, blas), site, weight, stats, plan);
    await gptq.apply(contextOf({ actOrder: true }, blas), site, weight, stats, plan);
    await gptq.apply(contextOf({}, blas), site, weight, statsOf(randomTokens(40, n)), plan);
    expect(blas.calls).toBe(4);
  });

  test.each([false, true])('is left as it was, also after a failure (act-order %s)', async (actOrder) => {
    const stats = statsOf(randomTokens(40, n));
    const before = stats.hessian.slice();
    const failing = { ...naiveBlas(), inverseFactor: () => Promise.reject(new Error('no memory')) };
    await expect(gptq.apply(contextOf({ actOrder }, failing), site, weight, stats, plan)).rejects.toThrow('no memory');
    expect(stats.hessian).toEqual(before);
  });

  test('gets a hundredth more damping each time it cannot be factored, and the notes say so', async () => {
    const blas = naiveBlas();
    const added: number[] = [];
    const stubborn = {
      ...blas,
      inverseFactor: (hessian: Float64Array, size: number) => {
        added.push(hessian[0]);
        return added.length < 3 ? Promise.reject(new NotPositiveDefiniteError(2, -1e-9)) : blas.inverseFactor(hessian, size);
      },
    };
    const stats = statsOf(randomTokens(40, n));
    const context = contextOf({}, stubborn);
    await gptq.apply(context, site, weight, stats, plan);
    const mean = Array.from({ length: n }, (_, j) => stats.hessian[j * n + j]).reduce((a, b) => a + b) / n;
    [0.01, 0.02, 0.03].forEach((dampening, i) => {
      expect((added[i] - stats.hessian[0]) / mean).toBeCloseTo(dampening, 10);
    });
    expect(context.notes).toEqual([
      'layer: Hessian of x is not positive definite; damping raised to 0.020',
      'layer: Hessian of x is not positive definite; damping raised to 0.030',
    ]);
  });

  test('with fewer tokens than inputs and no damping is factored after a retry', async () => {
    const context = contextOf({ dampening: 0 });
    const { relativeError } = await gptq.apply(context, site, weight, statsOf(randomTokens(3, n)), plan);
    expect(context.notes.length).toBe(1);
    expect(relativeError).toBeLessThan(1);
  });

  test('that no damping helps is refused by the name of the site', async () => {
    const indefinite = new Float64Array(n * n).fill(50);
    for (let j = 0; j < n; j++) indefinite[j * n + j] = 1;
    const applied = gptq.apply(contextOf(), site, weight, statsOfHessian(indefinite, n), plan);
    await expect(applied).rejects.toThrow(UnsupportedError);
    await expect(applied).rejects.toThrow(/^layer: its Hessian cannot be factored with damping up to 1/);
  });

  test('with a diagonal that is not finite is refused with the channel', async () => {
    const broken = statsOf(randomTokens(40, n)).hessian;
    broken[7 * n + 7] = Number.NaN;
    const applied = gptq.apply(contextOf(), site, weight, statsOfHessian(broken, n), plan);
    await expect(applied).rejects.toThrow(
      'layer: channel 7 of its calibration activations has mean square NaN; it must be finite.',
    );
  });
});

test.each(['gptq', 'slim-llm'] as const)('%s takes the weights of inputs that are always zero as zero', async (name) => {
  const tokens = randomTokens(60, 24);
  for (const dead of [3, 10]) for (let t = 0; t < 60; t++) tokens.data[t * 24 + dead] = 0;
  const stats = statsOf(tokens);
  for (const actOrder of [false, true]) {
    const plan = { groupSize: 8, bits: [2, 3, 2] };
    const { quantized } = await QUANTIZERS[name].apply(contextOf({ actOrder }), siteOf(5, 24), randomWeight(5, 24), stats, plan);
    const decoded = dequantize(quantized);
    for (let row = 0; row < 5; row++) expect([decoded[row * 24 + 3], decoded[row * 24 + 10]].map(Math.abs)).toEqual([0, 0]);
    expect(decoded.filter((w) => w !== 0).length).toBeGreaterThan(24);
  }
});

test('an input that is never anything but zero quantizes to zeros', async () => {
  const stats = statsOf({ rows: 10, columns: 8, data: new Float32Array(80) });
  const { quantized, relativeError } = await gptq.apply(contextOf(), siteOf(3, 8), randomWeight(3, 8), stats, {
    groupSize: 4,
    bits: [2, 2],
  });
  expect(dequantize(quantized).every((w) => w === 0)).toBe(true);
  expect(relativeError).toBe(0);
});

test('symmetric grids have their zero in the middle, for every width above 1', async () => {
  const stats = statsOf(randomTokens(60, 24));
  const plan = { groupSize: 8, bits: [2, 3, 8] };
  for (const quantizer of [rtn, gptq]) {
    const { quantized }: { quantized: QuantizedLinear } = await quantizer.apply(
      contextOf({ symmetric: true }),
      siteOf(5, 24),
      randomWeight(5, 24),
      stats,
      plan,
    );
    for (let row = 0; row < 5; row++) expect([...quantized.zeroPoints.subarray(row * 3, row * 3 + 3)]).toEqual([2, 4, 128]);
  }
});

test('scales searched on compensated weights are those of the oracle, all but rare ties', async () => {
  const stats = statsOf(randomTokens(200, 32));
  const weight = randomWeight(9, 32, 12);
  const { quantized } = await QUANTIZERS['slim-llm'].apply(contextOf(), siteOf(9, 32), weight, stats, {
    groupSize: 32,
    bits: [3],
  });
  for (let row = 0; row < 9; row++) {
    const { scale } = searchedGrid(weight.subarray(row * 32, (row + 1) * 32), 3);
    expect(quantized.scales[row] / scale).toBeCloseTo(1, 3);
  }
});

/** Determinant by the first row. */
function determinant(matrix: ArrayLike<number>, n: number): number {
  if (n === 0) return 1;
  let sum = 0;
  for (let j = 0; j < n; j++) sum += (j % 2 === 0 ? 1 : -1) * matrix[j] * determinant(without(matrix, n, 0, j), n - 1);
  return sum;
}

function minor(matrix: ArrayLike<number>, n: number, j: number): number {
  return determinant(without(matrix, n, j, j), n - 1);
}

function without(matrix: ArrayLike<number>, n: number, row: number, column: number): number[] {
  return Array.from(matrix).filter((_, i) => Math.floor(i / n) !== row && i % n !== column);
}
