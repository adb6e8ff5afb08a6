/** How long a run still takes. */
import { describe, expect, it } from 'vitest';
import { EtaEstimator, formatDuration } from '../../src/calibration/progress.ts';

describe('the estimate', () => {
  it('is unknown before the first reading and exact at a steady pace', () => {
    const eta = new EtaEstimator(100, 50);
    expect(eta.remaining(50)).toBeUndefined();
    eta.update(10, 51);
    expect(eta.remaining(51)).toBeCloseTo(9);
    eta.update(60, 56);
    expect(eta.remaining(56)).toBeCloseTo(4);
    expect(eta.fraction).toBeCloseTo(0.6);
  });

  it('counts down between readings and never below zero', () => {
    const eta = new EtaEstimator(100, 0);
    eta.update(50, 10);
    expect(eta.remaining(14)).toBeCloseTo(6);
    expect(eta.remaining(1000)).toBe(0);
  });

  it('follows a change of pace within a few readings', () => {
    const eta = new EtaEstimator(1000, 0);
    for (let t = 1; t <= 10; t++) eta.update(t, t);
    for (let t = 11; t <= 30; t++) eta.update(10 + (t - 10) * 10, t);
    expect(eta.remaining(30)! / (790 / 10)).toBeCloseTo(1, 1);
  });

  it('is not thrown off by readings that come at once', () => {
    const eta = new EtaEstimator(100, 0);
    eta.update(10, 1);
    eta.update(11, 1.0001);
    expect(eta.remaining(1.0001)).toBeCloseTo(9, 1);
  });

  it('is zero at the end, also when there was nothing to do', () => {
    const eta = new EtaEstimator(10, 0);
    eta.update(10, 0.01);
    expect(eta.remaining(0.01)).toBe(0);
    const nothing = new EtaEstimator(0, 0);
    expect([nothing.remaining(5), nothing.fraction]).toEqual([0, 1]);
  });

  it('starts over when the count falls', () => {
    const eta = new EtaEstimator(100, 0);
    eta.update(50, 5);
    eta.update(0, 6);
    expect(eta.remaining(6)).toBeUndefined();
    eta.update(10, 8);
    expect(eta.remaining(8)).toBeCloseTo(18);
  });
});

it.each([
  [0.2, '1 s'],
  [59.1, '1 min 00 s'],
  [125, '2 min 05 s'],
  [7500, '2 h 05 min'],
])('%d seconds read as %s', (seconds, text) => {
  expect(formatDuration(seconds)).toBe(text);
});
