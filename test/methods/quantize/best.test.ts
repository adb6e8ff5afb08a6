/** Preset `best` against the vectors of slim-llm section 12. */
import { describe, expect, it } from 'vitest';
import { layerSizes } from '../../../src/artifacts/layer-sizes.ts';
import type { CalibrationStats, Drift } from '../../../src/calibration/statistics.ts';
import { applyBest } from '../../../src/methods/quantize/best/best.ts';
import { correctForDrift } from '../../../src/methods/quantize/best/drift-target.ts';
import { prepareInput } from '../../../src/methods/quantize/best/prepared-input.ts';
import { slimLlmBest } from '../../../src/methods/quantize/best/quantizers.ts';
import { shrink, shrinkageOf } from '../../../src/methods/quantize/best/shrinkage.ts';
import { transformColumns, untransformColumns } from '../../../src/methods/quantize/input-transform.ts';
import { dequantize } from '../../../src/methods/quantize/quantized-linear.ts';
import type { BitAllocation, TransformKind } from '../../../src/methods/quantize/quantizer.ts';
import { naiveBlas } from '../../support/naive-blas.ts';
import { referenceLayer, statsOf } from '../../support/reference-layer.ts';
import { contextOf, randomWeight, siteOf } from './support.ts';

const WIDTHS = [1, 2, 3, 4, 8];

const SMALL = [4, 1, 0, 1, 1, 0.25, 0, 0.25, 1];

describe('shrinkage', () => {
  it('takes out as much of the correlations as the tokens do not support', () => {
    const hessian = Float64Array.from(SMALL);
    const rho = shrinkageOf(hessian, 3, 100);
    expect(rho).toBeCloseTo(0.1627907, 7);
    expect(shrink(hessian, 3, rho)).toEqual([]);
    expect(hessian[1]).toBeCloseTo(0.8372093, 7);
    expect(hessian[5]).toBeCloseTo(0.20930233, 7);
    expect(shrinkageOf(Float64Array.from(SMALL), 3, 10)).toBe(1);
  });

  it('gives a channel that is always zero a little energy and no correlations', () => {
    const hessian = Float64Array.from([4, 0, 1, 0, 0, 0, 1, 0, 2]);
    expect(shrink(hessian, 3, 0.5)).toEqual([1]);
    expect(hessian[4]).toBeCloseTo(4e-4, 6);
    expect([hessian[1], hessian[3], hessian[5], hessian[7]]).toEqual([0, 0, 0, 0]);
  });
});

describe('an input transform', () => {
  it.each([0, 8, 16])('followed by its reverse is the identity (Hadamard of %i, a short last run)', (hadamard) => {
    const weight = randomWeight(3, 20);
    const order = Uint32Array.from({ length: 20 }, (_, k) => (7 * k + 3) % 20);
    const there = transformColumns({ order, hadamard }, weight, 3, 20);
    expect(there).not.toEqual(weight);
    const back = untransformColumns({ order, hadamard }, there, 3, 20);
    for (const [i, w] of weight.entries()) expect(back[i]).toBeCloseTo(w, 7);
  });
});

/** Statistics of the tokens `x` (tokens, n), drifted from `float`. */
function drifted(x: number[][], float: number[][]): CalibrationStats & { drift: Drift } {
  const n = x[0].length;
  const flat = (rows: number[][]) => ({ rows: rows.length, columns: n, data: Float32Array.from(rows.flat()) });
  const cross = new Float32Array(n * n);
  x.forEach((row, t) => {
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) cross[i * n + j] += ((float[t][i] - row[i]) * row[j]) / x.length;
  });
  const mean = (rows: number[][]) =>
    Float64Array.from({ length: n }, (_, j) => rows.reduce((sum, row) => sum + row[j] / rows.length, 0));
  const drift: Drift = {
    cross,
    means: { actual: mean(x), float: mean(float) },
    async *heldOut() {
      yield { actual: flat(x), difference: flat(float.map((row, t) => row.map((value, j) => value - x[t][j]))) };
    },
  };
  return { ...statsOf(flat(x)), drift };
}

describe('the drift correction', () => {
  const float = [
    [1, 0],
    [0, 1],
    [2, 1],
  ];
  const actual = [
    [1, 0],
    [0.5, 1],
    [1.5, 1.5],
  ];

  it('is the least squares target of the specification', async () => {
    const stats = drifted(actual, float);
    // As many tokens as it takes for next to nothing to be shrunk away.
    const many = { ...stats, tokenCount: 1e9 };
    const input = await prepareInput(contextOf(), siteOf(1, 2), many, 'none', 32, { centred: false });
    const columns = Float32Array.from([1, -2]);
    await correctForDrift(naiveBlas(), stats.drift, input, columns, 1, false);
    expect(columns[0]).toBeCloseTo(1.44262295, 2);
    expect(columns[1]).toBeCloseTo(-1.83606557, 2);
  });

  it('is left out where held-out tokens do not drift that way', async () => {
    const stats = drifted(actual, float);
    const drift: Drift = {
      ...stats.drift,
      async *heldOut() {
        yield {
          actual: { rows: 1, columns: 2, data: Float32Array.of(1, 1) },
          difference: { rows: 1, columns: 2, data: Float32Array.of(0.2, 0.4) },
        };
      },
    };
    const input = await prepareInput(contextOf(), siteOf(1, 2), stats, 'none', 32, { centred: false });
    const columns = Float32Array.from([1, -2]);
    expect(await correctForDrift(naiveBlas(), drift, input, columns, undefined, false)).toEqual({ alpha: 0, heldOutRatio: 1 });
    expect([...columns]).toEqual([1, -2]);
  });
});

