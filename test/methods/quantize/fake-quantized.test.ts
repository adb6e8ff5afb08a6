/** Quantized layers that are learned, against gradients.md section 4 and differences of a twin without roundings. */
import { describe, expect, test } from 'vitest';
import { transformColumns } from '../../../src/methods/quantize/input-transform.ts';
import { FakeQuantizedLinear, type GridRule } from '../../../src/methods/quantize/learned/fake-quantized.ts';
import { dequantize, type QuantizedLinear } from '../../../src/methods/quantize/quantized-linear.ts';
import { rtn } from '../../../src/methods/quantize/rtn.ts';
import { normals } from '../../support/reference-layer.ts';
import { contextOf, randomWeight, siteOf } from './support.ts';

const RULES = ['scale', 'ends', 'clipping'] as const satisfies readonly GridRule[];

/** One row of five weights on the grid of scale 1/2, zero point 1: the vector of gradients.md, section 4. */
const VECTOR: QuantizedLinear = {
  outFeatures: 1,
  inFeatures: 5,
  groupSize: 5,
  bits: Uint8Array.of(2),
  codes: Uint8Array.of(0, 0, 1, 2, 3),
  scales: Float32Array.of(0.5),
  zeroPoints: Uint8Array.of(1),
  scaleDtype: 'F16',
};
const WEIGHTS = Float32Array.of(-1, -0.4, 0.1, 0.5, 1.2);
const COTANGENT = Float32Array.of(1, 2, -1, 0.5, -2);

function decoded(layer: FakeQuantizedLinear): number[] {
  const { outFeatures, inFeatures } = layer.start;
  const weight = new Float32Array(outFeatures * inFeatures);
  layer.decode(weight);
  return [...weight];
}

/** A layer of every width, its last group short; sorted, signs turned, and rotated in runs of 8 where asked for. */
async function mixedLayer(transformed: boolean): Promise<{ weight: Float32Array; start: QuantizedLinear }> {
  const [rows, columns] = [3, 37];
  const weight = randomWeight(rows, columns, 7);
  const plan = { groupSize: 8, bits: [3, 0, 1, 2, 4] };
  const transform = {
    order: Uint32Array.from({ length: columns }, (_, k) => (k * 11 + 5) % columns),
    signs: Uint8Array.from({ length: columns }, (_, k) => (k % 3 === 0 ? 1 : 0)),
    hadamard: 8,
  };
  const stored = transformed ? transformColumns(transform, weight, rows, columns) : weight;
  const { quantized } = await rtn.apply(contextOf(), siteOf(rows, columns), stored, undefined, plan);
  return { weight, start: transformed ? { ...quantized, transform } : quantized };
}

