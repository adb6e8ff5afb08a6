import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Blas, type Matrix, NotPositiveDefiniteError } from '../../src/compute/blas.ts';
import type { Engine } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { Random } from '../../src/compute/random.ts';
import { naiveBlas, upperOf } from '../support/naive-blas.ts';

const naive = naiveBlas();
/** fp32 sums of up to a few hundred products of numbers below 1/2. */
const FP32 = 1e-5;

let engine: Engine;
let blas: Blas;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
  blas = createBlas(engine);
});
afterAll(() => engine[Symbol.asyncDispose]());

function uniform(rows: number, columns: number, name: string, scale = 1): Matrix {
  const random = new Random(0, name);
  return { rows, columns, data: Float32Array.from({ length: rows * columns }, () => (random.nextFloat() - 0.5) * scale) };
}

function smallIntegers(rows: number, columns: number, name: string): Matrix {
  const random = new Random(0, name);
  return { rows, columns, data: Float32Array.from({ length: rows * columns }, () => random.nextBelow(15) - 7) };
}

function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  expect(a.length).toBe(b.length);
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

describe('gemm', () => {
  it('equals sums of products for every transposition, scalar and shape', async () => {
    const side = fc.integer({ min: 1, max: 40 });
    const scalars = fc.constantFrom(1, -1, 0.3, 2);
    const cases = fc.record({
      m: side,
      k: side,
      n: side,
      tA: fc.boolean(),
      tB: fc.boolean(),
      alpha: scalars,
      beta: fc.constantFrom(0, 1, 0.7, -1),
    });
    await fc.assert(
      fc.asyncProperty(cases, async ({ m, k, n, tA, tB, alpha, beta }) => {
        const a = tA ? uniform(k, m, 'a') : uniform(m, k, 'a');
        const b = tB ? uniform(n, k, 'b') : uniform(k, n, 'b');
        const before = uniform(m, n, 'c');
        const options = { transposeA: tA, transposeB: tB, alpha, beta };
        const own = await blas.gemm(a, b, { ...options, out: { ...before, data: before.data.slice() } });
        const expected = await naive.gemm(a, b, { ...options, out: before });
        expect(largestDifference(own.data, expected.data)).toBeLessThan(FP32);
      }),
      { numRuns: 60 },
    );
  });

  it('is exact on small integers', async () => {
    const [a, b] = [smallIntegers(33, 129, 'a'), smallIntegers(65, 129, 'b')];
    const options = { transposeB: true };
    expect((await blas.gemm(a, b, options)).data).toEqual((await naive.gemm(a, b, options)).data);
  });

  it('reads and writes views, and touches nothing beside them', async () => {
    const memory = new Float32Array(20).fill(-1);
    const a: Matrix = { rows: 1, columns: 2, data: Float32Array.of(0, 2, 3, 0).subarray(1, 3) };
    const out: Matrix = { rows: 1, columns: 2, data: memory.subarray(7, 9) };
    const result = await blas.gemm(a, { rows: 2, columns: 2, data: Float32Array.of(1, 0, 0, 1) }, { out });
    expect(result).toBe(out);
    expect(Array.from(memory)).toEqual([-1, -1, -1, -1, -1, -1, -1, 2, 3, ...new Array<number>(11).fill(-1)]);
  });

  it('accumulates in place: three runs give six times X^T X', async () => {
    const x = smallIntegers(50, 9, 'x');
    const out: Matrix = { rows: 9, columns: 9, data: new Float32Array(81) };
    for (let i = 0; i < 3; i++) await blas.gemm(x, x, { transposeA: true, alpha: 2, beta: 1, out });
    const once = await naive.gemm(x, x, { transposeA: true });
    expect(out.data).toEqual(once.data.map((value) => 6 * value));
  });

  it.each([1, 0.5])('with beta 0 ignores what out held, NaN included (alpha %d)', async (alpha) => {
    const one: Matrix = { rows: 1, columns: 1, data: Float32Array.of(2) };
    const out: Matrix = { rows: 1, columns: 1, data: Float32Array.of(Number.NaN) };
    expect((await blas.gemm(one, one, { alpha, beta: 0, out })).data[0]).toBe(4 * alpha);
  });

  it('takes empty sides: no rows give nothing, no terms give beta times out', async () => {
    const matrix = (rows: number, columns: number, ...data: number[]): Matrix => ({
      rows,
      columns,
      data: Float32Array.from(data),
    });
    expect((await blas.gemm(matrix(0, 2), matrix(2, 3, 1, 2, 3, 4, 5, 6))).data).toHaveLength(0);
    expect((await blas.gemm(matrix(1, 0), matrix(0, 1))).data).toEqual(Float32Array.of(0));
    expect((await blas.gemm(matrix(1, 0), matrix(0, 1), { beta: 2, out: matrix(1, 1, 3) })).data).toEqual(Float32Array.of(6));
  });

  it('refuses shapes that do not fit and a beta without out', async () => {
    const a = uniform(2, 3, 'a');
    await expect(blas.gemm(a, a)).rejects.toThrow('the inner sides differ');
    await expect(blas.gemm(a, a, { transposeB: true, out: uniform(3, 2, 'c') })).rejects.toThrow('the result is (2, 2)');
    await expect(blas.gemm(a, a, { transposeB: true, beta: 1 })).rejects.toThrow('there is no out');
  });
});

