/** The merge methods. Commands, help, documentation and the conformance suite read this list. */
import { RecipeError } from '../../errors.ts';
import { arceeFusion } from './arcee-fusion.ts';
import { breadcrumbs } from './breadcrumbs.ts';
import { breadcrumbsTies } from './breadcrumbs-ties.ts';
import { dareLinear } from './dare-linear.ts';
import { dareTies } from './dare-ties.ts';
import { della } from './della.ts';
import { dellaLinear } from './della-linear.ts';
import { fisher } from './fisher.ts';
import { isoC } from './iso-c.ts';
import { isoCts } from './iso-cts.ts';
import { karcher } from './karcher.ts';
import { linear } from './linear.ts';
import type { Merger } from './merger.ts';
import { modelStock } from './model-stock.ts';
import { multislerp } from './multislerp.ts';
import { nearswap } from './nearswap.ts';
import { nuslerp } from './nuslerp.ts';
import { passthrough } from './passthrough.ts';
import { ram } from './ram.ts';
import { ramplus } from './ramplus.ts';
import { regmean } from './regmean.ts';
import { sce } from './sce.ts';
import { slerp } from './slerp.ts';
import { taskArithmetic } from './task-arithmetic.ts';
import { ties } from './ties.ts';
import { tsvM } from './tsv-m.ts';
import { wudi } from './wudi.ts';

/** Every merge method, by the name it has on the command line and in recipes. */
export const MERGERS = {
  linear,
  slerp,
  nuslerp,
  multislerp,
  karcher,
  'task-arithmetic': taskArithmetic,
  ties,
  'dare-linear': dareLinear,
  'dare-ties': dareTies,
  della,
  'della-linear': dellaLinear,
  breadcrumbs,
  'breadcrumbs-ties': breadcrumbsTies,
  sce,
  'model-stock': modelStock,
  nearswap,
  'arcee-fusion': arceeFusion,
  ram,
  ramplus,
  passthrough,
  fisher,
  regmean,
  'tsv-m': tsvM,
  'iso-c': isoC,
  'iso-cts': isoCts,
  wudi,
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
