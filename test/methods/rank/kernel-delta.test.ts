/** Updates out of a kernel: the specification's numbers (adapters.md 12.14), every gradient against differences, and exactly as many non-zeros as were asked for. */
import { describe, expect, it } from 'vitest';
import { Parameter } from '../../../src/compute/optim/parameter.ts';
import {
  keepLargest,
  kernelDelta,
  kernelGradients,
  kernelOf,
  kernelStart,
  nonZeros,
} from '../../../src/methods/rank/kernel-delta.ts';
import { parseRankBudget, spendable } from '../../../src/methods/rank/rank-budget.ts';
import { normal } from '../../../src/methods/rank/training/initial.ts';
import type { TrainedModule } from '../../../src/methods/rank/training/schedule.ts';
import { snella } from '../../../src/methods/rank/training/snella.ts';
import { parseSize } from '../../../src/runs/size.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const blas = naiveBlas();
const INS = Float32Array.of(0.1, 0.2, 0.3, -0.1, 0, 0.4, 0.2, 0, -0.1, 0.1, 0.3, 0.3);
const OUTS = Float32Array.of(0, 0.1, 0.2, 0.2, 0.1, 0.1, -0.2, 0);
const sizes = { outFeatures: 2, inFeatures: 3 };
/** (m, n) as the specification prints it, (n, m). */
const turned = (values: Float32Array) => [0, 1, 2].flatMap((i) => [0, 1].map((j) => values[j * 3 + i]));

function moduleOf(parts: Readonly<Record<string, Float32Array>>, published: boolean, kept?: number): TrainedModule {
  const parameters = new Map(Object.entries(parts).map(([key, values]) => [key, new Parameter([values.length], values.slice())]));
  return { name: 'layer', block: 0, ...sizes, scale: 1, rank: 0, parameters, kernel: { published, kept } };
}
const one = (value: number) => Float32Array.of(value);
const plain = { kernelIn: INS, kernelOut: OUTS, alpha: one(0), gamma: one(1), beta: one(0) };

describe('the kernel of the specification', () => {
  it('is sums of distances with alternating signs, and a softmax over the outputs', async () => {
    const none = await kernelOf(blas, { ins: INS, outs: OUTS, alpha: 0, gamma: 1, beta: 0 }, sizes);
    const expected = [0, -0.03, 0.016056, 0.017481, 0.001716, -0.030025];
    for (const [i, value] of turned(none.values).entries()) expect(value).toBeCloseTo(expected[i], 6);
    const whole = await kernelOf(blas, { ins: INS, outs: OUTS, alpha: 1, gamma: 1, beta: 0 }, sizes);
    expect(turned(whole.values)[0]).toBeCloseTo(0.507499, 5);
    expect(turned(whole.values)[1]).toBeCloseTo(0.462501, 5);
  });

  it('is cut and squared as published', async () => {
    const delta = await kernelDelta(blas, moduleOf(plain, true, 3), undefined);
    const expected = [0, -0.0009, 0, 0.000306, 0, -0.000902];
    for (const [i, value] of turned(delta).entries()) expect(value).toBeCloseTo(expected[i], 6);
  });
});

it('keeps exactly as many entries as are asked for, of equal ones the first', () => {
  const values = Float32Array.of(1, -2, 2, 0.5, -1, 3);
  const cut = (count: number) => {
    const own = values.slice();
    keepLargest(own, count);
    return [...own];
  };
  expect(cut(2)).toEqual([0, -2, 0, 0, 0, 3]);
  expect(cut(4)).toEqual([1, -2, 2, 0, 0, 3]);
  expect(cut(6)).toEqual([...values]);
  expect(cut(0)).toEqual([0, 0, 0, 0, 0, 0]);
  expect(nonZeros(Float32Array.of(0, 2, 0, -1))).toEqual({ indices: Int32Array.of(1, 3), values: Float32Array.of(2, -1) });
});

describe.each([
  ['less its start, whole', false, undefined],
  ['less its start, cut', false, 3],
  ['as published', true, 4],
] as const)('the gradient of a kernel %s', (_, published, kept) => {
  it('is what differences give, of every point and number', async () => {
    const start = { initialIn: normal(12, 0.3, 5, 'in'), initialOut: normal(8, 0.3, 5, 'out') };
    const module = moduleOf({ ...plain, ...start, alpha: one(0.7), gamma: one(0.8), beta: one(0.1) }, published, kept);
    const from = published ? undefined : await kernelStart(blas, module);
    const slope = normal(6, 1, 7, 'slope');
    // The published magnitudes are constants in the gradient: those of where it is taken.
    const fixed = await kernelDelta(blas, module, from);
    const here = (await kernelOf(blas, pointsOf(module), sizes)).values;
    const loss = async () => {
      const { values } = await kernelOf(blas, pointsOf(module), sizes);
      return slope.reduce((sum, g, at) => {
        const factor = published ? Math.abs(here[at]) : 1;
        return sum + (fixed[at] === 0 && kept !== undefined ? 0 : g * factor * values[at]);
      }, 0);
    };
    await kernelGradients(blas, module, slope.slice(), from);
    for (const key of ['kernelIn', 'kernelOut', 'alpha', 'gamma', 'beta']) {
      const { values, gradient } = module.parameters.get(key)!;
      for (let i = 0; i < values.length; i++) {
        const [kept0, step] = [values[i], 4e-3];
        values[i] = kept0 + step;
        const above = await loss();
        values[i] = kept0 - step;
        const below = await loss();
        values[i] = kept0;
        expect(Math.abs((above - below) / (2 * step) - gradient[i])).toBeLessThan(2e-3);
      }
    }
  });
});

