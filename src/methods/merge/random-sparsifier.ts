/** Sparsifiers that keep each element with a probability and make up for what is lost: DARE and DELLA. */
import type { MergeContext, MergeTensor } from './merger.ts';
import { fillUniform, randomKey, UNIFORM_STEPS } from './random-mask.ts';
import { SpanSum } from './span-sum.ts';
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
 * @param probabilities per expert; undefined keeps everything
 * @param rowLength where probabilities depend on whole rows
 */
export function keepRandomly(
  tensor: MergeTensor,
  context: MergeContext,
  probabilities: readonly (KeepProbability | undefined)[],
  rescale: 'l1' | 'inverse' | 'none',
  rowLength?: number,
): Sparsifier {
  const which = probabilities.flatMap((probability, k) => (probability ? [k] : []));
  const keys = tensor.experts.map((label) => randomKey(context.seed, tensor.name, label));
  const length = stretchLength(rowLength);
  const probability = new Float64Array(length);
  const uniform = new Uint32Array(length);

  const sparsify = (k: number, stretch: Stretch, count: number, at: number): void => {
    const write = probabilities[k];
    if (!write) return;
    write(stretch, count, probability);
    fillUniform(keys[k], at, count, uniform);
    drop(stretch.values, probability, uniform, rescale === 'inverse', count);
  };
  const scale = { sparsify, ...(rowLength ? { rowLength } : {}) };
  if (rescale !== 'l1') return { ...scale, scans: [], scale: () => 1 };

  const before = probabilities.map(() => new SpanSum());
  const after = probabilities.map(() => new SpanSum());
  const scan = scanTaskVectors(which, rowLength, (k, stretch, count, at) => {
    before[k].addMagnitudes(stretch.values, 0, count);
    sparsify(k, stretch, count, at);
    after[k].addMagnitudes(stretch.values, 0, count);
  });
  return {
    ...scale,
    scans: which.length > 0 ? [scan] : [],
    scale: (k) => (before[k].total === 0 || after[k].total === 0 ? 1 : before[k].total / after[k].total),
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
export function constantProbability(density: number): KeepProbability | undefined {
  return density < 1 ? (_stretch, count, out) => void out.fill(density, 0, count) : undefined;
}
