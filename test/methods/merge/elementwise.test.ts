import { describe, expect, test } from 'vitest';
import { ALL, BASE, type MergeCase, merged, TOLERANCE } from './support.ts';

const W = [0.5, 0.3, 0.2];

/** Every vector of merging.md 4.1 for one method: what is asked, what comes out. */
const VECTORS: Record<string, [string, MergeCase, number[]][]> = {
  linear: [
    ['weighted', { experts: ALL, parameters: { weight: W } }, [1.175, -1.825, 0.55, 0.725, 2.6, -1.45]],
    ['equal', { experts: ALL }, [1.083333, -1.75, 0.5, 0.75, 2.833333, -1.333333]],
    [
      'not normalized',
      { experts: ALL, parameters: { weight: [2, -1, 0.5], normalize: false } },
      [2.75, -4.5, 0, 1.5, 2.75, -1.25],
    ],
  ],
  'task-arithmetic': [
    ['lambda .4', { base: BASE, experts: ALL, parameters: { lambda: 0.4 } }, [1.1, -1.7, 0.5, 0.9, 2.8, -1.4]],
    ['weighted', { base: BASE, experts: ALL, parameters: { weight: W } }, [1.175, -1.825, 0.55, 0.725, 2.6, -1.45]],
    [
      'lambda 2, normalized',
      { base: BASE, experts: ALL, parameters: { weight: W, lambda: 2, normalize: true } },
      [1.35, -1.65, 0.6, 1.45, 2.2, -1.9],
    ],
  ],
  ties: [
    ['density .5', { base: BASE, experts: ALL, parameters: { density: 0.5 } }, [1.5, -1, 1, 0.875, 2, -2]],
    [
      'density .5, weighted, lambda .8',
      { base: BASE, experts: ALL, parameters: { density: 0.5, weight: W, lambda: 0.8 } },
      [1.4, -1.2, 0.9, 0.657143, 2.2, -1.8],
    ],
    ['density 1', { base: BASE, experts: ALL, parameters: { density: 1 } }, [1.5, -1, 1, 0.75, 2, -1.75]],
  ],
};

describe.each(Object.entries(VECTORS))('%s', (method, vectors) => {
  test.each(vectors)('%s', async (_name, given, expected) => {
    for (const rows of [2, 1]) {
      const { values } = await merged(method, { ...given, rows });
      expect(values).toHaveLength(6);
      for (const [i, value] of values.entries()) expect(Math.abs(value - expected[i])).toBeLessThan(TOLERANCE);
    }
  });
});
