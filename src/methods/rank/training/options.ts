/** What every training method is told. */
import type { SpendableBudget } from '../rank-budget.ts';

/** What a training without cuts begins with. */
export interface AdapterStart {
  /** By layer. */
  readonly ranks: ReadonlyMap<string, number>;
  /** (rank, inFeatures); absent: random. */
  loraA?(name: string, rank: number): Float32Array;
  /** (outFeatures, rank), what A is multiplied by in the update, scale and all; absent: 0. */
  loraB?(name: string, rank: number): Float32Array;
}

export interface ScheduleOptions {
  readonly steps: number;
  readonly budget: SpendableBudget;
  readonly preset: 'best' | 'paper';
  readonly seed: number;
  /** What the update is multiplied by; absent: the method's own. */
  readonly scale?: number | undefined;
  /** Rank of every layer at the start, for methods that cut ranks; absent: half as much again as stays on average. */
  readonly startRank?: number | undefined;
  /** Ranks and first factors that were found on text; absent: one rank for all, from random factors. */
  readonly start?: AdapterStart | undefined;
}
