/** Optimizers and schedules against the specification's vectors (gradients.md, section 7; merging.md 6.8). */
import { describe, expect, it } from 'vitest';
import { AdamW } from '../../../src/compute/optim/adam.ts';
import { clipByNorm, cosine, cosineWithRestarts } from '../../../src/compute/optim/schedule.ts';

const close = (actual: readonly number[], expected: readonly number[], digits: number) => {
  for (const [i, value] of expected.entries()) expect(actual[i]).toBeCloseTo(value, digits);
};

describe('AdamW', () => {
  it('moves as specified, decay apart from the gradient', () => {
    const optimizer = new AdamW(1, { learningRate: 0.01, weightDecay: 0.1 });
    const w = Float32Array.of(1);
    const path = [0.1, 0.2, -0.3].map((g) => {
      optimizer.step(w, Float64Array.of(g));
      return w[0];
    });
    close(path, [0.989000001, 0.978359181, 0.978046812], 6);
  });

  it('goes on from its state as if it had not stopped', () => {
    const gradients = Array.from({ length: 6 }, (_, t) => Float64Array.of(Math.sin(t), Math.cos(t)));
    const whole = new AdamW(2, { learningRate: 0.1 });
    const w = Float32Array.of(1, -1);
    for (const g of gradients) whole.step(w, g);
    const first = new AdamW(2, { learningRate: 0.1 });
    const v = Float32Array.of(1, -1);
    for (const g of gradients.slice(0, 3)) first.step(v, g);
    const second = new AdamW(2, { learningRate: 0.1 });
    second.restore(JSON.parse(JSON.stringify(first.state)));
    for (const g of gradients.slice(3)) second.step(v, g);
    expect(v).toEqual(w);
  });
});

describe('a schedule', () => {
  it('along a cosine', () => {
    const factors = Array.from({ length: 6 }, (_, t) => cosine(t, 5, { floor: 0.1 }));
    close(factors, [1, 0.914057647, 0.689057647, 0.410942353, 0.185942353, 0.1], 8);
    expect(cosine(0, 10, { warmUp: 4 })).toBeCloseTo(0.2);
    expect(cosine(4, 10, { warmUp: 4 })).toBe(1);
  });

  it('with restarts, each period twice the last', () => {
    const factors = Array.from({ length: 10 }, (_, t) => cosineWithRestarts(t, 3, 0.1));
    close(factors, [1, 0.775, 0.325, 1, 0.939711, 0.775, 0.55, 0.325, 0.160289, 1], 6);
    close(
      [0, 1, 2].map((t) => 0.5 * cosineWithRestarts(t, 50, 0.1)),
      [0.5, 0.499556, 0.498226],
      6,
    );
  });
});

it('a gradient that is too long is cut to length', () => {
  const g = Float64Array.of(3, 4, 12);
  expect(clipByNorm(g, 1)).toBe(13);
  close([...g], [0.230769213, 0.307692284, 0.923076852], 9);
});
