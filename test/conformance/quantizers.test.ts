/** What holds for every quantizer in the list. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { roundToF16 } from '../../formats/dtype.ts';
import { RecipeError, UnsupportedError } from '../../src/errors.ts';
import { BEST_QUANTIZERS, QUANTIZERS } from '../../src/methods/quantize/index.ts';
import { dequantize, groupCount, type QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import type { SitePlan } from '../../src/methods/quantize/quantizer.ts';
import { contextOf, randomTokens, randomWeight, siteOf } from '../methods/quantize/support.ts';
import { statsOf } from '../support/reference-layer.ts';

/** Every code fits its group's width, and every array has the size its doc promises. */
function expectWellFormed(q: QuantizedLinear, plan: SitePlan): void {
  const groups = groupCount(q.inFeatures, plan.groupSize);
  expect(q.groupSize).toBe(plan.groupSize);
  expect([...q.bits]).toEqual(plan.bits);
  expect(q.codes).toHaveLength(q.outFeatures * q.inFeatures);
  for (const perGroup of [q.scales, q.zeroPoints, q.offsets ?? q.scales]) expect(perGroup).toHaveLength(q.outFeatures * groups);
  expect(q.offsets !== undefined).toBe(plan.bits.includes(1));
  for (let row = 0; row < q.outFeatures; row++) {
    for (let j = 0; j < q.inFeatures; j++) {
      const width = q.bits[Math.floor(j / q.groupSize)];
      if (q.codes[row * q.inFeatures + j] >= 2 ** width)
        throw new Error(`code ${q.codes[row * q.inFeatures + j]} of ${width} bits`);
    }
    for (let g = 0; g < groups; g++) {
      const at = row * groups + g;
      expect(q.scales[at]).toBeGreaterThan(0);
      expect(q.zeroPoints[at]).toBeLessThan(Math.max(2 ** q.bits[g], 1));
      if (q.bits[g] < 2) expect(q.zeroPoints[at]).toBe(0);
      if (q.bits[g] !== 1 && q.offsets) expect(q.offsets[at]).toBe(0);
      if (q.scaleDtype === 'F16') expect(roundToF16(q.scales[at])).toBe(q.scales[at]);
      if (q.scaleDtype === 'F16' && q.offsets) expect(roundToF16(q.offsets[at])).toBe(q.offsets[at]);
    }
  }
}

const ALL = [
  ...Object.entries(QUANTIZERS).map(([name, quantizer]) => [name, 'paper', quantizer] as const),
  ...Object.entries(BEST_QUANTIZERS).map(([name, quantizer]) => [name, 'best', quantizer] as const),
];

/** `tr(dW H dW^T) / tr(W H W^T)`. */
function outputError(quantized: QuantizedLinear, weight: Float32Array, hessian: Float64Array): number {
  const n = quantized.inFeatures;
  const error = dequantize(quantized).map((value, i) => value - weight[i]);
  const energy = (rows: Float32Array) => {
    let sum = 0;
    for (let at = 0; at < rows.length; at += n) {
      for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) sum += rows[at + i] * hessian[i * n + j] * rows[at + j];
    }
    return sum;
  };
  return energy(error) / energy(weight);
}