describe('a layer that is learned', () => {
  test('has the published derivatives by the ends of its range', () => {
    const layer = new FakeQuantizedLinear(WEIGHTS, VECTOR, { grid: 'ends', rounding: false });
    // The range is -0.5..1 times the factors: -0.6..0.9.
    layer.upper.values[0] = 0.9;
    layer.lower!.values[0] = 1.2;
    expect(decoded(layer).map((w) => Math.round(w * 1e6) / 1e6)).toEqual([-0.5, -0.5, 0, 0.5, 1]);
    layer.backward(COTANGENT);
    expect(layer.upper.gradient[0]).toBeCloseTo(0.266667, 5);
    expect(layer.lower!.gradient[0] / -0.5).toBeCloseTo(0.733333, 5);
  });

  test('has the published derivatives by its roundings: the scale where a code is free, 0 where it is cut off', () => {
    const layer = new FakeQuantizedLinear(WEIGHTS, VECTOR, { grid: 'scale', rounding: true });
    layer.rounding!.values.set([0.3, -0.3, 0.4, 0.1, -0.5]);
    expect([...layer.finish().codes]).toEqual([0, 0, 2, 2, 3]);
    layer.backward(COTANGENT);
    expect([...layer.rounding!.gradient]).toEqual([0, 1, -0.5, 0.25, -1]);
  });

  test('follows learnable clipping: ends are sigmoid(beta) of the range of the weights', () => {
    const layer = new FakeQuantizedLinear(WEIGHTS, VECTOR, { grid: 'clipping', rounding: false });
    const factor = 1 / (1 + Math.exp(-4));
    expect(layer.finish().scales[0]).toBeCloseTo((factor * 2.2) / 3, 3);
    layer.upper.values[0] = Math.log(0.75 / 0.25);
    layer.lower!.values[0] = Math.log(0.6 / 0.4);
    layer.backward(COTANGENT);
    // The same range as in the first test, reached from 1.2 and -1.
    expect(layer.upper.gradient[0]).toBeCloseTo(0.266667 * 1.2 * 0.75 * 0.25, 5);
    expect(layer.lower!.gradient[0]).toBeCloseTo(0.733333 * -1 * 0.6 * 0.4, 5);
  });

  const cases = RULES.flatMap((grid) => [false, true].map((transformed) => [grid, transformed] as const));
  test.each(cases)(
    'learning %s, transformed %s: differentiates as a twin whose roundings stand still',
    async (grid, transformed) => {
      const { weight, start } = await mixedLayer(transformed);
      const layer = new FakeQuantizedLinear(weight, start, { grid, rounding: true });
      const noise = normals(
        3,
        layer.parameters.reduce((sum, { values }) => sum + values.length, 0),
      );
      let at = 0;
      for (const parameter of layer.parameters) {
        const reach = parameter === layer.rounding ? 0.2 : 0.1;
        for (let i = 0; i < parameter.values.length; i++) parameter.values[i] += reach * noise[at++];
      }
      const cotangent = Float32Array.from(normals(4, weight.length));
      const parameters = layer.parameters.map(({ values }) => Float64Array.from(values));
      const twin = twinOf(weight, start, grid, parameters);
      twin(parameters).forEach((value, i) => {
        expect(decoded(layer)[i]).toBeCloseTo(value, 5);
      });
      layer.backward(cotangent);
      const loss = (of: readonly Float64Array[]) => twin(of).reduce((sum, value, i) => sum + value * cotangent[i], 0);
      layer.parameters.forEach(({ gradient }, p) => {
        for (let i = 0; i < gradient.length; i++) {
          const moved = (by: number) =>
            loss(parameters.map((values, q) => (p === q ? values.map((value, j) => (i === j ? value + by : value)) : values)));
          const slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
          expect(Math.abs(gradient[i] - slope), `parameter ${p}, element ${i}`).toBeLessThan(1e-5 * (1 + Math.abs(slope)));
        }
      });
    },
  );

  test.each([false, true])('starts as the codes it is given, nearest or not (transformed: %s)', async (transformed) => {
    const { weight, start } = await mixedLayer(transformed);
    const codes = start.codes.map((code, i) =>
      i % 5 === 0 && start.bits[Math.floor((i % 37) / 8)] >= 2 ? (code > 0 ? code - 1 : code + 1) : code,
    );
    const given = { ...start, codes };
    for (const grid of ['scale', 'ends'] as const) {
      const layer = new FakeQuantizedLinear(weight, given, { grid, rounding: true });
      expect(layer.finish()).toEqual(given);
      const expected = dequantize(given);
      decoded(layer).forEach((value, i) => {
        expect(value).toBeCloseTo(expected[i], 6);
      });
    }
  });

  test('leaves a branch beside the codes as it is', async () => {
    const { weight, start } = await mixedLayer(true);
    const loraA = Float32Array.from(normals(8, 37));
    const lowRank = { rank: 1, dtype: 'F32', loraA, loraB: Float32Array.of(0.1, -0.2, 0.3) } as const;
    const given = { ...start, lowRank };
    const layer = new FakeQuantizedLinear(weight, given, { grid: 'scale', rounding: false });
    const expected = dequantize(layer.finish());
    decoded(layer).forEach((value, i) => {
      expect(value).toBeCloseTo(expected[i], 3);
    });
    expect(layer.finish().lowRank).toBe(lowRank);
  });

  test('keeps roundings within half a step and range factors above nothing', () => {
    const layer = new FakeQuantizedLinear(WEIGHTS, VECTOR, { grid: 'ends', rounding: true });
    for (const { values } of layer.parameters) values.fill(-3);
    layer.project();
    expect([...layer.rounding!.values]).toEqual(new Array(5).fill(-0.5));
    expect(layer.upper.values[0]).toBeCloseTo(0.1);
    expect(layer.finish().scales[0]).toBeGreaterThan(0);
  });

  test('learns scales that float16 cannot hold in float32', () => {
    const small = { ...VECTOR, scales: Float32Array.of(1e-6), scaleDtype: 'F32' } as const;
    const layer = new FakeQuantizedLinear(
      WEIGHTS.map((w) => w * 2e-6),
      small,
      { grid: 'scale', rounding: true },
    );
    expect(layer.finish()).toMatchObject({ scaleDtype: 'F32', scales: small.scales });
  });
});

