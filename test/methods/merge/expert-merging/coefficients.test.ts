/** Coefficients, their derivatives and the published optimization, on the specification's model of one tensor (merging.md 6.8). */
import { describe, expect, it } from 'vitest';
import { AdamW } from '../../../../src/compute/optim/adam.ts';
import { clipByNorm, cosineWithRestarts } from '../../../../src/compute/optim/schedule.ts';
import { flatChunks } from '../../../../src/methods/merge/expert-merging/chunks.ts';
import {
  addScaled,
  Coefficients,
  chunkProducts,
  effectiveCoefficient,
} from '../../../../src/methods/merge/expert-merging/coefficients.ts';

const W0 = [1, 0, 0, 1, -1, 1];
const TAU = [Float32Array.of(0.5, 0, 0, -0.5, 0.25, 0), Float32Array.of(0, 0.5, -0.25, 0, 0, 0.5)];
const DATA = [
  [
    [1, 2],
    [-1, 1],
  ],
  [
    [2, 0],
    [1, -1],
  ],
];

const logits = (w: ArrayLike<number>, h: number[]) => [0, 1, 2].map((v) => w[2 * v] * h[0] + w[2 * v + 1] * h[1]);
const softmax = (z: number[]) => {
  const e = z.map(Math.exp);
  const sum = e.reduce((a, b) => a + b);
  return e.map((x) => x / sum);
};

/** Gradient of the cross-entropy with expert k on its data, at temperature T; mean over positions. */
function gradientOf(w: Float32Array, k: number, temperature = 1): Float32Array {
  const g = new Float32Array(6);
  const teacher = W0.map((value, i) => value + TAU[k][i]);
  for (const h of DATA[k]) {
    const q = softmax(logits(w, h).map((z) => z / temperature));
    const p = softmax(logits(teacher, h).map((z) => z / temperature));
    for (let v = 0; v < 3; v++) for (let j = 0; j < 2; j++) g[2 * v + j] += (temperature * (q[v] - p[v]) * h[j]) / DATA[k].length;
  }
  return g;
}

const PAPER = { parametrization: 'sigmoid', anchor: 0.1, range: [0, 1] } as const;
const whole = () => new Coefficients([{ name: 'w', bounds: [0, 6] }], 2, PAPER);

function merged(coefficients: Coefficients): Float32Array {
  const w = Float32Array.from(W0);
  for (const [k, tau] of TAU.entries()) addScaled(w, coefficients.tensors[0].bounds, coefficients.of(0, k), tau);
  return w;
}

const close = (actual: ArrayLike<number>, expected: readonly number[], digits = 6) => {
  for (const [i, value] of expected.entries()) expect(actual[i]).toBeCloseTo(value, digits);
};

describe('the gradient by coefficients', () => {
  const g = gradientOf(merged(whole()), 0);

  it('is the product of the gradient by weights with the task vectors, a chunk at a time', () => {
    close(g, [-0.088585, -0.168975, 0.111376, 0.273812, -0.02279, -0.104837]);
    const products = (m: number) => TAU.map((tau) => [...chunkProducts(flatChunks(6, m), g, tau)]);
    const [one, two, four] = [products(1), products(2), products(4)];
    close(one.flat(), [-0.186896, -0.16475]);
    close(two.flat(), [-0.044293, -0.142603, -0.112331, -0.052418]);
    close(four.flat(), [-0.044293, -0.136906, -0.005698, 0, -0.084487, -0.027844, -0.052418, 0]);
  });

  it('goes on to logits of coefficients, and takes a temperature', () => {
    const byAlpha = Float64Array.from(TAU.flatMap((tau) => [...chunkProducts([0, 6], g, tau)]));
    close(whole().toParameters(byAlpha), [-0.016821, -0.014827]);
    const soft = gradientOf(merged(whole()), 0, 2);
    close(
      TAU.map((tau) => chunkProducts([0, 6], soft, tau)[0]),
      [-0.185988, -0.163068],
    );
  });
});

