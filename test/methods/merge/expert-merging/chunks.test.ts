/** Chunks and their budget, against the specification's vectors (merging.md 6.6). */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  evenChunks,
  floorChunks,
  importanceOf,
  largestRemainder,
} from '../../../../src/methods/merge/expert-merging/chunk-budget.ts';
import { flatChunks, rowChunks } from '../../../../src/methods/merge/expert-merging/chunks.ts';

const sizes = (bounds: readonly number[]) => bounds.slice(1).map((end, s) => end - bounds[s]);

describe('chunks of a tensor', () => {
  it.each([
    [10, 4, [3, 3, 3, 1]],
    [9, 6, [2, 2, 2, 2, 1, 0]],
    [8, 8, [1, 1, 1, 1, 1, 1, 1, 1]],
    [7, 1, [7]],
    [5, 7, [1, 1, 1, 1, 1, 0, 0]],
  ])('flat: %i elements in %i', (n, m, expected) => {
    expect(sizes(flatChunks(n, m))).toEqual(expected);
  });

  it('of whole rows end where the specification says', () => {
    expect(rowChunks(10, 3, 4)).toEqual([0, 2, 5, 7, 10].map((row) => row * 3));
    expect(rowChunks(7, 1, 3)).toEqual([0, 2, 4, 7]);
  });

  it('keep the rows of a head together', () => {
    expect(rowChunks(12, 2, 2, 4)).toEqual([0, 4 * 2, 12 * 2]);
  });
});

const TENSORS = [
  { coefficients: [0.2, 0.1], magnitudes: [0.01, 0.02], elements: 64, limit: 64 },
  { coefficients: [0.1, 0.1], magnitudes: [0.01, 0.01], elements: 16, limit: 16 },
  { coefficients: [0.3, 0.2], magnitudes: [0.02, 0.01], elements: 256, limit: 256 },
  { coefficients: [0.1, 0.4], magnitudes: [0.01, 0.03], elements: 256, limit: 256 },
];

describe('the budget of chunks', () => {
  it('goes by coefficient times task vector times size', () => {
    for (const [l, expected] of [0.256, 0.032, 2.048, 3.328].entries()) expect(importanceOf(TENSORS[l])).toBeCloseTo(expected, 9);
  });

  it.each([
    [1, [0, 0, 1, 2]],
    [0.5, [0, 0, 1, 2]],
    [2, [0, 0, 1, 3]],
    [0, [1, 1, 1, 1]],
  ])('as published, sharpness %d', (sharpness, expected) => {
    expect(floorChunks(TENSORS, { perTensor: 1.2, sharpness })).toEqual(expected);
  });

  it.each([
    [1, [1, 1, 1, 1]],
    [1.2, [1, 1, 1, 2]],
    [2, [1, 1, 3, 3]],
    [8, [2, 1, 11, 18]],
  ])('never below one chunk, %d per tensor', (perTensor, expected) => {
    expect(evenChunks(TENSORS, { perTensor, sharpness: 1 })).toEqual(expected);
  });

  it('is even when nothing is important, and what a full tensor cannot take goes to the others', () => {
    const idle = TENSORS.map((tensor) => ({ ...tensor, coefficients: [0, 0] }));
    expect(evenChunks(idle, { perTensor: 2, sharpness: 1 })).toEqual([2, 2, 2, 2]);
    const narrow = TENSORS.map((tensor, l) => ({ ...tensor, limit: l === 3 ? 4 : 64 }));
    const chunks = evenChunks(narrow, { perTensor: 8, sharpness: 1 });
    expect(chunks[3]).toBe(4);
    expect(chunks.reduce((a, b) => a + b)).toBe(32);
  });

  it('is spent exactly, whatever the shares', () => {
    fc.assert(
      fc.property(
        fc.nat(500),
        fc.array(fc.double({ min: 0.001, max: 1, noNaN: true }), { minLength: 1, maxLength: 20 }),
        (total, raw) => {
          const sum = raw.reduce((a, b) => a + b, 0);
          const shares = largestRemainder(
            total,
            raw.map((value) => value / sum),
          );
          expect(shares.reduce((a, b) => a + b, 0)).toBe(total);
        },
      ),
    );
  });
});
