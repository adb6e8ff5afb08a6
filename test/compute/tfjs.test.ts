import * as tf from '@tensorflow/tfjs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { DType } from '../../formats/tensor.ts';
import type { Matrix } from '../../src/compute/blas.ts';
import type { Engine, NdArray } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { PlainEngine } from '../../src/compute/plain.ts';
import { importTfjs } from '../../src/compute/tfjs/runtime.ts';
import { createTfjsEngine } from '../../src/compute/tfjs.ts';
import { EnvironmentError, RecipeError, UnsupportedError } from '../../src/errors.ts';
import { GraphBuilder, type Value } from '../../src/graph/builder.ts';
import { naiveBlas, upperOf } from '../support/naive-blas.ts';
import { randomSource, randomValues } from '../support/random.ts';
import { f32, i64 } from '../support/run-graph.ts';

let engine: Engine;
beforeAll(async () => {
  engine = await createTfjsEngine({ tf, threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

function matrix(seed: number, rows: number, columns: number): Matrix {
  return { rows, columns, data: randomValues(randomSource(seed), rows * columns) };
}

/** A graph of one output, made of `x` of that type. */
function graphOf(dtype: DType, make: (builder: GraphBuilder, x: Value) => Value) {
  const builder = new GraphBuilder('small');
  builder.output('y', make(builder, builder.input('x', dtype, ['rows', 2])));
  return builder.build();
}

describe('tfjs as an engine', () => {
  it('tells what it runs on', () => {
    expect(engine).toMatchObject({ name: 'tfjs', device: 'cpu', threads: 1, runtime: `tfjs ${tf.version.tfjs}` });
  });

  it('without the package tells in one line what to install', async () => {
    const missing = Object.assign(new Error("Cannot find package '@tensorflow/tfjs-node-gpu'\nRequire stack"), {});
    const result = await importTfjs(() => Promise.reject(missing)).catch((error: unknown) => error);
    expect(result).toBeInstanceOf(EnvironmentError);
    expect(result).toMatchObject({
      code: 'TFJS_MISSING',
      message: expect.stringMatching(/^[^\n]+Install it: npm install @tensorflow\/tfjs-node-gpu$/),
    });
  });

  it('takes what a CommonJS package exports by default', async () => {
    expect(await importTfjs(async () => ({ default: tf }) as unknown as typeof tf)).toBe(tf);
  });

  it('refuses devices that tfjs does not have, and cuda where it finds no GPU', async () => {
    await expect(createTfjsEngine({ tf, device: 'webgpu' })).rejects.toBeInstanceOf(RecipeError);
    await expect(createTfjsEngine({ tf, device: 'cuda' })).rejects.toMatchObject({ code: 'DEVICE_UNAVAILABLE' });
    const notes: string[] = [];
    const onNote = (note: string) => notes.push(note);
    await using fallen = await createTfjsEngine({ tf, device: 'cuda', allowFallback: true, onNote });
    expect(fallen.device).toBe('cpu');
    expect(notes).toEqual([expect.stringContaining('Running on cpu instead.')]);
    await using automatic = await createTfjsEngine({ tf, device: 'auto' });
    expect(automatic.device).toBe('cpu');
  });

  it('refuses graphs in fp64 by name and has a companion for them', async () => {
    const compiled = engine.compile(graphOf('F64', (builder, x) => builder.add(x, x)));
    await expect(compiled).rejects.toThrow('graph "small": "x" is F64: tfjs has F32 I32 I64 BOOL');
    await expect(engine.doublePrecision?.()).resolves.toMatchObject({ name: 'ort', device: 'cpu' });
  });

  it('refuses 64-bit integers beyond 32 bits', async () => {
    const program = await engine.compile(graphOf('I64', (builder, x) => builder.add(x, x)));
    const { y } = await program.run({ x: i64([1, 2], [3, -4]) });
    expect(y).toMatchObject({ dtype: 'I64', data: BigInt64Array.of(6n, -8n) });
    const refused = program.run({ x: i64([1, 2], [3, 2 ** 31]) });
    await expect(refused).rejects.toBeInstanceOf(UnsupportedError);
    await expect(refused).rejects.toThrow('graph "small": input "x" holds 2147483648: the integers of tfjs have 32 bits');
  });

  it('refuses what an operator has but the interpreter does not: a cache, an axis in the middle', async () => {
    const softmax = await engine.compile(graphOf('F32', (builder, x) => builder.softmax(x, 0)));
    await expect(softmax.run({ x: f32([1, 2], [1, 2]) })).rejects.toThrow(
      'the tfjs engine has no axis 0 other than the last one',
    );
    const builder = new GraphBuilder('cached');
    const q = builder.input('q', 'F32', [1, 1, 8]);
    const cache = builder.input('cache', 'F32', [1, 1, 'past', 8]);
    const lastIndex = builder.constant('I32', [0], [1]);
    const options = { headCount: 1, kvHeadCount: 1, lastIndex, totalLength: builder.scalar('I32', 1), totalName: 'total' };
    builder.output('y', builder.groupQueryAttention(q, q, q, { ...options, past: { key: cache, value: cache } }).output);
    const program = await engine.compile(builder.build());
    const zeros = new Float32Array(8);
    await expect(program.run({ q: f32([1, 1, 8], zeros), cache: f32([1, 1, 1, 8], zeros) })).rejects.toBeInstanceOf(
      UnsupportedError,
    );
  });

  it('frees every tensor of a run, also of one that fails, and of a released program and a disposed array', async () => {
    const before = tf.memory().numTensors;
    const program = await engine.compile(
      graphOf('F32', (builder, x) => builder.gelu(builder.mul(builder.softmax(x), builder.scalar('F32', 3)))),
    );
    const compiled = tf.memory().numTensors;
    expect(compiled).toBe(before + 1);
    const resident = await engine.upload!(f32([1, 2], [1, 2]));
    await program.run({ x: resident });
    await program.run({ x: f32([1, 2], [1, 2]) });
    await expect(program.run({ x: f32([3, 2], [1, 2]) })).rejects.toThrow('input "x" has shape (3, 2), 6 elements, but holds 2');
    expect(tf.memory().numTensors).toBe(compiled + 1);
    await resident[Symbol.asyncDispose]();
    await program[Symbol.asyncDispose]();
    expect(tf.memory().numTensors).toBe(before);
  });
});

/** What tfjs hands fp64 to where onnxruntime is not installed. */
describe('plain loops as an engine', () => {
  const plain = new PlainEngine();
  const blas = createBlas(plain);

  it.each([
    [false, false, 1, 0],
    [true, false, -1, 1],
    [false, true, 0.3, 0],
    [true, true, 2, 0.5],
  ])('multiply: transposed %s and %s, alpha %d, beta %d', async (transposeA, transposeB, alpha, beta) => {
    const [a, b] = [transposeA ? matrix(1, 7, 5) : matrix(1, 5, 7), transposeB ? matrix(2, 3, 7) : matrix(2, 7, 3)];
    const options = { transposeA, transposeB, alpha, beta };
    const [own, expected] = [blas, naiveBlas()].map((each) => each.gemm(a, b, { ...options, out: matrix(3, 5, 3) }));
    const [left, right] = [(await own).data, (await expected).data];
    left.forEach((value, i) => {
      expect(value).toBeCloseTo(right[i], 6);
    });
  });

  it('factor a Hessian, sum x x^T and tell divergences as onnxruntime does', async () => {
    await using ort = await createEngine({ threads: 1 });
    const other = createBlas(ort);
    const hessians = await Promise.all(
      [blas, other].map(async (each) => {
        const gram = each.gram(30);
        await gram.add(matrix(4, 90, 30));
        return gram.finish();
      }),
    );
    hessians[0].forEach((value, i) => {
      expect(value).toBeCloseTo(hessians[1][i], 6);
    });
    const [own, expected] = [await upperOf(blas, hessians[1], 30), await upperOf(other, hessians[1], 30)];
    own.forEach((value, i) => {
      expect(value).toBeCloseTo(expected[i], 11);
    });
    const [target, trial] = [matrix(6, 5, 30), matrix(7, 5, 30)];
    const kl = await naiveBlas().meanKl(target, trial);
    expect(await blas.meanKl(target, trial)).toBeCloseTo(kl, 7);
    expect(await (await blas.klTarget(target)).meanKl(trial)).toBeCloseTo(kl, 7);
  });

  it('run nothing else', async () => {
    const tanh = plain.compile(graphOf('F32', (builder, x) => builder.tanh(x)));
    await expect(tanh).rejects.toThrow('graph "small": plain loops have no operator Tanh');
    await expect(plain.open('a.onnx')).rejects.toBeInstanceOf(UnsupportedError);
    const sum = await plain.compile(graphOf('F64', (builder, x) => builder.add(x, x)));
    const x: NdArray = { dtype: 'F64', shape: [1, 2], data: Float64Array.of(1, 1e-17) };
    expect((await sum.run({ x }))['y'].data).toEqual(Float64Array.of(2, 2e-17));
    await expect(sum.run({})).rejects.toThrow('input "x" is missing');
  });
});
