/**
 * The family of methods on sparse task vectors (merging.md 4): `x_k = w_k sparsify(delta_k)`, added up with or without an election of signs.
 *
 * With the election, an element's sign is that of `sum x_k` (+ for a sum of 0), and only experts that agree with it count, in the
 * sum N and in the divisor Z alike. Result: `theta_0 + lambda N / Z` where normalized, else `theta_0 + lambda N`.
 */
import { type ElectionMean, vectors } from '../../compute/kernels/vectors.ts';
import type { MergeBlock, Scan, TensorMerge } from './merger.ts';
import { allocateStretch, readTaskVector, type Stretch, stretchLength } from './stretch.ts';
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

/** Makes task vectors sparse, a stretch at a time, in order from the first element of the tensor to the last. */
export interface Sparsifier {
  readonly scans: readonly Scan[];
  /** The method looks at whole rows of this many elements; absent: stretches may end anywhere. */
  readonly rowLength?: number;
  /** Overwrites the stretch of expert `k` with its sparse form; `at` is the flat index of its first element. */
  sparsify(k: number, stretch: Stretch, count: number, at: number): void;
  /** What the sparse task vector of expert `k` is to be multiplied by; known after the scans. */
  scale(k: number): number;
}

export interface Combination {
  readonly weight: readonly number[];
  readonly lambda: number;
  readonly normalize: boolean;
  /** Elect signs. */
  readonly consensus: boolean;
}

/** A divisor that would be almost 0 is left out (merging.md 4). */
export function divisorOf(total: number): number {
  return Math.abs(total) < NEGLIGIBLE_WEIGHT ? 1 : total;
}

/** The merge of one tensor by a method of this family. */
export function mergeTaskVectors(sparsifier: Sparsifier, combination: Combination): TensorMerge {
  const { weight, lambda, normalize, consensus } = combination;
  const length = stretchLength(sparsifier.rowLength);
  const positive = weight.every((w) => w === 0 || w >= NEGLIGIBLE_WEIGHT);
  const mean: ElectionMean = !normalize ? 'none' : positive ? 'positive weights' : 'any weights';
  const fixedScale = normalize ? lambda / divisorOf(sum(weight)) : lambda;
  let stretches: readonly Stretch[] | undefined;

  const merge = ({ base: whole, experts, output, length: blockLength, start }: MergeBlock): Float32Array => {
    stretches ??= weight.map(() => allocateStretch(length));
    for (let from = 0; from < blockLength; from += length) {
      const count = Math.min(length, blockLength - from);
      const base = whole!.subarray(from, from + count);
      const out = output.subarray(from, from + count);
      const taken: { values: Float32Array; factor: number; weight: number }[] = [];
      for (const [k, stretch] of stretches.entries()) {
        const factor = weight[k] * sparsifier.scale(k);
        if (factor === 0) continue;
        readTaskVector(experts[k], whole!, from, count, stretch.values);
        sparsifier.sparsify(k, stretch, count, start + from);
        taken.push({ values: stretch.values, factor, weight: weight[k] });
      }
      const xs = taken.map(({ values }) => values);
      const factors = taken.map(({ factor }) => factor);
      const weights = taken.map((one) => one.weight);
      if (consensus) {
        vectors().electSigns(base, xs, { factors, weights }, { scale: lambda, mean, least: NEGLIGIBLE_WEIGHT }, out);
      } else vectors().addScaled(base, xs, factors, fixedScale, out);
    }
    return output;
  };
  return { scans: sparsifier.scans, merge };
}
