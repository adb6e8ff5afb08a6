/** The search for the smallest size within a tolerated loss, on models whose every size could be measured. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { MAX_ROUNDS, type Measured, searchStep } from '../../../src/runs/quantize/loss-search.ts';
import { randomSource } from '../../support/random.ts';

/** 1 to 8 bits a weight of a thousand weights; four times less loss a bit. */
const CURVE = Array.from({ length: 141 }, (_, i) => ({ size: 1000 + 50 * i, loss: 4 ** -((50 * i) / 1000) }));
const [LEAST, MOST] = [1000, 8000];

/** Searches a model that really rises so much; the sizes it measured, and the one it kept. */
function search(riseAt: (size: number) => number, tolerance: number): { rounds: Measured[]; kept: Measured | undefined } {
  const rounds: Measured[] = [];
  for (;;) {
    const step = searchStep(CURVE, tolerance, rounds);
    if (!('size' in step)) return { rounds, kept: step.kept === undefined ? undefined : rounds[step.kept] };
    expect(step.size).toBeGreaterThanOrEqual(LEAST);
    expect(step.size).toBeLessThanOrEqual(MOST);
    rounds.push({ size: step.size, rise: riseAt(step.size) });
    expect(rounds.length).toBeLessThanOrEqual(MAX_ROUNDS);
  }
}

/** A rise of `scale` at one bit that falls `base` times with every bit. */
const geometric = (scale: number, base: number) => (size: number) => scale * base ** -((size - LEAST) / 1000);

describe('a rise that falls with the size', () => {
  it.each([
    ['as predicted', 1, 4],
    ['from ten times as much', 10, 4],
    ['from a tenth', 0.1, 4],
    ['faster than predicted', 5, 6],
    ['slower than predicted', 2, 2.5],
  ])('%s is met within a twentieth of a bit of the smallest size', (_, scale, base) => {
    for (const tolerance of [0.01, 0.03, 0.05, 0.0953]) {
      const { kept, rounds } = search(geometric(scale, base), tolerance);
      const best = Math.max(LEAST, LEAST + (1000 * Math.log(scale / tolerance)) / Math.log(base));
      expect(kept!.rise).toBeLessThanOrEqual(tolerance);
      expect(kept!.size - best, `${tolerance}: ${rounds.map(({ size }) => size)}`).toBeLessThan(100);
    }
  });

  it('is always met when any size meets it, whatever its shape', () => {
    const shapes = fc.record({
      scale: fc.double({ min: 1e-4, max: 1e4, noNaN: true }),
      base: fc.double({ min: 1.2, max: 30, noNaN: true }),
      floor: fc.double({ min: 0, max: 0.2, noNaN: true }),
      tolerance: fc.double({ min: 0.001, max: 0.7, noNaN: true }),
    });
    fc.assert(
      fc.property(shapes, ({ scale, base, floor, tolerance }) => {
        const rise = (size: number) => floor + geometric(scale, base)(size);
        const { kept } = search(rise, tolerance);
        if (rise(MOST) > tolerance) expect(kept).toBeUndefined();
        else expect(kept!.rise).toBeLessThanOrEqual(tolerance);
      }),
    );
  });
});

it('noise neither breaks the promise nor the number of rounds: the smallest measured size that met it is kept', () => {
  const random = randomSource(5);
  for (let trial = 0; trial < 300; trial++) {
    const noisy = (size: number) => geometric(3, 4)(size) * 2 ** (2 * random() - 1) - 0.002 * random();
    const { rounds, kept } = search(noisy, 0.05);
    const met = rounds.filter(({ rise }) => rise <= 0.05).map(({ size }) => size);
    expect(kept?.size).toBe(met.length === 0 ? undefined : Math.min(...met));
  }
});

it('a model that improves by being quantized is as small as it can be', () => {
  const { rounds, kept } = search(() => -0.01, 0.02);
  expect(kept!.size).toBe(LEAST);
  expect(rounds.length).toBeLessThanOrEqual(3);
});

it('what even the widest widths lose is out of reach, and that is measured', () => {
  const { rounds, kept } = search(() => 0.06, 0.05);
  expect(kept).toBeUndefined();
  expect(rounds.at(-1)!.size).toBe(MOST);
});

it('what the smallest artifact meets at once takes one round', () => {
  const { rounds, kept } = search(geometric(0.5, 4), 1.2);
  expect(rounds).toHaveLength(1);
  expect(kept!.size).toBe(LEAST);
});