describe('gram', () => {
  it('is bit for bit the mean of x x^T on small integers, over strips, chunks and calls', async () => {
    // 300 features are two strips, 2100 tokens two chunks.
    const gram = blas.gram(300);
    const expected = naive.gram(300);
    for (const x of [smallIntegers(2100, 300, 'x'), smallIntegers(5, 300, 'y')]) {
      await gram.add(x);
      await expected.add(x);
    }
    expect(gram.tokenCount).toBe(2105);
    expect(gram.finish()).toEqual(expected.finish());
  });

  it('leaves masked rows out, whatever they hold', async () => {
    const x = smallIntegers(40, 17, 'x');
    const mask = Uint8Array.from({ length: 40 }, (_, row) => (row % 3 === 0 ? 0 : 1));
    x.data.fill(Number.NaN, 0, 17);
    const gram = blas.gram(17);
    const expected = naive.gram(17);
    await gram.add(x, mask);
    await expected.add(x, mask);
    expect(gram.tokenCount).toBe(26);
    expect(gram.finish()).toEqual(expected.finish());
  });

  it('is exactly symmetric and as exact as fp32 products allow on real numbers', async () => {
    const x = uniform(3000, 270, 'x');
    const gram = blas.gram(270);
    const expected = naive.gram(270);
    await gram.add(x);
    await expected.add(x);
    const own = gram.finish();
    for (let i = 0; i < 270; i++)
      for (let j = 0; j < i; j++) if (own[i * 270 + j] !== own[j * 270 + i]) expect.fail(`(${i}, ${j})`);
    expect(largestDifference(own, expected.finish())).toBeLessThan(1e-7);
  });

  it('keeps small additions to a large sum, which fp32 would lose', async () => {
    const gram = blas.gram(1);
    await gram.add({ rows: 1, columns: 1, data: Float32Array.of(2 ** 14) });
    for (let i = 0; i < 8; i++) await gram.add({ rows: 1, columns: 1, data: Float32Array.of(1) });
    expect(gram.finish()[0]).toBe((2 ** 28 + 8) / 9);
  });

  it('may be fed together with another one', async () => {
    const [x, y] = [smallIntegers(30, 20, 'x'), smallIntegers(50, 11, 'y')];
    const [one, two] = [blas.gram(20), blas.gram(11)];
    await Promise.all([one.add(x), two.add(y), one.add(x)]);
    const [first, second] = [naive.gram(20), naive.gram(11)];
    await first.add(x);
    await second.add(y);
    expect(one.tokenCount).toBe(60);
    expect(one.finish()).toEqual(first.finish());
    expect(two.finish()).toEqual(second.finish());
  });

  it('of no tokens is zero', () => {
    expect(blas.gram(2).finish()).toEqual(new Float64Array(4));
  });

  it('refuses rows of another width, a mask of another length, and use after the end', async () => {
    const gram = blas.gram(2);
    const x = uniform(1, 2, 'x');
    await expect(gram.add(uniform(1, 3, 'x'))).rejects.toThrow('2 features cannot take rows of 3');
    await expect(gram.add(x, new Uint8Array(2))).rejects.toThrow('a mask of 2');
    gram.finish();
    expect(() => gram.finish()).toThrow('finished before');
    await expect(gram.add(x)).rejects.toThrow('finished before');
  });

  it('gives the same on a device without fp64', async () => {
    const device = Object.assign(Object.create(engine) as Engine, {
      device: 'webgpu',
      compile: engine.compile.bind(engine),
      doublePrecision: async () => engine,
    });
    const x = smallIntegers(100, 300, 'x');
    const [own, expected] = [createBlas(device).gram(300), blas.gram(300)];
    for (const gram of [own, expected]) {
      await gram.add(x);
      await gram.add(x);
    }
    expect(own.finish()).toEqual(expected.finish());
    const hessian = await hessianOf(20);
    expect(await upperOf(createBlas(device), hessian, 20)).toEqual(await upperOf(blas, hessian, 20));
  });
});

