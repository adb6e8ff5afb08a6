/** How many experts every layer of blocks gets: by a profile over the depth, or by what gradients say, within a budget (adapters.md 5.5, MoLA). */
import { RecipeError } from '../../errors.ts';
import { type RoutedShape, routedParameters } from '../../graph/routed-branch.ts';
import type { AdaptedShape, SpendableBudget } from './rank-budget.ts';
import { waterfill } from './waterfill.ts';

/** `auto`, or experts of equal parts of the depth, first to last. */
export type ExpertProfile = 'auto' | readonly number[];

/** Most experts that `auto` gives a block. */
const AUTO_MOST = 8;
const MOST = 1024;

/** `2468`, a digit for each quarter of the blocks; `2,4,6,12`, of as many equal parts as are given; `auto`. */
export function parseProfile(text: string): ExpertProfile {
  if (text === 'auto') return 'auto';
  const parts = text.includes(',') ? text.split(',') : /^\d{4}$/.test(text) ? [...text] : [];
  const counts = parts.map((part) => (/^\d+$/.test(part.trim()) ? Number(part) : 0));
  if (counts.length < 2 || counts.some((count) => count < 1 || count > MOST))
    throw new RecipeError(
      `--profile ${text}: four digits such as 2468, a list such as 2,4,6,12, or auto is expected, of 1 to ${MOST} experts`,
    );
  return counts;
}

/** What the profile gives block `index` of `blocks`. */
export function profileAt(profile: readonly number[], index: number, blocks: number): number {
  return profile[Math.floor((profile.length * index) / blocks)];
}

/** `total` experts in proportion to `weights`, within bounds: by largest remainder, of equal ones the last first. */
export function shareExperts(weights: readonly number[], total: number, least: number, most = Infinity): number[] {
  // Equal remainders go by name: the last block has the first.
  const nameOf = (i: number) => String(weights.length - i).padStart(6, '0');
  const vessels = weights.map((share, i) => ({ name: nameOf(i), share, cost: 1, least, most }));
  const counts = waterfill(vessels, total);
  return weights.map((_, i) => counts.get(nameOf(i))!);
}

export interface ExpertLayer extends AdaptedShape {
  readonly block: number;
}

export interface ExpertOptions {
  readonly profile: readonly number[];
  /** `auto`: importance of every block in the model, in place of the profile. */
  readonly importance?: readonly number[];
  readonly blocks: number;
  readonly routing: RoutedShape['routing'];
  readonly topK: number;
  /** Of every expert; absent: 8, or the largest with which every layer can have as many experts as a token goes through. */
  readonly rank?: number | undefined;
  readonly budget: SpendableBudget;
}

const USUAL_RANK = 8;
const LEAST_SOFT = 2;

/** Experts of every layer: the most that the budget allows, in the proportions of the profile. Throws RecipeError where not even the least fit. */
export function allocateExperts(layers: readonly ExpertLayer[], options: ExpertOptions): Map<string, RoutedShape> {
  const { profile, importance, blocks, routing, topK, budget } = options;
  const used = [...new Set(layers.map(({ block }) => block))].sort((a, b) => a - b);
  const weights = used.map((block) => (importance ? importance[block] : profileAt(profile, block, blocks)));
  // One expert leaves a router nothing to weigh.
  const least = routing === 'topk' ? topK : LEAST_SOFT;
  const most = importance ? Math.max(least, AUTO_MOST) : Infinity;
  const shapes = (counts: readonly number[], rank: number) =>
    new Map(
      layers.map(({ name, block }) => {
        const experts = counts[used.indexOf(block)];
        const shared = routing === 'soft';
        return [
          name,
          { routing, experts, topK: shared ? experts : Math.min(topK, experts), rank, sharedA: shared, sharedExpert: false },
        ];
      }),
    );
  const cost = (counts: readonly number[], rank: number): number => {
    const found = shapes(counts, rank);
    if (budget.unit === 'experts') return counts.reduce((sum, count) => sum + count, 0);
    return layers.reduce((sum, layer) => sum + expertCost(found.get(layer.name)!, layer, budget), 0);
  };
  const floor = used.map(() => least);
  const limit = Math.min(...layers.map(({ outFeatures, inFeatures }) => Math.min(outFeatures, inFeatures)));
  let rank = Math.min(options.rank ?? USUAL_RANK, limit);
  if (options.rank === undefined) while (rank > 1 && cost(floor, rank) > budget.total) rank--;
  if (cost(floor, rank) > budget.total)
    throw new RecipeError(
      `--budget: allows ${Math.floor(budget.total)}, and ${least} experts of rank ${rank} in each of ${layers.length} layers cost ${cost(floor, rank)}; adapt fewer with --targets`,
    );
  // More experts in all may cost less where they go to other blocks: every total is looked at that could be paid in the cheapest.
  const cheapest = Math.min(
    ...used.map(
      (_, i) =>
        cost(
          floor.map((count, k) => (k === i ? count + 1 : count)),
          rank,
        ) - cost(floor, rank),
    ),
  );
  const spare = Math.floor((budget.total - cost(floor, rank)) / cheapest + 1e-9);
  let best = floor;
  for (let more = 1; more <= Math.min(spare, MOST * used.length); more++) {
    const counts = shareExperts(weights, least * used.length + more, least, most);
    if (cost(counts, rank) <= budget.total) best = counts;
  }
  return shapes(best, rank);
}

/** What the experts of a layer cost, in the budget's unit. */
export function expertCost(shape: RoutedShape, layer: AdaptedShape, budget: SpendableBudget): number {
  return budget.unit === 'ranks' ? shape.experts * shape.rank : routedParameters(shape, layer);
}
