/** What holds for every engine: ort on the CPU, tfjs on its plain backend, ort on WebGPU where there is an adapter. */
import * as tf from '@tensorflow/tfjs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { Blas, Matrix } from '../../src/compute/blas.ts';
import { attentionOn } from '../../src/compute/devices.ts';
import type { Engine, NdArray } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { createTfjsEngine } from '../../src/compute/tfjs.ts';
import { UnsupportedError } from '../../src/errors.ts';
import { GraphBuilder } from '../../src/graph/builder.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { Model } from '../../src/model/model.ts';
import { naiveBlas, upperOf } from '../support/naive-blas.ts';
import { randomSource, randomValues } from '../support/random.ts';
import { f32, i32, i64 } from '../support/run-graph.ts';
import { webgpuEngine } from '../support/software-vulkan.ts';
import { tinyModels } from '../support/tiny-models.ts';

/** Largest difference from ort on the CPU, as a fraction of the largest value: fp32 in another order of summation. */
const BLOCK_TOLERANCE = 2e-5;
/** The same for one product, against sums in fp64. */
const PRODUCT_TOLERANCE = 2e-6;

interface Subject {
  readonly label: string;
  start(): Promise<Engine>;
}

const SUBJECTS: readonly Subject[] = [
  { label: 'ort on cpu', start: () => createEngine({ threads: 1 }) },
  { label: 'tfjs on its plain backend', start: () => createTfjsEngine({ tf, threads: 1 }) },
  ...(await webgpuSubject()),
];

/** Skipped, with the reason printed, where there is no adapter. */
async function webgpuSubject(): Promise<Subject[]> {
  const engine = await webgpuEngine();
  return engine === undefined ? [] : [{ label: 'ort on webgpu', start: async () => engine }];
}

function values(seed: number, shape: readonly number[], spread = 1): NdArray {
  return f32(
    shape,
    randomValues(
      randomSource(seed),
      shape.reduce((product, dim) => product * dim, 1),
      spread,
    ),
  );
}

function matrix(seed: number, rows: number, columns: number): Matrix {
  return { rows, columns, data: values(seed, [rows, columns]).data as Float32Array };
}

function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  expect(actual.length).toBe(expected.length);
  let [largest, error] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    largest = Math.max(largest, Math.abs(expected[i]));
    const difference = Math.abs(actual[i] - expected[i]);
    if (!(difference <= error)) error = difference;
  }
  return error / largest;
}

/** Rows of real tokens only: what an engine makes of pads is nobody's business. */
function realRows({ data, shape }: NdArray, lengths: readonly number[]): Float32Array {
  const [batch, sequence, features] = shape;
  const rows = Array.from({ length: batch }, (_, b) =>
    (data as Float32Array).subarray(b * sequence * features, (b * sequence + lengths[b]) * features),
  );
  return Float32Array.from(rows.flatMap((row) => [...row]));
}

const LENGTHS = [7, 4];

/** Feeds of a block's graph with random weights and states of two padded rows. */
function blockFeeds(model: OnnxModel): Record<string, NdArray> {
  const feeds = model.graph.inputs.map(({ name, shape }, seed): [string, NdArray] => {
    if (name === 'lengths') return [name, i32([2], LENGTHS)];
    if (name === 'hidden') return [name, values(seed, [2, LENGTHS[0], Number(shape![2])])];
    const dims = shape!.map(Number);
    return [name, values(seed, dims, dims.length === 1 ? 1 : 1 / Math.sqrt(dims[1]))];
  });
  return Object.fromEntries(feeds);
}

const models = tinyModels().map(({ label, config, source }): [string, Model] => [
  label,
  createModel(config, 'config.json', source),
]);

let reference: Engine;
beforeAll(async () => {
  reference = await createEngine({ threads: 1 });
});
afterAll(() => reference[Symbol.asyncDispose]());

