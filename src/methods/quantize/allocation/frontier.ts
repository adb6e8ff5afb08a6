/** How the bits of one layer are best spent: its least predicted loss at every size, and the widths that reach it (slim-llm 5.6). */
import { RecipeError } from '../../../errors.ts';
import { follow, lastWithin, type ParetoProblem, paretoFront, type Trail } from './pareto.ts';

/** What the groups of a layer take at each width they may have. */
export interface LayerSizes {
  /** `sizes[g][k]`: what group g (stored order) takes at the k-th width, in whole bits of whatever the budget counts. Need not rise with the width. */
  readonly sizes: readonly ArrayLike<number>[];
  /** What the layer takes beyond its groups, by the widths of all of them: padding, lists. Whole bits, at least 0; absent: nothing. */
  rest?(bits: readonly number[]): number;
}

/** What each group of one layer costs at each width it may have. */
export interface LayerCosts extends LayerSizes {
  /** Candidate widths in bits, ascending. */
  readonly widths: readonly number[];
  /** `costs[g][k]`: predicted loss of group g (stored order) at `widths[k]`; Infinity where that width is not offered. */
  readonly costs: readonly ArrayLike<number>[];
  /** Widths must not rise from one group to the next, as layers with a transform are stored. */
  readonly monotone: boolean;
}

/** All sensible sizes of one layer. */
export interface Frontier {
  readonly layer: LayerCosts;
  /** Ascending, strictly, in the unit of the layer's sizes. Every one is attainable exactly. */
  readonly sizes: Float64Array;
  /** Descending, strictly: `costs[i]` is the least cost within `sizes[i]`. */
  readonly costs: Float64Array;
  /**
   * 0 when exact. Otherwise `costs[i]` is at most the true optimum of a budget smaller by `cell` per group. Where the layer has a `rest`, by the most
   * that is, too: it is added to plans that were the best without it.
   */
  readonly cell: number;
  /** Where ranks may be bought too: the part of each size that is codes, and the rank that the rest is. */
  readonly branches?: readonly { readonly codeSize: number; readonly rank: number }[];
}

/** One point of a frontier. */
export interface LayerPlan {
  readonly size: number;
  readonly cost: number;
  /** Width of every group, in bits, stored order. */
  readonly bits: number[];
}

/** A budget below everything that can be reached. */
export class BudgetError extends RecipeError {
  readonly budget: number;
  /** Smallest reachable total. */
  readonly least: number;
  /** Total beyond which nothing is gained. */
  readonly most: number;
  constructor(budget: number, least: number, most: number) {
    super(`a budget of ${budget} bits is below the smallest reachable ${least}; bits above ${most} gain nothing.`);
    this.budget = budget;
    this.least = least;
    this.most = most;
  }
}

/** Labels of one layer's search, all lists together: bounds a trail to 128 MiB. Real layers need far less and stay exact. */
const LABELS = 1 << 25;

/** The frontier of a layer. Widths of its points: `solveWithin(layer, size)`. Throws RangeError for malformed input. */
export function frontier(layer: LayerCosts): Frontier {
  const { sizes, costs, cell } = layer.rest ? solve(layer) : paretoFront(problemOf(layer));
  if (sizes.length === 0) throw new RangeError('the widths offered to a layer allow no plan.');
  return { layer, sizes, costs, cell };
}

/** The cheapest plan of a layer within a budget; budgets are in the unit of the layer's sizes. Throws BudgetError when none fits. */
export function solveWithin(layer: LayerCosts, budget: number): LayerPlan {
  const { sizes, costs, bitsOf } = solve(layer);
  const index = lastWithin(sizes, budget);
  if (index < 0) throw new BudgetError(budget, sizes[0], sizes[sizes.length - 1]);
  return { size: sizes[index], cost: costs[index], bits: bitsOf(index) };
}

/** The front of a layer, what is beyond its groups included, and the widths of its points. */
function solve(layer: LayerCosts): Pick<Frontier, 'sizes' | 'costs' | 'cell'> & { bitsOf(index: number): number[] } {
  const problem = problemOf(layer);
  const trail: Trail = [];
  const front = paretoFront(problem, trail);
  const bitsOf = (index: number) => follow(problem, trail, index).map((option) => layer.widths[option]);
  if (!layer.rest) return { ...front, bitsOf };
  const points = Array.from(front.sizes, (size, index) => ({
    index,
    size: size + layer.rest!(bitsOf(index)),
    cost: front.costs[index],
  }));
  points.sort((a, b) => a.size - b.size || a.cost - b.cost);
  let least = Infinity;
  const kept = points.filter(({ cost }) => {
    if (cost >= least) return false;
    least = cost;
    return true;
  });
  return {
    sizes: Float64Array.from(kept, ({ size }) => size),
    costs: Float64Array.from(kept, ({ cost }) => cost),
    cell: front.cell,
    bitsOf: (index) => bitsOf(kept[index].index),
  };
}

function problemOf({ widths, costs, sizes, monotone }: LayerCosts): ParetoProblem {
  if (costs.length !== sizes.length || costs.length === 0) {
    throw new RangeError(
      `a layer has costs of ${costs.length} groups and sizes of ${sizes.length}; both need the same, at least 1.`,
    );
  }
  const stages = costs.map((cost, g) => {
    const size = sizes[g];
    if (cost.length !== widths.length || size.length !== widths.length) {
      throw new RangeError(`group ${g} has ${cost.length} costs and ${size.length} sizes for ${widths.length} widths.`);
    }
    for (let k = 0; k < widths.length; k++) {
      if (!Number.isSafeInteger(size[k]) || size[k] < 0)
        throw new RangeError(`group ${g} takes ${size[k]} bits at width ${widths[k]}.`);
      if (!(cost[k] >= 0)) throw new RangeError(`group ${g} has a predicted loss of ${cost[k]} at width ${widths[k]}.`);
    }
    return { sizes: size, costs: cost };
  });
  const maxLabels = Math.max(256, Math.floor(LABELS / (stages.length * widths.length)));
  return { stages, monotone, maxLabels, band: Infinity };
}
