/** What every training method is told. */
import type { RoutedShape } from '../../../graph/routed-branch.ts';
import type { SpendableBudget } from '../rank-budget.ts';

/** What a training begins with that neither cuts nor adds ranks. */
export interface AdapterStart {
  /** By layer. */
  readonly ranks: ReadonlyMap<string, number>;
  /** (rank, inFeatures); absent: random. */
  loraA?(name: string, rank: number): Float32Array;
  /** (outFeatures, rank), what A is multiplied by in the update, scale and all; absent: 0. */
  loraB?(name: string, rank: number): Float32Array;
  /** The factors stand for a part of the weight, which is taken from it: the model is as it was. */
  readonly subtracted?: boolean;
  /** (outFeatures): norms of the weight's rows, where their lengths are trained beside what they point to. */
  magnitude?(name: string): Float32Array;
  /** Experts of every layer, for the method that routes. */
  routed?(name: string): RoutedShape;
}

export interface ScheduleOptions {
  readonly steps: number;
  readonly budget: SpendableBudget;
  readonly preset: 'best' | 'paper';
  readonly seed: number;
  /** What the update is multiplied by; absent: the method's own. */
  readonly scale?: number | undefined;
  /** Rank of every layer at the start, for methods that cut or add ranks; absent: the method's own. */
  readonly startRank?: number | undefined;
  /** triadaptlora: how the number of layers that grow at once rises. */
  readonly growth?: 'linear' | 'exponential' | undefined;
  /** Ranks and first factors that were found on text; absent: one rank for all, from random factors. */
  readonly start?: AdapterStart | undefined;
}
