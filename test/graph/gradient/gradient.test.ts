/** Every derivative, against central differences in float64 and the specification's vectors (gradients.md, sections 2 to 4 and 10). */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Engine } from '../../../src/compute/engine.ts';
import { createEngine } from '../../../src/compute/ort.ts';
import { GraphBuilder } from '../../../src/graph/builder.ts';
import { gradient } from '../../../src/graph/gradient/gradient.ts';
import { clip, roundStraight, stop } from '../../../src/graph/gradient/straight-through.ts';
import { type Build, differentiate, type Inputs, numbers, random, worstError } from './support.ts';

/** gradients.md 10.1; seen: 6.2e-11. */
const F64_TOLERANCE = 1e-8;

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

const ab = (a: readonly number[], b: readonly number[]) => ({ a: random(a, 1), b: random(b, 2) });
const positive = (shape: readonly number[], seed = 0) => {
  const { values } = random(shape, seed);
  return { shape, values: values.map((value) => Math.abs(value) + 0.2) };
};
const norm = (features: number) => ({ x: random([3, 2, features], 1), w: random([features], 2), b: random([features], 3) });

const CASES: readonly (readonly [string, Inputs, Build])[] = [
  ['add, one row stretched', ab([3, 4], [4]), (g, { a, b }) => g.add(a, b)],
  ['add, both stretched', ab([3, 1], [1, 4]), (g, { a, b }) => g.add(a, b)],
  ['sub', ab([2, 1, 3], [4, 1]), (g, { a, b }) => g.sub(a, b)],
  ['mul', ab([2, 3, 4], [3, 1]), (g, { a, b }) => g.mul(a, b)],
  ['div', { a: random([3, 4], 1), b: positive([3, 1], 2) }, (g, { a, b }) => g.div(a, b)],
  ['max', ab([3, 4], [3, 4]), (g, { a, b }) => g.max(a, b)],
  ['min', ab([3, 4], [4]), (g, { a, b }) => g.min(a, b)],
  ['where', ab([3, 4], [4]), (g, { a, b }) => g.where(g.less(a, b), g.mul(a, b), b)],
  ['neg, exp', { x: random([5]) }, (g, { x }) => g.exp(g.neg(x))],
  ['log', { x: positive([5]) }, (g, { x }) => g.log(x)],
  ['sqrt', { x: positive([5]) }, (g, { x }) => g.sqrt(x)],
  ['abs', { x: random([5]) }, (g, { x }) => g.abs(x)],
  ['tanh', { x: random([5]) }, (g, { x }) => g.tanh(x)],
  ['sigmoid', { x: random([5]) }, (g, { x }) => g.sigmoid(x)],
  ['silu', { x: random([5]) }, (g, { x }) => g.silu(x)],
  ['relu', { x: random([5]) }, (g, { x }) => g.relu(x)],
  ['gelu by tanh', { x: random([5]) }, (g, { x }) => g.gelu(x, 'tanh')],
  ['softmax', { x: random([2, 3, 4]) }, (g, { x }) => g.softmax(x)],
  ['softmax over another axis', { x: random([2, 3, 4]) }, (g, { x }) => g.softmax(x, 1)],
  ['sum of one axis, dropped', { x: random([2, 3, 4]) }, (g, { x }) => g.reduceSum(x, [1], false)],
  ['mean of two axes', { x: random([2, 3, 4]) }, (g, { x }) => g.reduceMean(x, [0, 2])],
  ['matmul of matrices', ab([3, 4], [4, 2]), (g, { a, b }) => g.matmul(a, b)],
  ['matmul, inner size 1', ab([3, 1], [1, 2]), (g, { a, b }) => g.matmul(a, b)],
  ['matmul, many rows times a matrix', ab([2, 3, 4], [4, 5]), (g, { a, b }) => g.matmul(a, b)],
  ['matmul, batches', ab([2, 3, 4, 5], [2, 3, 5, 2]), (g, { a, b }) => g.matmul(a, b)],
  ['matmul, a batch stretched', ab([2, 3, 4, 5], [2, 1, 5, 2]), (g, { a, b }) => g.matmul(a, b)],
  ['matmul by a turned weight', ab([2, 3, 4], [5, 4]), (g, { a, b }) => g.matmul(a, g.transpose(b, [1, 0]))],
  ...[false, true].flatMap((transposeA) =>
    [false, true].map(
      (transposeB) =>
        [
          `gemm, turned ${transposeA} ${transposeB}`,
          { a: random(transposeA ? [4, 3] : [3, 4], 1), b: random(transposeB ? [2, 4] : [4, 2], 2), c: random([2], 3) },
          (g, { a, b, c }) => g.gemm(a, b, c, { transposeA, transposeB, alpha: 0.5, beta: 1.5 }),
        ] as [string, Inputs, Build],
    ),
  ),
  ['reshape', { x: random([2, 6]) }, (g, { x }) => g.mul(g.reshape(x, [3, 4]), g.reshape(x, [3, 4]))],
  ['transpose', { x: random([2, 3, 4]) }, (g, { x }) => g.transpose(x, [2, 0, 1])],
  ['split, a part unused', { x: random([2, 6]) }, (g, { x }) => g.split(x, [1, 3, 2], 1)[1]],
  ['concat', ab([2, 3], [2, 1]), (g, { a, b }) => g.concat([a, b, a], 1)],
  [
    'unsqueeze, expand, squeeze',
    { x: random([3]) },
    (g, { x }) => g.squeeze(g.expand(g.unsqueeze(x, [0, 2]), g.vector([1, 3, 4]), [1, 3, 4]), [0]),
  ],
  ['slice', { x: random([5, 3]) }, (g, { x }) => g.slice(x, g.vector([1]), g.vector([4]), 0, 3)],
  ['gather, a row twice', { x: random([4, 3]) }, (g, { x }) => g.gather(x, g.constant('I64', [2, 0, 2], [3]))],
  ['the largest of a row', { x: random([3, 5]) }, (g, { x }) => g.topK(x, 2).values],
  [
    'values put in places',
    { x: random([2, 4], 1), u: random([2, 2], 2) },
    (g, { x, u }) => g.mul(x, g.scatterElements(x, g.constant('I64', [3, 0, 1, 2], [2, 2]), u)),
  ],
  [
    'a softmax of the two largest, in their places',
    { x: random([3, 4], 3) },
    (g, { x }) => {
      const { values, indices } = g.topK(x, 2);
      return g.scatterElements(g.constant('F64', new Array<number>(12).fill(0), [3, 4]), indices, g.softmax(values));
    },
  ],
  ['rms norm', norm(5), (g, { x, w }) => g.simplifiedLayerNorm(x, w, 1e-5)],
  ['layer norm', norm(5), (g, { x, w, b }) => g.layerNorm(x, w, b, 1e-5)],
  ['a value used twice', { x: random([4]) }, (g, { x }) => g.add(g.mul(x, x), g.exp(x))],
  [
    'derivative of a derivative',
    { x: random([4]) },
    (g, { x }) => gradient(g, [g.tanh(g.mul(x, x))], [g.constant('F64', [1, 1, 1, 1], [4])], [x])[0],
  ],
];

