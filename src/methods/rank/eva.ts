/** EVA (Paischer et al., arXiv 2410.07170): ranks go where few directions explain much of what enters a layer, and A starts as those directions. */
import type { Blas } from '../../compute/blas.ts';
import { compensate } from './compensation.ts';
import { greedyRanks } from './greedy.ts';
import type { AdaptedShape, SpendableBudget } from './rank-budget.ts';

/** Directions of an input that may be taken, for each that is on average: the paper's rho. */
export const EVA_RATIO = 2;

/** Principal directions of what enters a layer. */
export interface Directions {
  /** Part of the variance along each, descending. */
  readonly ratios: Float64Array;
  /** Row k is direction k, of length 1; (ratios.length, inFeatures). */
  readonly directions: Float32Array;
}

/** @param gram second moments (n, n) @param mean (n) of the input @param count most directions wanted */
export async function principalDirections(
  blas: Blas,
  gram: Float64Array,
  mean: Float64Array,
  count: number,
): Promise<Directions> {
  const n = mean.length;
  const covariance = new Float64Array(n * n);
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) covariance[i * n + j] = gram[i * n + j] - mean[i] * mean[j];
  const identity = new Float32Array(n * n);
  for (let j = 0; j < n; j++) identity[j * n + j] = 1;
  // The branch that best makes up for missing x itself is the projection onto the principal directions.
  const { values, total, loraA, rank } = await compensate(
    blas,
    { rows: n, columns: n, data: identity },
    covariance,
    Math.min(count, n),
  );
  return { ratios: values.slice(0, rank).map((value) => (total > 0 ? value / total : 0)), directions: loraA };
}

/** The largest ratios of all layers, within the budget, every rank at the same price: as published. */
export function evaRanks(
  layers: readonly (AdaptedShape & { readonly ratios: ArrayLike<number> })[],
  budget: SpendableBudget,
): Map<string, number> {
  const mean = budget.total / layers.reduce((sum, layer) => sum + budget.cost(layer), 0);
  const choices = layers.map((layer) => ({ name: layer.name, cost: budget.cost(layer), gains: layer.ratios }));
  // As published ranks are counted, not parameters: so many as the mean allows, and one less until they fit.
  for (let count = Math.floor(mean * layers.length); count > 0; count--) {
    const ranks = greedyRanks(
      choices.map((choice) => ({ ...choice, cost: 1 })),
      count,
    );
    const spent = choices.reduce((sum, { name, cost }) => sum + cost * ranks.get(name)!, 0);
    if (spent <= budget.total) return ranks;
  }
  return new Map(layers.map(({ name }) => [name, 0]));
}