/** A well conditioned (n, n) Hessian. */
async function hessianOf(n: number): Promise<Float64Array> {
  const gram = blas.gram(n);
  await gram.add(uniform(n + 30, n, 'hessian'));
  const hessian = gram.finish();
  for (let i = 0; i < n; i++) hessian[i * n + i] += 0.01;
  return hessian;
}

describe('inverseFactor', () => {
  it("gives the specification's factor", async () => {
    const hessian = Float64Array.of(4, 2, 1, 0, 2, 3, 1, 1, 1, 1, 2, 0.5, 0, 1, 0.5, 1);
    const factor = await upperOf(blas, hessian, 4);
    expect(largestDifference(factor.subarray(0, 4), [0.73598007, -0.67936622, -0.22645541, 0.79259392])).toBeLessThan(1e-8);
    const energies = [0, 5, 10, 15].map((i) => 1 / factor[i] ** 2);
    expect(largestDifference(energies, [1.84615385, 1.85714286, 1.75, 1])).toBeLessThan(1e-8);
  });

  // Below, at and beyond the block of 256, with several blocks and a short last one.
  it.each([1, 2, 255, 256, 257, 530])('equals the slow factor for n = %d and does not change its argument', async (n) => {
    const hessian = await hessianOf(n);
    const before = hessian.slice();
    const own = await upperOf(blas, hessian, n);
    expect(hessian).toEqual(before);
    expect(largestDifference(own, await upperOf(naive, hessian, n))).toBeLessThan(1e-10);
  });

  it.each([1, 2, 255, 256, 257, 530])('has the reciprocal squares of its diagonal as pivots for n = %d', async (n) => {
    const hessian = await hessianOf(n);
    const before = hessian.slice();
    const pivots = await blas.pivots(hessian, n);
    expect(hessian).toEqual(before);
    expect(largestDifference(pivots, await naive.pivots(hessian, n))).toBeLessThan(1e-10);
  });

  it('is upper triangular and gives the inverse: U H U^T = I', async () => {
    const n = 300;
    const hessian = await hessianOf(n);
    const u = await upperOf(blas, hessian, n);
    for (let i = 0; i < n; i++)
      for (let j = 0; j < i; j++) if (u[i * n + j] !== 0) expect.fail(`U[${i}, ${j}] is ${u[i * n + j]}`);
    const uh = new Float64Array(n);
    for (let i = 0; i < n; i += 7) {
      for (let j = 0; j < n; j++) {
        uh[j] = 0;
        for (let k = i; k < n; k++) uh[j] += u[i * n + k] * hessian[k * n + j];
      }
      for (let j = 0; j < n; j++) {
        let sum = 0;
        for (let k = j; k < n; k++) sum += uh[k] * u[j * n + k];
        expect(Math.abs(sum - (i === j ? 1 : 0))).toBeLessThan(1e-10);
      }
    }
  });

  it.each([
    [2, 0],
    [300, 299],
    [300, 150],
    [300, 5],
    [530, 20],
  ])('n = %d: names the pivot %d that is not positive', async (n, pivot) => {
    const hessian = new Float64Array(n * n);
    for (let i = 0; i < n; i++) hessian[i * n + i] = i === pivot ? -3 : 2;
    const failure = await blas.inverseFactor(hessian, n).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(NotPositiveDefiniteError);
    expect(failure).toMatchObject({
      pivot,
      value: -3,
      message: `pivot ${pivot} of the Cholesky factorization is -3, not positive`,
    });
  });

  it('refuses NaN and a singular matrix', async () => {
    await expect(blas.inverseFactor(Float64Array.of(Number.NaN), 1)).rejects.toMatchObject({ pivot: 0 });
    await expect(blas.inverseFactor(Float64Array.of(1, 1, 1, 1), 2)).rejects.toMatchObject({ pivot: 0, value: 0 });
    await expect(blas.inverseFactor(new Float64Array(3), 2)).rejects.toThrow('3 elements are not (2, 2)');
    await expect(blas.pivots(new Float64Array(3), 2)).rejects.toThrow('3 elements are not (2, 2)');
    await expect(blas.pivots(Float64Array.of(1, 1, 1, 1), 2)).rejects.toMatchObject({ pivot: 0, value: 0 });
  });
});