describe('central differences agree with the derivative of', () => {
  it.each(CASES)('%s', async (_name, inputs, build) => {
    expect(await worstError(engine, build, inputs)).toBeLessThan(F64_TOLERANCE);
  });
});

const row = (values: readonly number[]) => ({ shape: [values.length], values });
const close = (actual: readonly number[], expected: readonly number[], digits = 8) => {
  expect(actual).toHaveLength(expected.length);
  for (const [i, value] of expected.entries()) expect(actual[i]).toBeCloseTo(value, digits);
};

describe('the specification’s vectors', () => {
  it('softmax', async () => {
    const { y, gradients } = await differentiate(engine, (g, { z }) => g.softmax(z), { z: row([1, 2, 3]) }, [1, 0, -1]);
    close(y, [0.090030573, 0.244728471, 0.665240956]);
    close(gradients['z'], [0.141817094, 0.140770357, -0.282587451]);
  });

  it('rms norm and layer norm', async () => {
    const inputs = { x: { shape: [1, 4], values: [1, -2, 3, 0.5] }, w: row([1, 0.5, 2, 1]) };
    const g = [0.1, 0.2, -0.3, 0.4];
    const own = await differentiate(engine, (b, { x, w }) => b.simplifiedLayerNorm(x, w, 1e-5), inputs, g);
    close(own.gradients['x'], [0.116186708, -0.073429757, -0.128270854, 0.243527624]);
    close(own.gradients['w'], [0.05298122, -0.21192488, -0.476830979, 0.10596244]);
    const layer = await differentiate(
      engine,
      (b, { x, w }) => b.layerNorm(x, w, b.constant('F64', [0, 0, 0, 0], [4]), 1e-5),
      inputs,
      g,
    );
    close(layer.gradients['x'], [0.084361565, -0.141339722, -0.158213239, 0.215191396]);
  });

  it.each([
    ['silu', [0.072329488, 0.739961187, 1.090784249], (g: GraphBuilder, x: Parameters<GraphBuilder['silu']>[0]) => g.silu(x)],
    [
      'gelu by tanh',
      [-0.082964084, 0.867369904, 1.086099257],
      (g: GraphBuilder, x: Parameters<GraphBuilder['silu']>[0]) => g.gelu(x, 'tanh'),
    ],
  ])('%s', async (_name, expected, activate) => {
    const { gradients } = await differentiate(engine, (g, { x }) => activate(g, x), { x: row([-1, 0.5, 2]) }, [1, 1, 1]);
    close(gradients['x'], expected);
  });

  it('gelu by erf, which runs in float32 only', async () => {
    const inputs = { x: row([-1, 0.5, 2]) };
    const { gradients } = await differentiate(engine, (g, { x }) => g.gelu(x), inputs, [1, 1, 1], 'F32');
    close(gradients['x'], [-0.083315471, 0.867495125, 1.085231801], 6);
  });

  it('fake quantization with learned bounds', async () => {
    const inputs = {
      w: { shape: [1, 5], values: [-1, -0.4, 0.1, 0.5, 1.2] },
      high: { shape: [1, 1], values: [0.9] },
      low: { shape: [1, 1], values: [-0.6] },
    };
    const quantize: Build = (g, { w, high, low }) => {
      const levels = g.scalar('F64', 3);
      const scale = g.div(g.sub(high, low), levels);
      const zero = roundStraight(g, g.div(g.neg(low), scale));
      const code = clip(g, g.add(roundStraight(g, g.div(w, scale)), zero), g.scalar('F64', 0), levels);
      return g.mul(g.sub(code, zero), scale);
    };
    const { y, gradients } = await differentiate(engine, quantize, inputs, [1, 2, -1, 0.5, -2]);
    close(y, [-0.5, -0.5, 0, 0.5, 1]);
    close(gradients['w'], [0, 2, -1, 0.5, -2]);
    close(gradients['high'], [0.266667], 6);
    close(gradients['low'], [0.733333], 6);
  });
});

