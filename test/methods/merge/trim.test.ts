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

  it('and the same in blocks', () => {
    const bounds = [0, 700, 701, 2400, 3000];
    const blocks = bounds.slice(1).map((end, b): MergeBlock => {
      const start = bounds[b];
      const taskVectors = VECTORS.map((values) => values.slice(start, end));
      return { start, length: end - start, base: undefined, experts: [], output: new Float32Array(end - start), taskVectors };
    });
    using _ = vectors().open();
    const { scans, trimmed } = trimming(3000, VECTORS.length, density);
    for (const { needed, look } of scans) if (needed?.() ?? true) blocks.forEach(look);
    const made = VECTORS.map(() => new Float32Array(3000));
    for (const block of blocks) for (const k of VECTORS.keys()) made[k].set(trimmed(k, block), block.start);
    for (const [k, values] of VECTORS.entries()) expect(made[k]).toEqual(byFullSort(values, density));
  });
});
