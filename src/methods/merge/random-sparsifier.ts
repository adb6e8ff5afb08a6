/** Sparsifiers that keep each element with a probability and make up for what is lost: DARE and DELLA. */
import { vectors } from '../../compute/kernels/vectors.ts';
import type { MergeContext, MergeTensor } from './merger.ts';
import { fillUniform, randomKey, UNIFORM_STEPS } from './random-mask.ts';
import { SpanSums } from './span-sum.ts';
import { type Stretch, scanTaskVectors, stretchLength } from './stretch.ts';
import type { Sparsifier } from './task-vectors.ts';

/** How what is dropped is made up for. Published: `inverse`. */
export const RESCALE = {
  type: 'choice',
  summary: 'l1: restore the sum of magnitudes; inverse: divide by the probability of being kept',
  choices: ['l1', 'inverse', 'none'],
  default: 'l1',
  paper: 'inverse',
} as const;

/** Writes the probability that each element of a stretch is kept. */
export type KeepProbability = (stretch: Stretch, count: number, out: Float64Array) => void;

/**
 * @param probabilities per expert: the same for all elements, or each its own; undefined keeps everything
 * @param rowLength where probabilities depend on whole rows
 */
export function keepRandomly(
  tensor: MergeTensor,
  context: MergeContext,
  probabilities: readonly (number | KeepProbability | undefined)[],
  rescale: 'l1' | 'inverse' | 'none',
  rowLength?: number,
): Sparsifier {
  const which = probabilities.flatMap((probability, k) => (probability === undefined ? [] : [k]));
  const keys = tensor.experts.map((label) => randomKey(context.seed, tensor.name, label));
  const length = stretchLength(rowLength);
  const own = probabilities.some((write) => typeof write === 'function') ? length : 0;
  const probability = new Float64Array(own);
  const uniform = new Uint32Array(own);

  /** Writes what is kept of `values` into `out`, which may be the same. */
  const keep = (k: number, stretch: Stretch, count: number, at: number, out: Float32Array): void => {
    const write = probabilities[k];
    const values = stretch.values.subarray(0, count);
    if (typeof write === 'number') {
      vectors().keepRandomly(values, keys[k], at, Math.ceil(write * UNIFORM_STEPS), out);
      if (rescale === 'inverse') vectors().divide(out.subarray(0, count), write);
      return;
    }
    if (out !== stretch.values) out.set(values);
    if (write === undefined) return;
    write(stretch, count, probability);
    const numbers = uniform.subarray(0, count);
    fillUniform(keys[k], at, numbers);
    drop(out, probability, numbers, rescale === 'inverse', count);
  };
  const common = {
    sparsify: (k: number, stretch: Stretch, count: number, at: number) => keep(k, stretch, count, at, stretch.values),
    ...(rowLength ? { rowLength } : {}),
  };
  if (rescale !== 'l1') return { ...common, scans: [], scale: () => 1 };

  // Magnitudes before and after.
  const sums = probabilities.map(() => new SpanSums(2));
  let kept: Float32Array | undefined;
  const look = scanTaskVectors(which, rowLength, (k, stretch, count, at) => {
    kept ??= vectors().floats(length);
    keep(k, stretch, count, at, kept);
    sums[k].addMagnitudePairs(stretch.values.subarray(0, count), kept.subarray(0, count));
  });
  return {
    ...common,
    scans: which.length > 0 ? [{ look }] : [],
    scale(k) {
      const [before, after] = [sums[k].total(0), sums[k].total(1)];
      return before === 0 || after === 0 ? 1 : before / after;
    },
  };
}

function drop(values: Float32Array, probability: Float64Array, uniform: Uint32Array, inverse: boolean, count: number): void {
  for (let i = 0; i < count; i++) {
    const p = probability[i];
    if (uniform[i] >= p * UNIFORM_STEPS) values[i] = 0;
    else if (inverse) values[i] /= p;
  }
}

/** The same probability everywhere; a density of 1 or more keeps everything. */
export function constantProbability(density: number): number | undefined {
  return density < 1 ? density : undefined;
}
