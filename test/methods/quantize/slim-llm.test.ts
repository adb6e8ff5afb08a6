import { describe, expect, test } from 'vitest';
import type { Matrix } from '../../../src/compute/blas.ts';
import { inlineKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { RecipeError } from '../../../src/errors.ts';
import { dequantize } from '../../../src/methods/quantize/quantized-linear.ts';
import { rtn } from '../../../src/methods/quantize/rtn.ts';
import {
  type AllocationProblem,
  bestSplit,
  divergences,
  rankGroups,
  widthsFor,
} from '../../../src/methods/quantize/slim-llm/bit-allocation.ts';
import { groupSalience, salienceWeights } from '../../../src/methods/quantize/slim-llm/salience.ts';
import { slimLlm } from '../../../src/methods/quantize/slim-llm/slim-llm.ts';
import { naiveBlas } from '../../support/naive-blas.ts';
import { codeOf, decodedValue, minMaxGrid } from '../../support/quantize-oracle.ts';
import { statsOf } from '../../support/reference-layer.ts';
import { contextOf, randomTokens, randomWeight, siteOf } from './support.ts';

const blas = naiveBlas();

/** y and its trials are float32; walking from k to k adds a few more roundings. */
const WALK_TOLERANCE = 1e-4;

test('the KL vector: .11962980 from original to trial', async () => {
  const row = (...data: number[]) => ({ rows: 1, columns: 3, data: Float32Array.from(data) });
  expect(await blas.meanKl(row(0, 1, 2), row(0, 1, 1))).toBeCloseTo(0.1196298, 7);
});

describe('the search of the split', () => {
  const [rows, n, groupSize, bits] = [9, 62, 8, 3];
  const weight = randomWeight(rows, n, 21, 0.3);
  const bias = randomWeight(1, rows, 22, 1);
  const tokens = randomTokens(37, n);
  const ranking = [3, 0, 7, 5, 1, 2, 6, 4];

  const group = (g: number) => {
    const columns = Math.min(groupSize, n - g * groupSize);
    const values = Float32Array.from(
      { length: columns * rows },
      (_, i) => weight[(i % rows) * n + g * groupSize + Math.floor(i / rows)],
    );
    return { columns, rows, values };
  };
  const problem = (batches: readonly Matrix[], withBias = true): AllocationProblem => ({
    inFeatures: n,
    outFeatures: rows,
    groupSize,
    bits,
    weight,
    bias: withBias ? bias : undefined,
    group,
    async *batches() {
      yield* batches;
    },
  });

  /** Quantize everything, multiply, compare: the definition. */
  async function direct(k: number): Promise<number> {
    const widths = widthsFor(ranking, k, bits);
    const trial = Float32Array.from(weight, (_, i) => {
      const [row, column] = [Math.floor(i / n), i % n];
      const g = Math.floor(column / groupSize);
      const start = row * n + g * groupSize;
      const grid = minMaxGrid(weight.subarray(start, Math.min(start + groupSize, (row + 1) * n)), widths[g]);
      return decodedValue(codeOf(weight[i], grid), grid);
    });
    const out = async (data: Float32Array) => {
      const y = await blas.gemm(tokens, { rows, columns: n, data }, { transposeB: true });
      return { ...y, data: y.data.map((value, i) => value + bias[i % rows]) };
    };
    return blas.meanKl(await out(weight), await out(trial));
  }

  test('walking from k to k gives what quantizing anew for each k gives', async () => {
    const found = await divergences(blas, inlineKernels(), problem([tokens]), ranking);
    expect(found).toHaveLength(4);
    for (let k = 0; k < 4; k++) expect(Math.abs(found[k] / (await direct(k)) - 1)).toBeLessThan(WALK_TOLERANCE);
  });

  test('the bias counts', async () => {
    expect(await divergences(blas, inlineKernels(), problem([tokens], false), ranking)).not.toEqual(
      await divergences(blas, inlineKernels(), problem([tokens]), ranking),
    );
  });

  test('how tokens are batched does not matter, a batch of thousands included', async () => {
    const many = {
      rows: 1100,
      columns: n,
      data: Float32Array.from({ length: 1100 * n }, (_, i) => tokens.data[i % tokens.data.length]),
    };
    const part = (start: number, end: number) => ({
      rows: end - start,
      columns: n,
      data: many.data.subarray(start * n, end * n),
    });
    const whole = await divergences(blas, inlineKernels(), problem([many]), ranking);
    const parts = await divergences(blas, inlineKernels(), problem([part(0, 1), part(1, 500), part(500, 1100)]), ranking);
    whole.forEach((value, k) => {
      expect(parts[k] / value).toBeCloseTo(1, 6);
    });
  });

  test('takes the smallest of equal minimisers', () => {
    expect(bestSplit(Float64Array.of(3, 1, 2, 1))).toBe(1);
    expect(bestSplit(Float64Array.of(1, 1))).toBe(0);
  });
});

test('widths go down from the least salient end and up from the other, and none changes at k = 0', () => {
  expect(widthsFor([2, 0, 3, 1], 0, 2)).toEqual([2, 2, 2, 2]);
  expect(widthsFor([2, 0, 3, 1], 1, 2)).toEqual([2, 3, 1, 2]);
});

test('groups of equal salience keep their order', () => {
  expect(rankGroups(Float64Array.of(2, 1, 2, 1, 0))).toEqual([4, 1, 3, 0, 2]);
});

test('salience is w^2 over the column denominator, summed', () => {
  const group = { columns: 2, rows: 2, values: Float32Array.of(1, 2, 3, 4) };
  expect(groupSalience(group, Float64Array.of(0.5, 2))).toBe(10 + 12.5);
});

test('elements more than two deviations above the mean are weighed, and none when there is no spread', () => {
  const values = new Float32Array(40).fill(0.1);
  values[17] = 3;
  const denominators = new Float64Array(8).fill(1);
  const weights = salienceWeights({ columns: 8, rows: 5, values }, denominators, 7);
  expect([...weights].map((w, i) => (w === 1 ? -1 : i)).filter((i) => i >= 0)).toEqual([17]);
  expect(weights[17]).toBe(7);
  const flat = { columns: 8, rows: 5, values: new Float32Array(40).fill(0.5) };
  expect(salienceWeights(flat, denominators, 7).every((w) => w === 1)).toBe(true);
  const single = { columns: 1, rows: 1, values: Float32Array.of(2) };
  expect([...salienceWeights(single, denominators, 7)]).toEqual([1]);
});

describe('deciding', () => {
  const n = 40;
  const site = siteOf(12, n);
  const weight = randomWeight(12, n, 5, 0.2);
  const stats = statsOf(randomTokens(100, n));

  test('fewer than four groups are uniform and need no statistics', async () => {
    const context = contextOf({ groupSize: 16, bits: 3 });
    expect(await slimLlm.decide(context, site, weight, undefined)).toEqual({ groupSize: 16, bits: [3, 3, 3] });
  });

  test('as many groups gain a bit as lose one', async () => {
    for (const bits of [2, 5]) {
      const plan = await slimLlm.decide(contextOf({ groupSize: 4, bits }), site, weight, stats);
      expect(plan.bits).toHaveLength(10);
      expect(plan.bits.reduce((a, b) => a + b)).toBe(10 * bits);
      expect(Math.max(...plan.bits) - Math.min(...plan.bits)).toBeLessThanOrEqual(2);
    }
  });

  test.each([1, 8, 2.5])('%d bits have no neighbours on both sides', async (bits) => {
    await expect(slimLlm.decide(contextOf({ groupSize: 4, bits }), site, weight, stats)).rejects.toThrow(
      new RecipeError(`--bits ${bits}: with this method, preset paper takes a whole number of bits from 2 to 7.`),
    );
  });

  test('symmetric grids are refused', async () => {
    const context = contextOf({ groupSize: 4, symmetric: true });
    await expect(slimLlm.decide(context, site, weight, stats)).rejects.toThrow(RecipeError);
    await expect(slimLlm.apply(context, site, weight, stats, { groupSize: 20, bits: [2, 2] })).rejects.toThrow(RecipeError);
  });

  test('a site with a bias loads it; a run that cannot load it is wrong', async () => {
    const biased = { ...site, hasBias: true };
    const loaded: string[] = [];
    const loadBias = async (asked: { name: string }) => {
      loaded.push(asked.name);
      return new Float32Array(12);
    };
    const context = contextOf({ groupSize: 4 });
    const plan = await slimLlm.decide({ ...context, loadBias }, biased, weight, stats);
    expect(loaded).toEqual(['layer']);
    expect(plan).toEqual(await slimLlm.decide(context, site, weight, stats));
    await expect(slimLlm.decide(context, biased, weight, stats)).rejects.toThrow('has a bias');
  });

  test('the salience can be measured by the inverse of the Hessian', async () => {
    // A loud weight on an input that others explain almost completely: U_jj says so only if they come later.
    const plans = await Promise.all(
      (['code', 'inverse-diag'] as const).map((salience) =>
        slimLlm.decide(contextOf({ groupSize: 4, salience }), site, weight, stats),
      ),
    );
    expect(plans[0].bits.reduce((a, b) => a + b)).toBe(plans[1].bits.reduce((a, b) => a + b));
    expect(plans[0]).not.toEqual(plans[1]);
  });
});

test('a weight for salient elements changes scales; a weight of one changes nothing', async () => {
  const site = siteOf(8, 32);
  const weight = randomWeight(8, 32, 6);
  const stats = statsOf(randomTokens(100, 32));
  const plan = { groupSize: 16, bits: [2, 2] };
  const scales = async (lambdaSalience: number) =>
    (await slimLlm.apply(contextOf({ lambdaSalience }), site, weight, stats, plan)).quantized.scales;
  expect(await scales(1)).toEqual(await scales(1));
  expect(await scales(8)).not.toEqual(await scales(1));
});

test('1-bit groups keep two levels whose mean is that of the row', async () => {
  const weight = randomWeight(6, 16, 7).map((w) => w + 0.02);
  const { quantized } = await rtn.apply(contextOf({ groupSize: 16 }), siteOf(6, 16), weight, undefined, {
    groupSize: 16,
    bits: [1],
  });
  const decoded = dequantize(quantized);
  for (let row = 0; row < 6; row++) {
    const values = weight.subarray(row * 16, (row + 1) * 16);
    const mean = values.reduce((a, b) => a + b) / 16;
    expect(new Set(decoded.subarray(row * 16, (row + 1) * 16)).size).toBe(2);
    expect(quantized.offsets![row] + quantized.scales[row] / 2).toBeCloseTo(mean, 4);
  }
});