function pointsOf({ parameters }: TrainedModule) {
  const [ins, outs, alpha, gamma, beta] = ['kernelIn', 'kernelOut', 'alpha', 'gamma', 'beta'].map(
    (key) => parameters.get(key)!.values,
  );
  return { ins, outs, alpha: alpha[0], gamma: gamma[0], beta: beta[0] };
}

describe('snella', () => {
  const layers = (): TrainedModule[] =>
    [
      [6, 8],
      [10, 8],
    ].map(([outFeatures, inFeatures], i) => {
      return { name: `layer ${i}`, block: 0, outFeatures, inFeatures, scale: 1, rank: 0, parameters: new Map() };
    });
  const scheduleOf = (modules: readonly TrainedModule[], preset: 'best' | 'paper' = 'best') => {
    const budget = spendable({ kind: 'density', amount: 0.25 }, modules, { least: 1 });
    const schedule = snella({ steps: 10, budget, preset, seed: 1 });
    schedule.init(modules);
    return schedule;
  };

  it('starts at nothing, and gives the sensitive layer more of ever fewer non-zeros', async () => {
    const modules = layers();
    const schedule = scheduleOf(modules);
    const start = await kernelStart(blas, modules[0]);
    expect(Math.max(...(await kernelDelta(blas, modules[0], start)))).toBe(0);
    const kept: number[] = [];
    for (let t = 1; t <= 10; t++) {
      for (const [i, { parameters }] of modules.entries())
        for (const key of ['kernelIn', 'kernelOut']) {
          const { gradient, values } = parameters.get(key)!;
          for (let k = 0; k < gradient.length; k++) {
            gradient[k] = (i === 0 ? 10 : 1) * Math.sin(t + k);
            values[k] += 0.001 * Math.cos(k + t);
          }
        }
      schedule.before(t, modules);
      schedule.after(t, modules);
      kept.push(modules.reduce((sum, { kernel }) => sum + kernel!.kept!, 0));
    }
    // 128 + (32 - 128) (1 - (1 - t / 10)^3)
    expect(kept).toEqual(Array.from({ length: 10 }, (_, i) => Math.floor(32 + 96 * (1 - (i + 1) / 10) ** 3 + 1e-9)));
    const [first, second] = modules.map(({ kernel, outFeatures, inFeatures }) => kernel!.kept! / (outFeatures * inFeatures));
    expect(first).toBeGreaterThan(2 * second);
    for (const module of modules) {
      const delta = await schedule.factors(module, blas);
      expect('indices' in delta && delta.indices.length).toBe(module.kernel!.kept);
      expect(schedule.size!(module)).toEqual({ spent: module.kernel!.kept, parameters: module.kernel!.kept });
    }
    const again = layers();
    const other = scheduleOf(again);
    other.restore(structuredClone(schedule.state()));
    expect(again.map(({ kernel }) => kernel)).toEqual(modules.map(({ kernel }) => kernel));
    expect(other.state()).toEqual(schedule.state());
  });

  it('is the kernel itself at the start, as published', async () => {
    const modules = layers();
    scheduleOf(modules, 'paper');
    expect(modules[0].parameters.has('initialIn')).toBe(false);
    expect(await kernelStart(blas, modules[0])).toBeUndefined();
    expect(Math.max(...(await kernelDelta(blas, modules[0], undefined)))).toBeGreaterThan(0);
  });

  it('has budgets of its own', () => {
    const kinds = ['density', 'bytes'] as const;
    const budget = (text: string) =>
      spendable(parseRankBudget(text, parseSize, '--budget', kinds), layers(), { parameterBits: 64, least: 1 });
    expect(budget('density=0.25').total).toBe(32);
    expect(budget('bytes=0.16kB').total).toBe(20);
    expect(() => parseRankBudget('density=0.1', parseSize)).toThrow(
      /one of r=16, params=2\.5M, pct=0\.5%, bytes=20MB, bpw=0\.25 is/,
    );
  });
});
