/**
 * The trade-off between total size and total cost of a sequence of picks, one per stage: a dynamic programme over labels. A label is an
 * attainable (size, cost) of the stages so far; only labels that no other undercuts in both are kept, so what is left at the end is the
 * whole Pareto front.
 */

/** One pick to make: `sizes[k]` (whole numbers) and `costs[k]` of its k-th option. An infinite cost says the option is not offered. */
export interface Stage {
  readonly sizes: ArrayLike<number>;
  readonly costs: ArrayLike<number>;
}

export interface ParetoProblem {
  readonly stages: readonly Stage[];
  /** Picks must not rise from one stage to the next; every stage then has the same number of options. */
  readonly monotone: boolean;
  /**
   * Labels a list may hold. A merge that could pass it is thinned: sizes are cut into cells, a fixed grid, and each cell keeps its cheapest
   * label, with its exact size. The least size and the least cost always stay.
   */
  readonly maxLabels: number;
  /** Labels whose size leaves [-band, band] on the way are dropped. Infinity: none are. */
  readonly band: number;
}

export interface ParetoFront {
  /** Ascending, strictly. */
  readonly sizes: Float64Array;
  /** Descending, strictly: `costs[i]` is the least cost found within `sizes[i]`. */
  readonly costs: Float64Array;
  /**
   * Width of the cells lists were thinned with; 0 when none was and the front is exact. A plan's cost is at most that of any plan smaller
   * by `stages.length * cell`: each stage may swap a label for a cheaper one of the same cell.
   */
  readonly cell: number;
  /** Labels looked at: what the search cost. */
  readonly work: number;
}

/** How every label of every list came about, `[stage][option]`: see `follow`. */
export type Trail = Int32Array[][];

interface Labels {
  readonly sizes: Float64Array;
  readonly costs: Float64Array;
  /** Of each label: its index in the list of the next wider option, or, as ~index, in the previous stage's list, this option picked. */
  readonly from: Int32Array;
}

const NOTHING: Labels = { sizes: new Float64Array(0), costs: new Float64Array(0), from: new Int32Array(0) };
const START: Labels = { sizes: new Float64Array(1), costs: new Float64Array(1), from: new Int32Array(1) };

/**
 * The front of a problem. List k of a stage holds the prefixes whose last pick is k or more: those of list k + 1, and those that pick k
 * now after a prefix of the previous stage's list k (monotone) or list 0 (free). So every list is one merge of two sorted ones.
 * @param trail filled for `follow` when given
 */
export function paretoFront(problem: ParetoProblem, trail?: Trail): ParetoFront {
  const { stages, monotone, maxLabels, band } = problem;
  const cell = cellOf(problem);
  let lists: Labels[] = [];
  let thinned = false;
  let work = 0;
  stages.forEach(({ sizes, costs }, stage) => {
    const next = new Array<Labels>(sizes.length);
    let list = NOTHING;
    for (let k = sizes.length - 1; k >= 0; k--) {
      const before = stage === 0 ? START : lists[monotone ? k : 0];
      const picked = Number.isFinite(costs[k]) ? before : NOTHING;
      const labels = list.sizes.length + picked.sizes.length;
      const merged = merge(list, picked, sizes[k], costs[k], labels > maxLabels ? cell : 1, band);
      work += labels;
      thinned ||= merged.thinned;
      next[k] = list = merged.labels;
    }
    trail?.push(next.map(({ from }) => from));
    lists = next;
  });
  const { sizes, costs } = stages.length === 0 ? START : lists[0];
  return { sizes, costs, cell: thinned ? cell : 0, work };
}

/** The pick of every stage that led to point `index` of the front. */
export function follow({ stages, monotone }: ParetoProblem, trail: Trail, index: number): number[] {
  const picks = new Array<number>(stages.length);
  let option = 0;
  let at = index;
  for (let stage = stages.length - 1; stage >= 0; ) {
    const from = trail[stage][option][at];
    if (from >= 0) {
      option += 1;
      at = from;
    } else {
      picks[stage] = option;
      at = ~from;
      if (!monotone) option = 0;
      stage -= 1;
    }
  }
  return picks;
}

/** Index of the last of the ascending `sizes` within `limit`; -1 when even the first is above. */
export function lastWithin(sizes: ArrayLike<number>, limit: number): number {
  let low = -1;
  let high = sizes.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sizes[middle] <= limit) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** The finest whole cell that keeps every list within `maxLabels`. */
function cellOf({ stages, maxLabels, band }: ParetoProblem): number {
  let range = 0;
  for (const { sizes, costs } of stages) {
    let least = Infinity;
    let most = -Infinity;
    for (let k = 0; k < sizes.length; k++) {
      if (!Number.isFinite(costs[k])) continue;
      least = Math.min(least, sizes[k]);
      most = Math.max(most, sizes[k]);
    }
    if (most > least) range += most - least;
  }
  return Math.max(1, Math.ceil(Math.min(range, 2 * band) / maxLabels));
}

/** The Pareto front of the labels of `a` and those of `b` moved by (size, cost), thinned to cells. On a tie `b` wins: the first of equal options. */
function merge(
  a: Labels,
  b: Labels,
  size: number,
  cost: number,
  cell: number,
  band: number,
): { labels: Labels; thinned: boolean } {
  const aSizes = a.sizes;
  const aCosts = a.costs;
  const bSizes = b.sizes;
  const bCosts = b.costs;
  const aEnd = aSizes.length;
  let bEnd = bSizes.length;
  let i = 0;
  let j = 0;
  while (j < bEnd && bSizes[j] + size < -band) j++;
  while (bEnd > j && bSizes[bEnd - 1] + size > band) bEnd--;
  const sizes = new Float64Array(aEnd + bEnd - j);
  const costs = new Float64Array(aEnd + bEnd - j);
  const from = new Int32Array(aEnd + bEnd - j);
  let count = 0;
  let least = Infinity;
  let cellEnd = -Infinity;
  let thinned = false;
  while (i < aEnd || j < bEnd) {
    const aSize = i < aEnd ? aSizes[i] : Infinity;
    const bSize = j < bEnd ? bSizes[j] + size : Infinity;
    let labelSize = aSize;
    let labelCost: number;
    let origin: number;
    if (aSize < bSize || (aSize === bSize && aCosts[i] < bCosts[j] + cost)) {
      labelCost = aCosts[i];
      origin = i++;
    } else {
      labelSize = bSize;
      labelCost = bCosts[j] + cost;
      origin = ~j++;
    }
    if (labelCost >= least) continue;
    least = labelCost;
    if (labelSize >= cellEnd) cellEnd = (Math.floor(labelSize / cell) + 1) * cell;
    else if (count > 1) {
      count--;
      thinned = true;
    }
    sizes[count] = labelSize;
    costs[count] = labelCost;
    from[count] = origin;
    count++;
  }
  const trim = count < sizes.length;
  const labels = trim
    ? { sizes: sizes.slice(0, count), costs: costs.slice(0, count), from: from.slice(0, count) }
    : { sizes, costs, from };
  return { labels, thinned };
}
