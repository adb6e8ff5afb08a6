/** Experts beside a linear layer: what they compute, against loops; their derivatives, against differences; how evenly they are picked, against the specification. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Engine } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { balanceLoss, type RoutedShape, routedBranch, routedParameters, routedSizes } from '../../src/graph/routed-branch.ts';
import { type Build, differentiate, type Inputs, numbers, random, worstError } from './gradient/support.ts';

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

const [BATCH, SEQUENCE, N, M] = [2, 3, 5, 4];
const topk = { routing: 'topk', experts: 4, topK: 2, rank: 2, sharedA: false, sharedExpert: false } as const;
const soft = { ...topk, routing: 'soft', topK: 4, experts: 3 } as const;
const SHAPES: readonly (readonly [string, RoutedShape])[] = [
  ['the two largest of four', topk],
  ['two of two', { ...topk, experts: 2 }],
  ['one of one', { ...topk, experts: 1 }],
  ['all, each with an A of its own', soft],
  ['all, on one A', { ...soft, sharedA: true }],
  ['all, on one A, and one for every token', { ...soft, sharedA: true, sharedExpert: true }],
];

const inputsOf = (shape: RoutedShape): Inputs => {
  const sizes = routedSizes(shape, { inFeatures: N, outFeatures: M });
  return {
    x: random([BATCH, SEQUENCE, N], 1),
    router: random(sizes.router, 2),
    expertsA: random(sizes.expertsA, 3),
    expertsB: random(sizes.expertsB, 4),
  };
};
const build =
  (shape: RoutedShape): Build =>
  (g, { x, router, expertsA, expertsB }) =>
    routedBranch(g, x, shape, { router, expertsA, expertsB }).output;

/** The definition, token by token and expert by expert. */
function defined({ routing, experts, topK, rank, sharedA, sharedExpert }: RoutedShape, inputs: Inputs): number[] {
  const [x, q, a, b] = ['x', 'router', 'expertsA', 'expertsB'].map((name) => inputs[name].values);
  const width = (experts + (sharedExpert ? 1 : 0)) * rank;
  const out: number[] = [];
  for (let t = 0; t < BATCH * SEQUENCE; t++) {
    const dot = (row: readonly number[], at: number) => row.slice(at, at + N).reduce((s, v, i) => s + v * x[t * N + i], 0);
    const logits = Array.from({ length: experts }, (_, j) => dot(q, j * N));
    const order = logits.map((_, j) => j).sort((i, j) => logits[j] - logits[i] || i - j);
    const chosen = routing === 'soft' ? order : order.slice(0, topK);
    const total = chosen.reduce((sum, j) => sum + Math.exp(logits[j]), 0);
    const y = new Array<number>(M).fill(0);
    const add = (j: number, weight: number, from: number) => {
      for (let k = 0; k < rank; k++) {
        const u = dot(a, (from + k) * N);
        for (let i = 0; i < M; i++) y[i] += weight * b[i * width + j * rank + k] * u;
      }
    };
    for (const j of chosen) add(j, Math.exp(logits[j]) / total, sharedA ? 0 : j * rank);
    if (sharedExpert) add(experts, 1, 0);
    out.push(...y);
  }
  return out;
}

describe.each(SHAPES)('experts, %s', (_, shape) => {
  it('add to a token what the router gives each of them', async () => {
    const inputs = inputsOf(shape);
    const { y } = await differentiate(engine, build(shape), inputs, undefined);
    const expected = defined(shape, inputs);
    for (const [i, value] of expected.entries()) expect(y[i]).toBeCloseTo(value, 10);
  });

  it('have the derivatives that differences give, the router too', async () => {
    expect(await worstError(engine, build(shape), inputsOf(shape))).toBeLessThan(1e-7);
  });
});

describe('how evenly experts are picked', () => {
  const loss =
    (routers: number, counts: readonly number[]): Build =>
    (g, values) => {
      const found = Array.from({ length: routers }, (_, i) => {
        const logits = values[`z${i}`];
        const { values: top, indices } = g.topK(logits, 2);
        const fill = (value: number, like: typeof logits) => g.expand(g.scalar('F64', value), g.shapeOf(like), like.shape);
        return { output: logits, logits, gate: logits, picks: g.scatterElements(fill(0, logits), indices, fill(1, top)) };
      });
      return balanceLoss(g, found, g.constant('F64', counts, [1, counts.length, 1]));
    };
  const LOGITS = [1, 0, -1, 2, 0, 0, 0, 0, 2, 1, 0, -1];

  it('is what the specification has for three tokens, with its gradient', async () => {
    const inputs = { z0: { shape: [1, 3, 4], values: LOGITS } };
    const { y, gradients } = await differentiate(engine, loss(1, [1, 1, 1]), inputs, [1]);
    expect(y[0]).toBeCloseTo(1.21476, 5);
    const expected = [0.077442, 0.009124, -0.010892, -0.075674];
    for (const [i, value] of expected.entries()) expect(gradients['z0'][i]).toBeCloseTo(value, 6);
  });

  it('leaves pads out, and takes the routers of a block together', async () => {
    const padded = { z0: { shape: [1, 4, 4], values: [...LOGITS, 9, -9, 9, -9] } };
    const { y, gradients } = await differentiate(engine, loss(1, [1, 1, 1, 0]), padded, [1]);
    expect(y[0]).toBeCloseTo(1.21476, 5);
    expect(gradients['z0'].slice(12)).toEqual([0, 0, 0, 0]);
    const twice = { z0: { shape: [1, 3, 4], values: LOGITS }, z1: { shape: [1, 3, 4], values: LOGITS } };
    expect((await differentiate(engine, loss(2, [1, 1, 1]), twice, [1])).y[0]).toBeCloseTo(1.21476, 5);
    const apart = { ...twice, z1: { shape: [1, 3, 4], values: numbers(12, 7) } };
    const both = await differentiate(engine, loss(2, [1, 1, 1]), apart, [1]);
    const joined = { z0: { shape: [1, 6, 4], values: [...LOGITS, ...numbers(12, 7)] } };
    expect(both.y[0]).toBeCloseTo((await differentiate(engine, loss(1, [1, 1, 1, 1, 1, 1]), joined, [1])).y[0], 10);
  });
});

it('numbers of a branch are those of the published model', () => {
  // LLaMA-2-7B, rank 8, profile 2468: 160 experts of every layer kind.
  const layers = [
    ...new Array<[number, number]>(4).fill([4096, 4096]),
    ...new Array<[number, number]>(2).fill([4096, 11008]),
    [11008, 4096],
  ];
  const of = (experts: number) =>
    layers.reduce((sum, [inFeatures, outFeatures]) => {
      const shape = { ...topk, experts, rank: 8 };
      return sum + routedParameters(shape, { inFeatures, outFeatures });
    }, 0);
  expect([2, 4, 6, 8].reduce((sum, experts) => sum + 8 * of(experts), 0)).toBe(105_635_840);
  expect(32 * of(8)).toBe(169_017_344);
});