describe.each(SUBJECTS)('$label', ({ start }) => {
  let engine: Engine;
  let blas: Blas;
  beforeAll(async () => {
    engine = await start();
    blas = createBlas(engine);
  });
  afterAll(() => engine[Symbol.asyncDispose]());

  it.each(models)('runs the blocks and the last norm of a %s', async (_, model) => {
    for (const block of model.blocks) {
      const [wanted, own] = [undefined, attentionOn(engine.device)].map((lowering) => model.blockGraph(block, 16, lowering));
      const feeds = blockFeeds(wanted.model);
      const expected = await (await reference.compile(wanted.model, { key: wanted.key })).run(feeds);
      const actual = await (await engine.compile(own.model, { key: own.key })).run(feeds);
      expect(Object.keys(actual)).toEqual(Object.keys(expected));
      for (const [name, result] of Object.entries(expected)) {
        expect(actual[name].shape).toEqual(result.shape);
        expect(relativeError(realRows(actual[name], LENGTHS), realRows(result, LENGTHS)), name).toBeLessThan(BLOCK_TOLERANCE);
      }
    }
    const { model: norm } = model.finalNormGraph();
    const { hiddenSize } = model.shape;
    const weights = norm.graph.inputs.slice(1).map(({ name }, i): [string, NdArray] => [name, values(i, [hiddenSize])]);
    const feeds = { hidden: values(9, [5, hiddenSize]), ...Object.fromEntries(weights) };
    const [expected, actual] = [await reference.compile(norm), await engine.compile(norm)];
    const results = [await expected.run(feeds), await actual.run(feeds)].map((made) => made['hidden_out'].data as Float32Array);
    expect(relativeError(results[1], results[0])).toBeLessThan(BLOCK_TOLERANCE);
  });

  it('computes only what is asked for, into the memory it is given', async () => {
    const builder = new GraphBuilder('two');
    const x = builder.input('x', 'F32', ['rows', 2]);
    builder.output('sum', builder.add(x, x));
    builder.output('tail', builder.slice(x, builder.vector([5]), builder.vector([9]), 0, 'some'));
    const program = await engine.compile(builder.build());
    const sum = f32([2, 2], [0, 0, 0, 0]);
    const made = await program.run({ x: f32([2, 2], [1, 2, 3, 4]) }, { outputs: ['sum'], into: { sum } });
    expect(Object.keys(made)).toEqual(['sum']);
    expect(made['sum'].data).toBe(sum.data);
    expect(sum.data).toEqual(Float32Array.of(2, 4, 6, 8));
    const wrong = f32([4, 1], [0, 0, 0, 0]);
    await expect(program.run({ x: f32([2, 2], [1, 2, 3, 4]) }, { outputs: ['sum'], into: { sum: wrong } })).rejects.toThrow();
  });

  it('gives results that later runs and changes of the feeds leave alone', async () => {
    const builder = new GraphBuilder('copy');
    const x = builder.input('x', 'F32', ['rows', 2]);
    builder.output('y', builder.reshape(x, [2, 'rows']));
    builder.output('z', x);
    const program = await engine.compile(builder.build());
    const feed = f32([1, 2], [1, 2]);
    const { y, z } = await program.run({ x: feed });
    feed.data[0] = 9;
    await program.run({ x: feed });
    expect([...(y.data as Float32Array), ...(z.data as Float32Array)]).toEqual([1, 2, 1, 2]);
  });

  it('computes with 64-bit integers that fit 32 bits, and with what is true', async () => {
    const builder = new GraphBuilder('integers');
    const mask = builder.input('mask', 'I64', ['batch', 'total']);
    const x = builder.input('x', 'F32', ['batch', 'total']);
    const place = builder.max(builder.sub(builder.cumSum(mask, 1), builder.scalar('I64', 1)), builder.scalar('I64', 0));
    builder.output('place', place);
    builder.output('real', builder.less(builder.scalar('I64', 0), mask));
    builder.output('count', builder.cast(builder.reduceSum(mask, [1], false), 'I32'));
    builder.output('kept', builder.where(builder.less(builder.scalar('I64', 0), mask), x, builder.scalar('F32', -1)));
    builder.output('wide', builder.expand(builder.unsqueeze(x, [1]), builder.vector([1, 2, 1]), ['batch', 2, 'total']));
    const program = await engine.compile(builder.build());
    const made = await program.run({ mask: i64([1, 4], [0, 1, 1, 0]), x: f32([1, 4], [5, 6, 7, 8]) });
    expect(made['place']).toMatchObject({ dtype: 'I64', shape: [1, 4], data: BigInt64Array.of(0n, 0n, 1n, 1n) });
    expect(made['real']).toMatchObject({ dtype: 'BOOL', data: Uint8Array.of(0, 1, 1, 0) });
    expect(made['count']).toMatchObject({ dtype: 'I32', shape: [1], data: Int32Array.of(2) });
    expect(made['kept'].data).toEqual(Float32Array.of(-1, 6, 7, -1));
    expect(made['wide']).toMatchObject({ shape: [1, 2, 4], data: Float32Array.of(5, 6, 7, 8, 5, 6, 7, 8) });
  });

  it.each([
    [false, false, 1, 0],
    [true, false, -1, 1],
    [false, true, 0.3, 0],
    [true, true, 2, 0.5],
  ])('multiplies: transposed %s and %s, alpha %d, beta %d', async (transposeA, transposeB, alpha, beta) => {
    const [a, b] = [transposeA ? matrix(1, 17, 9) : matrix(1, 9, 17), transposeB ? matrix(2, 11, 17) : matrix(2, 17, 11)];
    const options = { transposeA, transposeB, alpha, beta };
    const made = await blas.gemm(a, b, { ...options, out: matrix(3, 9, 11) });
    const expected = await naiveBlas().gemm(a, b, { ...options, out: matrix(3, 9, 11) });
    expect(relativeError(made.data, expected.data)).toBeLessThan(PRODUCT_TOLERANCE);
  });

  it('sums x x^T over tokens, exactly for small integers, leaving masked tokens out', async () => {
    const x: Matrix = { rows: 40, columns: 300, data: matrix(4, 40, 300).data.map((value) => Math.round(value * 7)) };
    const mask = Uint8Array.from({ length: 40 }, (_, i) => (i % 3 === 0 ? 0 : 1));
    const [own, expected] = [blas.gram(300), naiveBlas().gram(300)];
    for (const gram of [own, expected]) {
      await gram.add(x);
      await gram.add(x, mask);
    }
    expect(own.finish()).toEqual(expected.finish());
  });

  it('factors a Hessian in fp64, whatever the engine itself computes in', async () => {
    const gram = blas.gram(20);
    await gram.add(matrix(5, 60, 20));
    const hessian = gram.finish();
    for (let i = 0; i < 20; i++) hessian[i * 21] += 0.01;
    const [own, expected] = [await upperOf(blas, hessian, 20), await upperOf(createBlas(reference), hessian, 20)];
    expect(relativeError(own, expected)).toBeLessThan(1e-12);
  });

  it('tells divergences to the sixth digit', async () => {
    const [target, trial] = [matrix(6, 5, 30), matrix(7, 5, 30)];
    const expected = await naiveBlas().meanKl(target, trial);
    expect(Math.abs((await blas.meanKl(target, trial)) / expected - 1)).toBeLessThan(1e-5);
    expect(Math.abs((await (await blas.klTarget(target)).meanKl(trial)) / expected - 1)).toBeLessThan(1e-5);
  });

  it('takes an uploaded array like any other, until it is disposed', async () => {
    const builder = new GraphBuilder('product');
    const [a, b] = [builder.input('a', 'F32', ['m', 2]), builder.input('b', 'F32', [2, 1])];
    builder.output('y', builder.matmul(a, b));
    const program = await engine.compile(builder.build());
    const weight = f32([2, 1], [5, 7]);
    const resident = await engine.upload?.(weight);
    for (const [scale, expected] of [
      [1, 31],
      [2, 62],
    ]) {
      const { y } = await program.run({ a: f32([1, 2], [2 * scale, 3 * scale]), b: resident ?? weight });
      expect(y.data[0]).toBe(expected);
    }
    await resident?.[Symbol.asyncDispose]();
  });

  it('refuses an operator it does not know by name', async () => {
    const builder = new GraphBuilder('odd');
    const x = builder.input('x', 'F32', ['n']);
    builder.output('y', builder.node1('Frobnicate', [x], x));
    const refused = engine.compile(builder.build());
    await expect(refused).rejects.toBeInstanceOf(UnsupportedError);
    await expect(refused).rejects.toThrow(/^[^\n]*Frobnicate[^\n]*$/);
  });

  it('shares a program by its key and refuses to run released ones', async () => {
    const builder = new GraphBuilder('negative');
    builder.output('y', builder.neg(builder.input('x', 'F32', ['n'])));
    const model = builder.build();
    const shared = await engine.compile(model, { key: 'negative' });
    expect(await engine.compile(model, { key: 'negative' })).toBe(shared);
    await shared[Symbol.asyncDispose]();
    expect((await shared.run({ x: f32([1], [3]) }))['y'].data[0]).toBe(-3);
    const own = await engine.compile(model);
    await own[Symbol.asyncDispose]();
    await expect(own.run({ x: f32([1], [3]) })).rejects.toThrow('graph "negative": the program was released');
    await expect(shared.run({})).rejects.toThrow('input "x" is missing');
  });
});
