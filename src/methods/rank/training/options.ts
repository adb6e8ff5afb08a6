/** What every training method is told. */
import type { SpendableBudget } from '../rank-budget.ts';

export interface ScheduleOptions {
  readonly steps: number;
  readonly budget: SpendableBudget;
  readonly preset: 'best' | 'paper';
  readonly seed: number;
  /** What the update is multiplied by; absent: the method's own. */
  readonly scale?: number | undefined;
  /** Rank of every layer at the start, for methods that cut ranks; absent: half as much again as stays on average. */
  readonly startRank?: number | undefined;
}
