/**
 * The search of `lambda` on calibration text (merging.md 5): which values are tried, and what can be set of the text. One merge is enough for all
 * of them, since a method with a lambda makes `theta_0 + lambda u`, whatever `u` is.
 */
import { MERGERS } from './index.ts';
import { TEXT_PARAMETERS } from './learned.ts';
import type { Merger, Parameters } from './merger.ts';

export const LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.3] as const;

export const SEARCH_PARAMETERS = {
  ...TEXT_PARAMETERS,
  samples: { type: 'number', summary: 'samples of each expert that lambda is judged on', default: 16, min: 1, integer: true },
} as const satisfies Parameters;

/** Names of methods whose lambda can be found: those that have one, but for such as measure the text for something else. */
export function methodsWithLambda(): string[] {
  return Object.values<Merger>(MERGERS).flatMap(({ name, parameters, statistics }) =>
    Object.hasOwn(parameters, 'lambda') && statistics === undefined ? [name] : [],
  );
}