it('the sum and its rms norm in one node have the derivatives of the two', async () => {
  const inputs = { x: random([2, 5], 1), s: random([2, 5], 4), w: random([5], 2) };
  const cotangent = numbers(10, 9);
  const one = await differentiate(
    engine,
    (g, { x, s, w }) => {
      const { normed, sum } = g.skipSimplifiedLayerNorm(x, s, w, 1e-5);
      return g.mul(normed, sum);
    },
    inputs,
    cotangent,
    'F32',
  );
  const two = await differentiate(
    engine,
    (g, { x, s, w }) => g.mul(g.simplifiedLayerNorm(g.add(x, s), w, 1e-5), g.add(x, s)),
    inputs,
    cotangent,
  );
  for (const name of ['x', 's', 'w']) close(one.gradients[name], two.gradients[name], 4);
});

describe('what is not differentiated', () => {
  it('a value behind stop gets nothing, and one that nothing depends on gets zeros', async () => {
    const inputs = { x: row([1, 2]), unused: row([3]) };
    const { gradients } = await differentiate(engine, (g, { x }) => g.mul(x, stop(g, x)), inputs, [1, 1]);
    expect(gradients).toEqual({ x: [1, 2], unused: [0] });
  });

  it('a bound counts as inside; the first of two equal operands takes it all', async () => {
    const inputs = { x: row([0, 1, 2]) };
    const bounded = await differentiate(
      engine,
      (g, { x }) => clip(g, x, g.scalar('F64', 0), g.scalar('F64', 1)),
      inputs,
      [1, 1, 1],
    );
    expect(bounded.gradients['x']).toEqual([1, 1, 0]);
    const tied = await differentiate(engine, (g, { a, b }) => g.max(a, b), { a: row([1]), b: row([1]) }, [1]);
    expect(tied.gradients).toEqual({ a: [1], b: [0] });
  });

  it('refuses roundings and casts to integers on the way, by the name of the node', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', [2]);
    const rounded = builder.scope('here', () => builder.round(x));
    expect(() => gradient(builder, [rounded], [x], [x])).toThrow('/here/Round: Round has no derivative');
    const cast = builder.cast(builder.cast(x, 'I32'), 'F32');
    expect(() => gradient(builder, [cast], [x], [x])).toThrow(/Cast.*from I32 to F32 has no derivative/);
  });

  it('refuses open dimensions and cotangents of another shape', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', ['n', 2]);
    const y = builder.mul(x, builder.constant('F32', [1, 2], [2]));
    expect(() => gradient(builder, [y], [builder.input('g', 'F32', [3, 2])], [x])).toThrow(
      /the cotangent of .* is F32 \[3, 2\], not F32 \[n, 2\]/,
    );
    expect(() => gradient(builder, [y], [builder.input('h', 'F32', ['n', 2])], [x])).toThrow(/open dimension "n"/);
  });

  it('leaves frozen weights alone: no product is made for them', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', [3, 2]);
    const w = builder.input('w', 'F32', [2, 2]);
    const y = builder.matmul(x, w);
    gradient(builder, [y], [builder.input('g', 'F32', [3, 2])], [x]);
    expect(builder.nodes.filter(({ op }) => op === 'MatMul' || op === 'Gemm')).toHaveLength(2);
  });
});
