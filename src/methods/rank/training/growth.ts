/** Layers that get more components while they are trained: how a layer grows, and who gets how much of what is left (adapters.md 8.2 and 8.3). */
import { RecipeError } from '../../../errors.ts';
import type { AdaptedShape, SpendableBudget } from '../rank-budget.ts';
import { normal } from './initial.ts';
import type { TrainedModule } from './schedule.ts';

/** Standard deviation of new rows of A and columns of B; what is between them starts at nothing, so that the model stays as it is. */
const SPREAD = 0.02;

/**
 * Adds `count` components, born after update `step`, with `inner` on their part of the vector `e` or with zeros in the square `core`, whichever the layer
 * has. A layer without components gets its first ones: `middle` says which of the two it shall have.
 */
export function growModule(
  module: TrainedModule,
  count: number,
  step: number,
  { seed, middle, inner = 0 }: { readonly seed: number; readonly middle: 'e' | 'core'; readonly inner?: number },
): void {
  const { name, rank, outFeatures: m, inFeatures: n, parameters } = module;
  const total = rank + count;
  const resize = (key: string, shape: readonly number[], values: Float32Array): void => {
    parameters.set(key, parameters.get(key)!.resized(shape, { values, born: step }));
  };
  resize('loraA', [total, n], normal(total * n, SPREAD, seed, `${name} loraA ${rank}`));
  resize('loraB', [m, total], normal(m * total, SPREAD, seed, `${name} loraB ${rank}`));
  if (middle === 'e') resize('e', [total], new Float32Array(total).fill(inner));
  else resize('core', [total, total], new Float32Array(total * total));
  module.rank = total;
}

/** Leaves the first `rank` components. */
export function shrinkModule(module: TrainedModule, rank: number): void {
  const { outFeatures: m, inFeatures: n, parameters } = module;
  const shapes = { loraA: [rank, n], loraB: [m, rank], e: [rank], core: [rank, rank] };
  for (const [key, shape] of Object.entries(shapes)) {
    const parameter = parameters.get(key);
    if (parameter) parameters.set(key, parameter.resized(shape));
  }
  module.rank = rank;
}

/** One in so many layers grows at a time in IncreLoRA. */
const LAYERS_A_TIME = 6;

export function layersAtATime(layers: number): number {
  return Math.ceil(layers / LAYERS_A_TIME);
}

/** What one growth gives each layer. */
export interface GrowthOptions<Layer extends AdaptedShape> {
  readonly budget: SpendableBudget;
  /** Components that exist, by layer. */
  readonly ranks: ReadonlyMap<string, number>;
  /** Most layers that grow. */
  readonly most: number;
  /** Ranks that each of them gets. */
  readonly each: number;
  /** Largest rank of a layer; absent: what its shape allows. */
  mostOf?(module: Layer): number;
  score(module: Layer): number;
}

/**
 * The layers of the best scores for their cost, and the ranks that each gets: the last one what is left, so that the budget is met and never exceeded.
 * Equal scores go by name. Empty: nothing fits any more.
 */
export function grownExactly<Layer extends AdaptedShape>(
  modules: readonly Layer[],
  { budget, ranks, most, each, mostOf = smallerSide, score }: GrowthOptions<Layer>,
): ReadonlyMap<Layer, number> {
  let left = budget.total - modules.reduce((sum, module) => sum + ranks.get(module.name)! * budget.cost(module), 0);
  const order = modules
    .map((module) => ({ module, value: score(module) / budget.cost(module) }))
    .toSorted((a, b) => b.value - a.value || (a.module.name < b.module.name ? -1 : 1));
  const grown = new Map<Layer, number>();
  for (const { module } of order) {
    if (grown.size === most) break;
    const cost = budget.cost(module);
    const room = mostOf(module) - ranks.get(module.name)!;
    const count = Math.min(each, room, Math.floor(left / cost + 1e-9));
    if (count < 1) continue;
    grown.set(module, count);
    left -= count * cost;
  }
  return grown;
}

/** All layers with room whose score is at least the `most`-th best of theirs: ties and all, as published, whatever that costs. */
export function grownByThreshold<Layer extends AdaptedShape>(
  modules: readonly Layer[],
  { ranks, most, each, mostOf = smallerSide, score }: Omit<GrowthOptions<Layer>, 'budget'>,
): ReadonlyMap<Layer, number> {
  const roomOf = (module: Layer) => mostOf(module) - ranks.get(module.name)!;
  const open = modules.filter((module) => roomOf(module) > 0);
  const scores = open.map(score);
  const threshold = scores.toSorted((a, b) => b - a)[Math.min(most, open.length) - 1];
  const grown = new Map<Layer, number>();
  for (const [i, module] of open.entries()) if (scores[i] >= threshold) grown.set(module, Math.min(each, roomOf(module)));
  return grown;
}

function smallerSide({ outFeatures, inFeatures }: AdaptedShape): number {
  return Math.min(outFeatures, inFeatures);
}

/** The mean rank that the budget allows, and the ranks of all layers together. */
export function rankTargets(
  budget: SpendableBudget,
  modules: readonly AdaptedShape[],
): { readonly mean: number; readonly total: number } {
  const mean = budget.total / modules.reduce((sum, module) => sum + budget.cost(module), 0);
  return { mean, total: mean * modules.length };
}

/** Throws RecipeError where `startRank` ranks of every layer are more than the budget allows. */
export function requireStart(method: string, startRank: number, budget: SpendableBudget, modules: readonly AdaptedShape[]): void {
  const { mean } = rankTargets(budget, modules);
  if (mean >= startRank) return;
  throw new RecipeError(
    `--budget: allows ${mean.toFixed(2)} ranks a layer, and ${method} starts with ${startRank}, to which it only adds`,
  );
}
