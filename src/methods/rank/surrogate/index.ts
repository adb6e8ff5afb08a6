/** Calibration surrogates of methods that train, by the name of what they stand in for. */
import type { AdaptedShape } from '../rank-budget.ts';
import { adalora } from './adalora.ts';
import { increlora, triadaptlora } from './growth.ts';
import type { Surrogate, SurrogateOptions } from './surrogate.ts';

export const SURROGATES = { adalora, increlora, triadaptlora } as const satisfies Record<
  string,
  (options: SurrogateOptions, layers: readonly AdaptedShape[]) => Surrogate
>;
