/**
 * The family of methods on sparse task vectors (merging.md 4): `x_k = w_k sparsify(delta_k)`, added up with or without an election of signs.
 *
 * With the election, an element's sign is that of `sum x_k` (+ for a sum of 0), and only experts that agree with it count, in the
 * sum N and in the divisor Z alike. Result: `theta_0 + lambda N / Z` where normalized, else `theta_0 + lambda N`.
 */
import type { MergeBlock, TensorMerge } from './merger.ts';
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
  readonly scans: readonly ((block: MergeBlock) => void)[];
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
  const stretch = allocateStretch(length);
  const sums = new Float64Array(consensus ? 4 * length : length);
  const signs = allocateSigns(length);
  const positive = weight.every((w) => w === 0 || w >= NEGLIGIBLE_WEIGHT);
  const mean = !normalize ? 'none' : positive ? 'positive weights' : 'any weights';
  const fixedScale = normalize ? lambda / divisorOf(sum(weight)) : lambda;

  const merge = (block: MergeBlock): Float32Array => {
    const base = block.base!;
    const result = new Float32Array(block.length);
    for (let from = 0; from < block.length; from += length) {
      const count = Math.min(length, block.length - from);
      sums.fill(0);
      for (let k = 0; k < weight.length; k++) {
        readTaskVector(block.experts[k], base, from, count, stretch.values);
        sparsifier.sparsify(k, stretch, count, block.start + from);
        const factor = weight[k] * sparsifier.scale(k);
        if (!consensus) addScaled(sums, stretch.values, factor, count);
        else if (factor !== 0) addBySign(sums, stretch, weight[k], factor, count);
      }
      if (!consensus) addToBase(result, base, from, sums, fixedScale, count);
      else addElected(result, base, from, sums, signs, lambda, mean, count);
    }
    return result;
  };
  return { scans: sparsifier.scans, merge };
}

/** Totals, and the same memory as 32-bit words. */
interface Signs {
  readonly totals: Float64Array;
  readonly words: Int32Array;
}

function allocateSigns(length: number): Signs {
  const totals = new Float64Array(length);
  return { totals, words: new Int32Array(totals.buffer) };
}

function addScaled(sums: Float64Array, x: Float32Array, factor: number, count: number): void {
  for (let i = 0; i < count; i++) sums[i] += factor * x[i];
}

/**
 * Four sums per element: the positive and the negative `factor x`, the weights of the positive and of the negative. One of each pair is
 * what counts once the sign is known, so one look at every expert is enough. By bits: a branch on random signs is mispredicted half the time.
 */
function addBySign(sums: Float64Array, stretch: Stretch, weight: number, factor: number, count: number): void {
  const { values, bits } = stretch;
  const flip = factor < 0 ? 1 : 0;
  // A zero agrees with neither sign. Looked up, because the engine guards an integer product against -0 with a branch.
  const counted = Float64Array.of(0, weight);
  for (let i = 0; i < count; i++) {
    const pattern = bits[i];
    const at = 4 * i + ((pattern >>> 31) ^ flip);
    sums[at] += factor * values[i];
    sums[at + 2] += counted[(0 - (pattern & 0x7fffffff)) >>> 31];
  }
}

function addToBase(
  result: Float32Array,
  base: Float32Array,
  from: number,
  sums: Float64Array,
  scale: number,
  count: number,
): void {
  for (let i = 0; i < count; i++) result[from + i] = base[from + i] + scale * sums[i];
}

/** Adds the sum of those that agree, or their mean; `scale` is lambda. */
function addElected(
  result: Float32Array,
  base: Float32Array,
  from: number,
  sums: Float64Array,
  signs: Signs,
  scale: number,
  mean: 'none' | 'positive weights' | 'any weights',
  count: number,
): void {
  const { totals, words } = signs;
  for (let i = 0; i < count; i++) totals[i] = sums[4 * i] + sums[4 * i + 1];
  // The sign bit is in the second word of a double. A total of 0 has it clear: the sums start as +0.
  if (mean === 'none') {
    for (let i = 0; i < count; i++) result[from + i] = base[from + i] + scale * sums[4 * i + (words[2 * i + 1] >>> 31)];
  } else if (mean === 'positive weights') {
    // Nobody agrees: 0 / 1e-8 is the 0 that 0 / 1 is, and half of all elements may be such.
    for (let i = 0; i < count; i++) {
      const at = 4 * i + (words[2 * i + 1] >>> 31);
      result[from + i] = base[from + i] + (scale * sums[at]) / Math.max(sums[at + 2], NEGLIGIBLE_WEIGHT);
    }
  } else {
    for (let i = 0; i < count; i++) {
      const at = 4 * i + (words[2 * i + 1] >>> 31);
      result[from + i] = base[from + i] + (scale * sums[at]) / divisorOf(sums[at + 2]);
    }
  }
}