/** round(u) = u + r with r as it is at `origin`; whether a code is cut off, too, is as it is there. Plain matrices in float64. */
function twinOf(weight: Float32Array, start: QuantizedLinear, grid: GridRule, origin: readonly Float64Array[]) {
  const { outFeatures: rows, inFeatures: columns, groupSize, bits, scales, zeroPoints, offsets, transform } = start;
  const whole = (x: number) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));
  const order = transform?.order ?? Uint32Array.from({ length: columns }, (_, k) => k);
  const sign = (i: number) => (transform?.signs?.[i] === 1 ? -1 : 1);
  /** Entry (i, k) of what turns whole runs of 8 stored columns; `by` is the size of its elements, powers of two on either side. */
  const turned = (i: number, k: number, by: number): number => {
    const size = transform?.hadamard ?? 0;
    if (size === 0 || i >= columns - (columns % size)) return i === k ? 1 : 0;
    if (Math.floor(i / size) !== Math.floor(k / size)) return 0;
    let ones = 0;
    for (let bit = (i % size) & (k % size); bit > 0; bit >>= 1) ones += bit & 1;
    return ones % 2 === 0 ? by : -by;
  };
  const stored = Array.from({ length: rows }, (_, r) =>
    Array.from({ length: columns }, (_, k) =>
      order.reduce((sum, from, i) => sum + turned(i, k, 1 / 4) * sign(i) * weight[r * columns + from], 0),
    ),
  );
  const frozen = new Map<string, number>();
  const held = (key: string, make: () => number): number => {
    if (!frozen.has(key)) frozen.set(key, make());
    return frozen.get(key)!;
  };
  const evaluate = (parameters: readonly Float64Array[]): number[] => {
    const [upper, second, third] = parameters;
    const [lower, rounding] = grid === 'scale' ? [undefined, second] : [second, third];
    const out = new Array<number>(rows * columns).fill(0);
    for (let r = 0; r < rows; r++) {
      const row = new Array<number>(columns).fill(0);
      for (let k = 0; k < columns; k++) {
        const g = Math.floor(k / groupSize);
        if (bits[g] === 0) continue;
        const at = r * bits.length + g;
        const most = 2 ** bits[g] - 1;
        const startZero = bits[g] === 1 ? -offsets![at] / scales[at] : zeroPoints[at];
        let [s, z] = [scales[at] * Math.exp(upper[at]), startZero];
        if (lower) {
          let [low, high] = [-scales[at] * startZero, scales[at] * (most - startZero)];
          if (grid === 'clipping' && bits[g] >= 2) {
            const group = stored[r].slice(g * groupSize, (g + 1) * groupSize);
            [low, high] = [Math.min(0, ...group), Math.max(0, ...group)];
          }
          const factor = (value: number) => (grid === 'clipping' ? 1 / (1 + Math.exp(-value)) : value);
          low *= factor(lower[at]);
          high *= factor(upper[at]);
          s = (high - low) / most;
          const exact = -low / s;
          const rounded = bits[g] === 1 ? exact : exact + held(`z ${at}`, () => whole(exact) - exact);
          const cut = held(`cut ${at}`, () => (bits[g] === 1 ? 0 : rounded < -1e-9 ? -1 : rounded > most + 1e-9 ? 1 : 0));
          z = cut < 0 ? 0 : cut > 0 ? most : rounded;
        }
        const u = stored[r][k] / s + z + rounding[r * columns + k];
        const c = u + held(`c ${r} ${k}`, () => whole(u) - u);
        const over = held(`over ${r} ${k}`, () => (c < -1e-9 ? -1 : c > most + 1e-9 ? 1 : 0));
        row[k] = s * ((over < 0 ? 0 : over > 0 ? most : c) - z);
      }
      for (let i = 0; i < columns; i++) {
        out[r * columns + order[i]] = sign(i) * row.reduce((sum, value, k) => sum + turned(i, k, 1 / 2) * value, 0);
      }
    }
    return out;
  };
  evaluate(origin);
  return evaluate;
}