it.each([
  [5, [0.154829, 0.154829, 0.112624, 0.112562, 0.077118, 0.077047], [0, 0.548295, 0.125934]],
  [0.8, [0.154829, 0.154829, 0.115571, 0.115066, 0.080514, 0.079926], undefined],
])('the published optimization, gamma %d', (gamma, path, regularizers) => {
  const coefficients = whole();
  const optimizer = new AdamW(2, { learningRate: 0.5, weightDecay: 1e-5 });
  const seen: number[] = [];
  const penalties: number[] = [];
  for (let update = 0; update < 3; update++) {
    const gradient = new Float64Array(2);
    for (let k = 0; k < 2; k++) {
      const g = gradientOf(merged(coefficients), k);
      for (let j = 0; j < 2; j++) gradient[j] += chunkProducts([0, 6], g, TAU[j])[0] / 2;
    }
    penalties.push(coefficients.regularize(gamma, gradient));
    coefficients.toParameters(gradient);
    clipByNorm(gradient, 1);
    optimizer.step(coefficients.parameters, gradient, cosineWithRestarts(update, 50, 0.1));
    seen.push(coefficients.of(0, 0)[0], coefficients.of(0, 1)[0]);
  }
  close(seen, path, 5);
  if (regularizers) close(penalties, regularizers, 4);
});

describe('coefficients', () => {
  it('start at the anchor, where the regularizer neither costs nor pulls', () => {
    for (const rules of [PAPER, { parametrization: 'linear', anchor: 0, range: [-1, 1.5] } as const]) {
      const own = new Coefficients([{ name: 'w', bounds: [0, 2, 6] }], 2, rules);
      close(own.of(0, 1), [rules.anchor, rules.anchor]);
      const gradient = new Float64Array(4);
      expect(own.regularize(3, gradient)).toBe(0);
      expect([...gradient]).toEqual([0, 0, 0, 0]);
    }
  });

  it('of a tensor without chunks keep the anchor and are not learned', () => {
    const own = new Coefficients(
      [
        { name: 'w', bounds: [0] },
        { name: 'v', bounds: [0, 4] },
      ],
      2,
      PAPER,
    );
    expect(own.parameters).toHaveLength(2);
    expect(own.of(0, 1)).toEqual([0.1]);
    expect(own.chunkCount).toBe(1);
  });

  it('that leave their range are put back, and counted', () => {
    const own = new Coefficients([{ name: 'w', bounds: [0, 6] }], 2, { parametrization: 'linear', anchor: 0, range: [-1, 1.5] });
    own.parameters.set([-3, 0.5]);
    expect(own.clamp()).toBe(1);
    expect([...own.parameters]).toEqual([-1, 0.5]);
  });

  it('one-hot at 1 reproduce an expert, all at 0 the start', () => {
    const own = new Coefficients([{ name: 'w', bounds: [0, 3, 6] }], 2, {
      parametrization: 'linear',
      anchor: 0,
      range: [-1, 1.5],
    });
    close(merged(own), W0);
    own.set(0, 1, [1, 1]);
    close(
      merged(own),
      W0.map((value, i) => value + TAU[1][i]),
    );
  });
});

it('an effective coefficient is the part of an expert in an update; 0 for an expert that changed nothing', () => {
  const p1 = Float32Array.of(4, 0, 2, 0, 2, 2, 1, 1, -1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, -1);
  const p2 = Float32Array.of(3, 1, 2, 0, 1, -2, 0, -1, 1, 0, 0, 1, -1, 0, 1, 1, 0, 0, 0, 1);
  const update = p1.map((value, i) => 0.4 * value + 0.1 * p2[i]);
  expect(effectiveCoefficient(update, p1)).toBeCloseTo(0.430556, 6);
  expect(effectiveCoefficient(update, p2)).toBeCloseTo(0.269231, 6);
  expect(effectiveCoefficient(update, new Float32Array(20))).toBe(0);
});
