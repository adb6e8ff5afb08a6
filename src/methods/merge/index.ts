/** The merge methods. Commands, help, documentation and the conformance suite read this list. */
import { RecipeError } from '../../errors.ts';
import { linear } from './linear.ts';
import type { Merger } from './merger.ts';
import { taskArithmetic } from './task-arithmetic.ts';
import { ties } from './ties.ts';

/** Every merge method, by the name it has on the command line and in recipes. */
export const MERGERS = {
  linear,
  'task-arithmetic': taskArithmetic,
  ties,
} as const satisfies Record<string, Merger>;

/** Names of mergekit's that differ by more than `_` for `-`. */
const ALIASES: Readonly<Record<string, string>> = { 'ramplus-tl': 'ramplus' };

/** The method of a name; mergekit's spelling (`dare_ties`) is taken too. @throws RecipeError listing the names */
export function mergerOf(name: string): Merger {
  const kebab = name.replaceAll('_', '-');
  const found = Object.entries<Merger>(MERGERS).find(([key]) => key === (ALIASES[kebab] ?? kebab));
  if (!found) throw new RecipeError(`--method ${name}: must be one of ${Object.keys(MERGERS).join(', ')}`);
  return found[1];
}
