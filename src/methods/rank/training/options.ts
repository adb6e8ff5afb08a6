/** What every training method is told. */
import type { SpendableBudget } from '../rank-budget.ts';

export interface ScheduleOptions {
  readonly steps: number;
  readonly budget: SpendableBudget;
  readonly preset: 'best' | 'paper';
  readonly seed: number;
  /** What the update is multiplied by; absent: the method's own. A number, or from the rank of a layer. */
  readonly scale?: number | undefined;
}
