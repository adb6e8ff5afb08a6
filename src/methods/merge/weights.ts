/** What the experts weigh: a parameter of most methods, and its normalization. */
import { RecipeError } from '../../errors.ts';

/** `--weights`: any real number per expert. */
export const WEIGHT = { type: 'number', summary: 'weight of the expert', default: 1, perExpert: true } as const;

/** Below this, a sum of weights counts as zero (merging.md 4). */
export const NEGLIGIBLE_WEIGHT = 1e-8;

/** Weights that sum to 1. @throws RecipeError when they cancel out */
export function normalizedWeights(method: string, weights: readonly number[]): number[] {
  const total = sum(weights);
  if (Math.abs(total) < NEGLIGIBLE_WEIGHT)
    throw new RecipeError(
      `weight ${weights.join(',')}: ${method} divides by the sum of the weights, which must be at least ${NEGLIGIBLE_WEIGHT} away from 0, but is ${total}`,
    );
  return weights.map((weight) => weight / total);
}

export function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}