describe.each([
  ['none', false],
  ['perm-had', false],
  ['perm-had', true],
] as const)('the part of the drift correction that is taken, transform %s, centred %s', (transform, centred) => {
  it('is the least squares one over the held-out tokens', async () => {
    const [n, rows, tokens] = [6, 3, 40];
    const value = (i: number) => Math.sin(12.9898 * (i + 1)) * 2;
    const x = Array.from({ length: tokens }, (_, t) => Array.from({ length: n }, (_, j) => value(t * n + j) + 0.3 * j));
    const float = x.map((row, t) => row.map((v, j) => v + 0.4 * row[(j + 1) % n] + 0.1 * value(900 + t * n + j)));
    const stats = drifted(x, float);
    const input = await prepareInput(contextOf(), siteOf(rows, n), { ...stats, tokenCount: 1e9 }, transform, 4, { centred });
    const weight = Float32Array.from({ length: rows * n }, (_, i) => value(i + 500));
    const stored = (natural: Float32Array) => {
      const turned = input.transform ? transformColumns(input.transform, natural, rows, n) : natural;
      return Float32Array.from({ length: rows * n }, (_, i) => turned[(i % rows) * n + Math.floor(i / rows)]);
    };
    const natural = (columns: Float32Array) => {
      const turned = Float32Array.from({ length: rows * n }, (_, i) => columns[(i % n) * rows + Math.floor(i / n)]);
      return input.transform ? untransformColumns(input.transform, turned, rows, n) : turned;
    };
    const whole = stored(weight);
    await correctForDrift(naiveBlas(), stats.drift, input, whole, 1, centred);
    const change = natural(whole).map((v, i) => v - weight[i]);
    const { actual, float: floatMean } = stats.drift.means!;
    let [product, square] = [0, 0];
    for (let t = 0; t < tokens; t++) {
      for (let i = 0; i < rows; i++) {
        let [made, wanted] = [0, 0];
        for (let j = 0; j < n; j++) {
          const from = centred ? [actual[j], floatMean[j]] : [0, 0];
          made += change[i * n + j] * (x[t][j] - from[0]);
          wanted += weight[i * n + j] * (float[t][j] - from[1] - x[t][j] + from[0]);
        }
        product += made * wanted;
        square += made * made;
      }
    }
    const { alpha } = await correctForDrift(naiveBlas(), stats.drift, input, stored(weight), undefined, centred);
    expect(alpha).toBeCloseTo(Math.min(1, product / square), 4);
    expect(alpha).toBeGreaterThan(0.5);
  });
});

describe('the reference layer', () => {
  const layer = referenceLayer();
  const { inFeatures: n, outFeatures: m } = layer;
  const site = siteOf(m, n);
  const testHessian = statsOf(layer.test).hessian;
  const energy = (w: ArrayLike<number>): number => {
    let sum = 0;
    for (let start = 0; start < w.length; start += n) {
      for (let i = 0; i < n; i++) {
        let product = 0;
        for (let j = 0; j < n; j++) product += testHessian[i * n + j] * w[start + j];
        sum += product * w[start + i];
      }
    }
    return sum;
  };
  const reference = energy(layer.weight);

  async function testError(bits: number, transform: TransformKind, without: 'polish'[]): Promise<number> {
    const stats = statsOf(layer.calibration);
    const allocation: BitAllocation = {
      widths: WIDTHS,
      sizesOf: (site, groupSize) => layerSizes({ unit: 'code' }, site, groupSize, WIDTHS),
      sites: new Map([[site.name, { transform, groupSize: 32, budget: m * n * bits }]]),
    };
    const context = { ...contextOf({ preset: 'best', bits, groupSize: 32, without }), allocation };
    const plan = await slimLlmBest.decide(context, site, layer.weight, stats);
    const { quantized } = await applyBest(context, site, layer.weight, stats, plan);
    const decoded = dequantize(quantized);
    return energy(Float64Array.from(decoded, (value, i) => value - layer.weight[i])) / reference;
  }

  // The vectors hold to 2 %; another choice between nearly equal widths may go either way, so a little more is allowed above.
  it.each([
    [2, 'perm', ['polish'], 0.0508],
    [2, 'perm', [], 0.0442],
    [2, 'perm-had', ['polish'], 0.0368],
    [2, 'perm-had', [], 0.0325],
    [3, 'perm', [], 0.0141],
    [3, 'perm-had', ['polish'], 0.0093],
    [3, 'perm-had', [], 0.0087],
  ] as const)(
    'at %i bits, %s, without %j, is as far off as the specification says',
    async (bits, transform, without, expected) => {
      const error = await testError(bits, transform, [...without]);
      expect(error / expected).toBeGreaterThan(0.9);
      expect(error / expected).toBeLessThan(1.03);
    },
  );

  // The specification has no figure for this layer: on its others a rotation over the whole input lies between the two.
  it('is less far off with its input rotated as a whole than with it sorted, but not by as much as with both', async () => {
    const error = await testError(2, 'had', []);
    expect(error).toBeLessThan(0.97 * 0.0442);
    expect(error).toBeGreaterThan(1.05 * 0.0325);
  });
});
