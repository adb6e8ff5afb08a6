/** The numbers of slim-llm section 12 for preset `paper`. */
import { describe, expect, test, vi } from 'vitest';
import type { Matrix } from '../../../src/compute/blas.ts';
import type { Grid } from '../../../src/compute/kernels/kernels.ts';
import { inlineKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { columnRange, takeColumns } from '../../../src/methods/quantize/columns.ts';
import { dampedFactor } from '../../../src/methods/quantize/damped-factor.ts';
import { QUANTIZERS } from '../../../src/methods/quantize/index.ts';
import { dequantize } from '../../../src/methods/quantize/quantized-linear.ts';
import type { SitePlan } from '../../../src/methods/quantize/quantizer.ts';
import { bestSplit, divergences, rankGroups, widthsFor } from '../../../src/methods/quantize/slim-llm/bit-allocation.ts';
import { groupSalience } from '../../../src/methods/quantize/slim-llm/salience.ts';
import { mulberry32, normals, referenceLayer, statsOf } from '../../support/reference-layer.ts';
import { contextOf, siteOf } from './support.ts';

/** The vectors were computed with scales as they come; the product rounds them to F16 first. Tests see both. */
const stored = vi.hoisted(() => ({ rounded: true }));
vi.mock('../../../src/methods/quantize/grid.ts', async (load) => {
  const grids = await load<typeof import('../../../src/methods/quantize/grid.ts')>();
  const storedGrid = (grid: Grid, bits: number) => (stored.rounded ? grids.storedGrid(grid, bits) : { grid, fitsF16: true });
  return { ...grids, storedGrid };
});

/** Relative, of the vectors; printed to four digits. */
const TOLERANCE = 1e-3;
/** What rounding scales to F16 may change: a code that flips changes every later one of its row. */
const ROUNDED_TOLERANCE = 1e-2;

const layer = referenceLayer();
const site = siteOf(layer.outFeatures, layer.inFeatures);
const firstTokens: Matrix = { rows: 512, columns: 512, data: layer.calibration.data.subarray(0, 512 * 512) };
// Not a multiple of anything: the batches' sizes must not matter.
const stats = statsOf(layer.calibration, firstTokens, 200);
const testHessian = statsOf(layer.test).hessian;
const reference = energy(Float64Array.from(layer.weight));

const WIDTHS: Record<number, string> = { 2: '1 1 2 1 1 2 3 3 1 3 3 3 2 1 3 2', 3: '2 3 3 2 3 3 4 3 2 3 4 3 3 3 4 3' };
const ERRORS = [
  { bits: 2, rtn: 0.4011, gptq: 0.313, searched: 0.274, split: 6, paper: 0.2079 },
  { bits: 3, rtn: 0.1245, gptq: 0.0839, searched: 0.0788, split: 3, paper: 0.0639 },
];

function energy(difference: Float64Array): number {
  const n = layer.inFeatures;
  let sum = 0;
  for (let start = 0; start < difference.length; start += n) {
    for (let i = 0; i < n; i++) {
      let product = 0;
      for (let j = 0; j < n; j++) product += testHessian[i * n + j] * difference[start + j];
      sum += product * difference[start + i];
    }
  }
  return sum;
}

/** Relative error energy on the test tokens. */
async function testError(method: keyof typeof QUANTIZERS, bits: number, plan?: SitePlan): Promise<number> {
  const context = contextOf({ bits });
  const quantizer = QUANTIZERS[method];
  const followed = plan ?? (await quantizer.decide(context, site, layer.weight, stats));
  const { quantized } = await quantizer.apply(context, site, layer.weight, stats, followed);
  return energy(Float64Array.from(dequantize(quantized), (wq, i) => wq - layer.weight[i])) / reference;
}

test('the generator and the layer are those of the vectors', () => {
  const next = mulberry32(1);
  expect([next(), next(), next()]).toEqual([2693262067, 11749833, 2265367787]);
  const [a, b, c] = normals(1, 3);
  expect([a.toFixed(8), b.toFixed(8), c.toFixed(8)]).toEqual(['0.96597406', '1.12310419', '-0.04922786']);
  expect([...layer.weight64.subarray(0, 3)].map((w) => w.toPrecision(6))).toEqual(['0.00716812', '0.0343006', '0.00581153']);
  expect(layer.weight64.reduce((sum, w) => sum + w * w, 0)).toBeCloseTo(22.86653, 5);
  expect(layer.calibration.data.reduce((sum, x) => sum + x * x, 0) / 5244513.03).toBeCloseTo(1, 6);
});

describe.each(ERRORS)('at $bits bits', ({ bits, rtn, gptq, searched, paper }) => {
  const uniform = { groupSize: 32, bits: new Array<number>(16).fill(bits) };

  test.each([
    { scales: 'as they come', rounded: false, tolerance: TOLERANCE },
    { scales: 'rounded to F16', rounded: true, tolerance: ROUNDED_TOLERANCE },
  ])('errors on test tokens are those of the vectors, scales $scales', async ({ rounded, tolerance }) => {
    stored.rounded = rounded;
    const within = (expected: number, actual: number) => expect(Math.abs(actual / expected - 1)).toBeLessThan(tolerance);
    within(rtn, await testError('rtn', bits));
    within(gptq, await testError('gptq', bits));
    within(searched, await testError('slim-llm', bits, uniform));
    within(paper, await testError('slim-llm', bits));
  });

  test('slim-llm decides the widths of the vectors', async () => {
    const plan = await QUANTIZERS['slim-llm'].decide(contextOf({ bits }), site, layer.weight, stats);
    expect(plan).toEqual({ groupSize: 32, bits: WIDTHS[bits].split(' ').map(Number) });
  });
});

test.each(ERRORS)('the search of the split at $bits bits ends at k = $split', async ({ bits, split }) => {
  const context = contextOf({ bits });
  const factor = await dampedFactor(context, site, stats, 'natural');
  const group = (g: number) => {
    const columns = columnRange(g * 32, (g + 1) * 32);
    return { columns: 32, rows: 64, values: takeColumns(site, layer.weight, columns, factor.dead) };
  };
  const denominators = factor.squaredDiagonal();
  const salience = Float64Array.from({ length: 16 }, (_, g) => groupSalience(group(g), denominators.subarray(g * 32)));
  const ranking = rankGroups(salience);
  const problem = { ...site, groupSize: 32, bits, weight: layer.weight, bias: undefined, group, batches: () => stats.batches() };
  const found = await divergences(context.blas, inlineKernels(), problem, ranking);
  expect(found).toHaveLength(8);
  if (bits === 2) {
    const expected = [0.140552, 0.13197, 0.118484, 0.109303];
    expected.forEach((value, k) => {
      expect(Math.abs(found[k] / value - 1)).toBeLessThan(TOLERANCE);
    });
  }
  expect(bestSplit(found)).toBe(split);
  expect(widthsFor(ranking, split, bits).join(' ')).toBe(WIDTHS[bits]);
});
