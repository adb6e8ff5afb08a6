/**
 * The family of methods on sparse task vectors (merging.md 4): `x_k = w_k sparsify(delta_k)`, added up with or without an election of signs.
 *
 * With the election, an element's sign is that of `sum x_k` (+ for a sum of 0), and only experts that agree with it count, in the
 * sum N and in the divisor Z alike. Result: `theta_0 + lambda N / Z` where normalized, else `theta_0 + lambda N`.
 */
import type { MergeBlock, TensorMerge } from './merger.ts';
import { NEGLIGIBLE_WEIGHT, sum } from './weights.ts';

/** Global scale of what is added to the base. */
export const LAMBDA = { type: 'number', summary: 'scale of what is added to the base', default: 1 } as const;

export const DENSITY = {
  type: 'number',
  summary: 'share of each task vector that is kept; 1 keeps all',
  default: 1,
  above: 0,
  perExpert: true,
} as const;

/** Sparse task vectors, made a stretch of elements at a time, in order from the first element of the tensor to the last. */
export interface Sparsifier {
  readonly scans: readonly ((block: MergeBlock) => void)[];
  /** The method looks at whole rows of this many elements; absent: stretches may end anywhere. */
  readonly rowLength?: number;
  /** Writes the sparse form of `delta[from .. from + count)` of expert `k` to `out[0 .. count)`; the first is element `at` of the tensor. */
  sparsify(k: number, delta: Float32Array, from: number, count: number, at: number, out: Float64Array): void;
}

export interface Combination {
  readonly weight: readonly number[];
  readonly lambda: number;
  readonly normalize: boolean;
  /** Elect signs. */
  readonly consensus: boolean;
}

const STRETCH = 2048;

/** How many elements a sparsifier takes at once: all of one row where it needs rows. */
export function stretchLength(sparsifier: Sparsifier): number {
  const { rowLength } = sparsifier;
  return rowLength ? rowLength * Math.max(1, Math.floor(STRETCH / rowLength)) : STRETCH;
}

/** A divisor that would be almost 0 is left out (merging.md 4). */
export function consensusDivisor(total: number): number {
  return Math.abs(total) < NEGLIGIBLE_WEIGHT ? 1 : total;
}

/** The merge of one tensor by a method of this family. */
export function mergeTaskVectors(sparsifier: Sparsifier, combination: Combination): TensorMerge {
  const { weight, lambda, normalize, consensus } = combination;
  const stretch = stretchLength(sparsifier);
  const sparse = weight.map(() => new Float64Array(0));
  let total = new Float64Array(0);
  let divisor = new Float64Array(0);
  let agreed = new Float64Array(0);
  const fixedScale = normalize ? lambda / consensusDivisor(sum(weight)) : lambda;

  const merge = (block: MergeBlock): Float32Array => {
    const base = block.base!;
    const result = new Float32Array(block.length);
    const size = Math.min(stretch, block.length);
    if (total.length < size) {
      for (let k = 0; k < sparse.length; k++) sparse[k] = new Float64Array(size);
      [total, divisor, agreed] = [new Float64Array(size), new Float64Array(size), new Float64Array(size)];
    }
    for (let from = 0; from < block.length; from += stretch) {
      const count = Math.min(stretch, block.length - from);
      total.fill(0, 0, count);
      for (let k = 0; k < sparse.length; k++) {
        sparsifier.sparsify(k, block.taskVectors[k], from, count, block.start + from, sparse[k]);
        addScaled(total, sparse[k], weight[k], count);
      }
      if (!consensus) {
        for (let i = 0; i < count; i++) result[from + i] = base[from + i] + fixedScale * total[i];
        continue;
      }
      divisor.fill(0, 0, count);
      agreed.fill(0, 0, count);
      for (let k = 0; k < sparse.length; k++) addAgreeing(agreed, divisor, total, sparse[k], weight[k], count);
      if (!normalize) for (let i = 0; i < count; i++) result[from + i] = base[from + i] + lambda * agreed[i];
      else addNormalized(result, base, from, agreed, divisor, lambda, count);
    }
    return result;
  };
  return { scans: sparsifier.scans, merge };
}

function addScaled(total: Float64Array, x: Float64Array, scale: number, count: number): void {
  for (let i = 0; i < count; i++) total[i] += scale * x[i];
}

function addAgreeing(
  agreed: Float64Array,
  divisor: Float64Array,
  total: Float64Array,
  x: Float64Array,
  scale: number,
  count: number,
): void {
  for (let i = 0; i < count; i++) {
    const value = scale * x[i];
    if (total[i] >= 0 ? value > 0 : value < 0) {
      agreed[i] += value;
      divisor[i] += scale;
    }
  }
}

function addNormalized(
  result: Float32Array,
  base: Float32Array,
  from: number,
  agreed: Float64Array,
  divisor: Float64Array,
  lambda: number,
  count: number,
): void {
  for (let i = 0; i < count; i++) {
    const z = divisor[i];
    result[from + i] = base[from + i] + (lambda * agreed[i]) / (z < NEGLIGIBLE_WEIGHT && z > -NEGLIGIBLE_WEIGHT ? 1 : z);
  }
}
