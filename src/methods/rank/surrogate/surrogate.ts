/** A stand-in for a method that trains: it chooses among components that stay as they are, by gradients of calibration text (adapters.md 5.5). */
import type { Blas } from '../../../compute/blas.ts';
import type { AdaptedShape, SpendableBudget } from '../rank-budget.ts';
import type { TraceEntry } from '../training/schedule.ts';
import type { ComponentGradient, FrozenComponents } from './components.ts';

export interface SurrogateOptions {
  readonly budget: SpendableBudget;
  readonly preset: 'best' | 'paper';
  /** Rank of every layer at the start; absent: the method's own. */
  readonly startRank?: number | undefined;
  /** Largest rank of a layer; absent: `MOST_OF_MEAN` times the mean. */
  readonly most?: number | undefined;
  /** triadaptlora: how the number of layers that grow at once rises. */
  readonly growth?: 'linear' | 'exponential' | undefined;
}

/** A layer with what it can be given. */
export interface CandidateLayer extends AdaptedShape {
  readonly components: FrozenComponents;
  readonly mean: ComponentGradient;
}

export interface SurrogateChoice {
  /** Components of every layer, ascending. */
  readonly kept: ReadonlyMap<string, readonly number[]>;
  /** What they were chosen by: of each component, or of each rank. */
  readonly scores: ReadonlyMap<string, ArrayLike<number>>;
  /** Rounds in place of steps. */
  readonly trace: readonly TraceEntry[];
}

export interface Surrogate {
  /** Components that a layer may be given, at most. */
  mostOf(layer: AdaptedShape): number;
  /** dL/dW of one window, (m, n), window after window; absent: the mean gradient is enough. */
  observe?(layer: CandidateLayer, gradient: Float32Array, blas: Blas): Promise<void>;
  /** After the last window of a layer. */
  finish?(layer: CandidateLayer): void;
  choose(layers: readonly CandidateLayer[]): SurrogateChoice;
}

/** A few layers dominate scores that are products of losses: no layer gets more than so many times the mean. */
const MOST_OF_MEAN = 8;

/** Mean rank that the budget allows, and the most that one layer may get. */
export function rankBounds(
  { budget, most }: SurrogateOptions,
  layers: readonly AdaptedShape[],
): { readonly mean: number; readonly most: number } {
  const mean = budget.total / layers.reduce((sum, layer) => sum + budget.cost(layer), 0);
  return { mean, most: most ?? Math.max(1, Math.round(MOST_OF_MEAN * mean)) };
}

/** How unequal numbers are that are not negative: 0 all alike, towards 1 one has all. */
export function gini(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const sum = sorted.reduce((all, value) => all + value, 0);
  if (sum === 0) return 0;
  const weighted = sorted.reduce((all, value, i) => all + (2 * (i + 1) - sorted.length - 1) * value, 0);
  return weighted / (sorted.length * sum);
}
