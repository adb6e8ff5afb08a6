/** Trimmed task vectors: exactly the largest entries, however the tensor is cut into blocks. */
import { describe, expect, it } from 'vitest';
import { vectors } from '../../../src/compute/kernels/vectors.ts';
import type { MergeBlock } from '../../../src/methods/merge/merger.ts';
import { trimming, trimWhole } from '../../../src/methods/merge/trim.ts';

/** Many equal magnitudes, of both signs. */
const vector = (seed: number) => Float32Array.from({ length: 3000 }, (_, i) => Math.round(5 * Math.sin(seed * i + seed)) / 4);
const VECTORS = [vector(1.3), vector(0.7)];

function byFullSort(values: Float32Array, density: number): Float32Array {
  const order = [...values.keys()].sort((i, j) => Math.abs(values[j]) - Math.abs(values[i]) || i - j);
  const kept = new Set(order.slice(0, Math.max(1, Math.floor(density * values.length))));
  return values.map((value, i) => (kept.has(i) ? value : 0));
}

describe.each([0.2, 0.5, 1e-6])('a density of %d', (density) => {
  it('keeps what a full sort would, the first of equals first', () => {
    for (const values of VECTORS) expect(trimWhole(values, density)).toEqual(byFullSort(values, density));
  });

  it.each([
    ['like each other', VECTORS, false],
    ['of which the first misleads', VECTORS.map((values) => values.map((value, i) => (i < 700 ? value / 1000 : value))), true],
  ])('and the same in blocks %s', (_name, given, misled) => {
    const bounds = [0, 700, 701, 2400, 3000];
    const blocks = bounds.slice(1).map((end, b): MergeBlock => {
      const start = bounds[b];
      const taskVectors = given.map((values) => values.slice(start, end));
      return { start, length: end - start, base: undefined, experts: [], output: new Float32Array(end - start), taskVectors };
    });
    using _ = vectors().open();
    const { scans, trimmed } = trimming(3000, given.length, density);
    const passes: number[] = [];
    for (const { every = 1, needed, look } of scans) {
      if (needed && !needed()) continue;
      passes.push(every);
      for (const block of blocks.filter((_, i) => i % every === 0)) look(block);
    }
    const made = given.map(() => new Float32Array(3000));
    for (const block of blocks) for (const k of given.keys()) made[k].set(trimmed(k, block), block.start);
    for (const [k, values] of given.entries()) expect(made[k]).toEqual(byFullSort(values, density));
    // Where the first block misleads, or the threshold is between two of the few values there are, low halves are counted in a pass of their own.
    expect(passes).toEqual(misled || density === 0.5 ? [16, 1, 1] : [16, 1]);
  });
});