describe('meanKl', () => {
  const row = (...data: number[]): Matrix => ({ rows: 1, columns: data.length, data: Float32Array.from(data) });
  /** What the specification asks of the mean on typical logits. */
  const ABSOLUTE = 1e-6;

  it("gives the specification's value, forward and reverse", async () => {
    expect(await blas.meanKl(row(0, 1, 2), row(0, 1, 1))).toBeCloseTo(0.1196298, 6);
    expect(await blas.meanKl(row(0, 1, 1), row(0, 1, 2))).toBeCloseTo(0.12329236, 6);
    expect(await (await blas.klTarget(row(0, 1, 2))).meanKl(row(0, 1, 1))).toBeCloseTo(0.1196298, 6);
  });

  it.each([
    [700, 500, 4, 0.5],
    [3, 100_003, 8, 1],
    [400, 64, 30, 10],
  ])(
    'equals the slow mean for %d rows of %d logits, and for a target used again and again',
    async (rows, columns, scale, change) => {
      const target = uniform(rows, columns, 'target', scale);
      const trials = ['one', 'two'].map((name) => {
        const noise = uniform(rows, columns, name, change);
        return { rows, columns, data: target.data.map((value, i) => value + noise.data[i]) };
      });
      const expected = await Promise.all(trials.map((trial) => naive.meanKl(target, trial)));
      for (const [i, trial] of trials.entries())
        expect(Math.abs((await blas.meanKl(target, trial)) - expected[i])).toBeLessThan(ABSOLUTE);
      const prepared = await blas.klTarget(target);
      for (const [i, trial] of trials.entries())
        expect(Math.abs((await prepared.meanKl(trial)) - expected[i])).toBeLessThan(ABSOLUTE);
    },
  );

  it('of a distribution with itself is exactly zero', async () => {
    const target = uniform(50, 300, 'target', 20);
    expect(await blas.meanKl(target, target)).toBe(0);
    const trial = { ...target, data: target.data.slice() };
    expect(await (await blas.klTarget(target)).meanKl(trial)).toBe(0);
  });

  it('is finite for logits far apart, without clamps', async () => {
    expect(await blas.meanKl(row(200, -200), row(-200, 200))).toBeCloseTo(400, 3);
    expect(await blas.meanKl(row(10_000, 0), row(10_000, 5))).toBe(0);
  });

  it('refuses matrices of different shapes', async () => {
    await expect(blas.meanKl(row(1, 2), row(1, 2, 3))).rejects.toThrow('target (1, 2) and trial (1, 3) differ in shape');
    await expect((await blas.klTarget(row(1, 2))).meanKl(row(1, 2, 3))).rejects.toThrow('differ in shape');
  });
});