describe.each(ALL)('%s, preset %s', (name, preset, quantizer) => {
  const [rows, n, groupSize] = [21, 50, 8];
  const site = siteOf(rows, n);
  const weight = randomWeight(rows, n);
  const tokens = randomTokens(120, n);
  // Preset best takes its statistics over: nobody may use them again.
  const fresh = () => statsOf(tokens);
  const options = { bits: 3, groupSize, preset };
  const run = (w: Float32Array, plan: SitePlan) => quantizer.apply(contextOf(options), site, w, fresh(), plan);

  test('goes by its name in the list and says what it does in a line', () => {
    expect(quantizer.name).toBe(name);
    expect(quantizer.summary).toMatch(/^.{10,100}$/);
  });

  test('decides on one width a group and keeps to it, the short last group included', async () => {
    const stats = fresh();
    const plan = await quantizer.decide(contextOf(options), site, weight, stats);
    expect(plan.bits).toHaveLength(7);
    expect(plan.bits.reduce((a, b) => a + b)).toBe(21);
    const { quantized, relativeError } = await quantizer.apply(contextOf(options), site, weight, stats, plan);
    expectWellFormed(quantized, plan);
    const error = outputError(quantized, weight, fresh().hessian);
    expect(error).toBeGreaterThan(0);
    expect(error).toBeLessThan(0.1);
    // Methods that shrink the Hessian tell the error under what they made of it.
    const [least, most] = preset === 'paper' ? [0.999, 1.001] : [0.5, 2];
    if (relativeError !== undefined) {
      expect(relativeError / error).toBeGreaterThan(least);
      expect(relativeError / error).toBeLessThan(most);
    }
  });

  test('follows any plan, 0 and 1 bit included; a group of 0 bits decodes to zeros', async () => {
    const plan = { groupSize, bits: [1, 8, 0, 3, 5, 2, 7] };
    const { quantized } = await run(weight, plan);
    expectWellFormed(quantized, plan);
    const decoded = dequantize(quantized);
    for (let row = 0; row < rows; row++) {
      expect(decoded.subarray(row * n + 16, row * n + 24).every((w) => w === 0)).toBe(true);
    }
  });

  test('spends bits well: each more cuts the error, and 8 bits leave next to none', async () => {
    const errors: number[] = [];
    for (const bits of [1, 2, 3, 4, 8]) {
      const plan = { groupSize, bits: new Array<number>(7).fill(bits) };
      errors.push(outputError((await run(weight, plan)).quantized, weight, fresh().hessian));
    }
    for (let i = 1; i < errors.length; i++) expect(errors[i]).toBeLessThan(errors[i - 1]);
    expect(errors.at(-1)).toBeLessThan(1e-4);
  });

  test('gives the same codes again and leaves weight and plan as they were, under preset paper the Hessian too', async () => {
    const w = weight.slice();
    const stats = fresh();
    const plan = await quantizer.decide(contextOf(options), site, weight, stats);
    const { remainder: left, ...once } = await quantizer.apply(contextOf(options), site, weight, stats, Object.freeze(plan));
    const { remainder: leftAgain, ...again } = await run(w.slice(), plan);
    expect(again).toEqual(once);
    expect(leftAgain?.()).toEqual(left?.());
    expect(weight).toEqual(w);
    if (preset === 'paper') expect(stats.hessian).toEqual(fresh().hessian);
  });

  test.each([0, 3])('rows of zeros are exact zeros at width mix %i', async (shift) => {
    const sparse = weight.slice();
    for (const row of [0, 5, 20]) sparse.fill(0, row * n, (row + 1) * n);
    const plan = { groupSize, bits: Array.from({ length: 7 }, (_, g) => 1 + ((g + shift) % 8)) };
    const { quantized } = await run(sparse, plan);
    const decoded = dequantize(quantized);
    for (const row of [0, 5, 20]) expect(decoded.subarray(row * n, (row + 1) * n).every((v) => v === 0)).toBe(true);
    for (const row of [0, 5, 20]) expect([...quantized.scales.subarray(row * 7, row * 7 + 7)]).toEqual(new Array(7).fill(1));
  });

  test('constant rows stay in range', async () => {
    const constant = new Float32Array(rows * n).fill(0.25);
    const plan = { groupSize, bits: new Array<number>(7).fill(2) };
    const { quantized } = await run(constant, plan);
    for (const w of dequantize(quantized)) expect(w).toBeCloseTo(0.25, 1);
  });

  test('scales too small or too large for F16 are kept as F32', async () => {
    for (const factor of [1e-5, 1e9]) {
      const scaled = weight.map((w) => w * factor);
      const plan = { groupSize, bits: [2, 2, 1, 2, 2, 2, 2] };
      const { quantized } = await run(scaled, plan);
      expect(quantized.scaleDtype).toBe('F32');
      expect(outputError(quantized, scaled, fresh().hessian)).toBeLessThan(0.6);
    }
  });

  test('every size works: one weight, one row, one column, groups wider than the layer', async () => {
    const sizes = fc.record({
      outFeatures: fc.integer({ min: 1, max: 35 }),
      inFeatures: fc.integer({ min: 1, max: 35 }),
      group: fc.constantFrom(1, 3, 16, 64),
    });
    await fc.assert(
      fc.asyncProperty(sizes, async ({ outFeatures, inFeatures, group }) => {
        const small = siteOf(outFeatures, inFeatures);
        const w = randomWeight(outFeatures, inFeatures, outFeatures * 64 + inFeatures);
        const measured = statsOf(randomTokens(50, inFeatures));
        const context = contextOf({ groupSize: group, bits: 4, preset });
        const plan = await quantizer.decide(context, small, w, measured);
        const { quantized } = await quantizer.apply(context, small, w, measured, plan);
        expectWellFormed(quantized, plan);
        const decoded = dequantize(quantized);
        // Widths are 3, 4 or 5 bits; compensation may move a weight by a few of its group's steps, no more.
        const largest = w.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        for (let i = 0; i < w.length; i++) expect(Math.abs(decoded[i] - w[i])).toBeLessThan(2 * largest + 1e-3);
      }),
      { numRuns: 15, seed: 7, examples: [[{ outFeatures: 1, inFeatures: 1, group: 16 }]] },
    );
  });

  test.each([
    [{ bits: 9 }, /^--bits 9: /],
    [{ bits: 0 }, /^--bits 0: /],
    [{ bits: 2.5 }, /^--bits 2\.5: /],
    [{ groupSize: 0 }, /^--group-size 0: /],
  ])('refuses %o as a request that makes no sense', async (wrong, message) => {
    const decided = quantizer.decide(contextOf({ ...options, ...wrong }), site, weight, fresh());
    await expect(decided).rejects.toThrow(RecipeError);
    await expect(decided).rejects.toThrow(message);
  });

  test.each([
    [{ groupSize, bits: [2, 2] }, 'plan of layer: 2 widths for 7 groups of 8 among 50 columns.'],
    [{ groupSize, bits: [2, 2, 2, 9, 2, 2, 2] }, 'plan of layer: a width of 9 bits, but widths are whole, from 0 to 8.'],
    [{ groupSize: 2.5, bits: [2] }, 'plan of layer: group size 2.5 is not a whole number above 0.'],
  ])('refuses the plan %o', async (plan, message) => {
    await expect(run(weight, plan)).rejects.toThrow(new RecipeError(message));
  });

  test.each([Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY])(
    'refuses a weight of %d and says where',
    async (value) => {
      const broken = weight.slice();
      broken[13 * n + 31] = value;
      const plan = { groupSize, bits: new Array<number>(7).fill(2) };
      await expect(run(broken, plan)).rejects.toThrow(
        new UnsupportedError(`layer.weight: row 13, column 31 is ${value}; only finite weights can be quantized.`),
      );
    },
  );

  test('calls its statistics missing when they are, if it needs any', async () => {
    const plan = { groupSize, bits: new Array<number>(7).fill(2) };
    const applied = quantizer.apply(contextOf(options), site, weight, undefined, plan);
    if (quantizer.needsCalibration) await expect(applied).rejects.toThrow('no calibration statistics');
    else expect((await applied).relativeError).toBeUndefined();
  });
});
