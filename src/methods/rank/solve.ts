/** Who gets which rank within a budget: exactly where that is affordable, and how far from the best it can be at most (adapters.md 4.2). */
import { RecipeError } from '../../errors.ts';
import { greedyRanks, type RankChoices } from './greedy.ts';

export const SOLVERS = ['auto', 'greedy', 'dp'] as const;

/** What ranks may be, besides within the budget. */
export interface RankRules {
  /** `auto`: the better of the two, `dp` only where it is affordable. */
  readonly solver: (typeof SOLVERS)[number];
  /** Of every layer. */
  readonly least: number;
  /** Of every layer; absent: as many as there are gains. */
  readonly most?: number | undefined;
  /** Ranks are multiples of it. */
  readonly multiple: number;
}

/** A layer's choices; layers of one `tie` get one rank. */
export interface TiedChoices extends RankChoices {
  readonly tie?: string | undefined;
}

/** Ranks, and what they are worth. */
export interface SolvedRanks {
  readonly ranks: ReadonlyMap<string, number>;
  /** Which solver found them. */
  readonly solver: 'greedy' | 'dp';
  /** Sum of the gains. */
  readonly value: number;
  /** No ranks within the budget are worth more: the value where ranks could be cut into pieces. */
  readonly bound: number;
}

/** Steps of the dynamic programme that are affordable, and states of the budget in it. */
const MOST_STEPS = 5e8;
const MOST_STATES = 2 ** 16;

/** Throws RecipeError where the least rank of all costs more than there is, or `dp` is asked for and would take too long. */
export function solveRanks(layers: readonly TiedChoices[], total: number, rules: RankRules): SolvedRanks {
  const { least, most = Number.POSITIVE_INFINITY, multiple, solver } = rules;
  const groups = new Map<string, TiedChoices[]>();
  for (const layer of layers) {
    const key = layer.tie ?? layer.name;
    groups.set(key, [...(groups.get(key) ?? []), layer]);
  }
  const first = Math.ceil(least / multiple);
  const items = [...groups].map(([name, members]) => {
    const cost = multiple * members.reduce((sum, member) => sum + member.cost, 0);
    const ranks = Math.min(most, Math.max(...members.map(({ gains }) => gains.length)));
    const gains = Array.from({ length: Math.max(first, Math.floor(ranks / multiple)) }, (_, item) => {
      let sum = 0;
      for (const own of members)
        for (let k = item * multiple; k < (item + 1) * multiple; k++) sum += k < own.gains.length ? own.gains[k] : 0;
      return sum;
    });
    return { name, cost, gains };
  });
  const mandatory = items.reduce((sum, { cost }) => sum + first * cost, 0);
  if (mandatory > total)
    throw new RecipeError(
      `--r-min ${least}: costs ${mandatory} in all ${layers.length} layers, and the budget is ${Math.floor(total)}`,
    );
  const certain = items.reduce((sum, { gains }) => sum + sumOf(gains, first), 0);
  const free = items.map((item) => ({ ...item, gains: item.gains.slice(first) }));
  const found = solveItems(free, total - mandatory, solver);
  return {
    ranks: new Map(
      [...groups].flatMap(([name, members]) =>
        members.map((member): [string, number] => [member.name, multiple * (first + found.ranks.get(name)!)]),
      ),
    ),
    solver: found.solver,
    value: certain + found.value,
    bound: certain + fractionalValue(free, total - mandatory),
  };
}

function solveItems(
  items: readonly RankChoices[],
  total: number,
  solver: RankRules['solver'],
): { ranks: ReadonlyMap<string, number>; solver: 'greedy' | 'dp'; value: number } {
  const greedy = greedyRanks(items, total);
  const worth = (ranks: ReadonlyMap<string, number>) =>
    items.reduce((sum, { name, gains }) => sum + sumOf(gains, ranks.get(name)!), 0);
  if (solver === 'greedy') return { ranks: greedy, solver: 'greedy', value: worth(greedy) };
  const unit = unitOf(items, total);
  const states = Math.floor(total / unit) + 1;
  const steps = items.reduce((sum, { gains }) => sum + gains.length, 0) * states;
  if (steps > MOST_STEPS) {
    if (solver === 'dp')
      throw new RecipeError(`--solver dp: takes ${steps} steps here, and ${MOST_STEPS} are allowed; auto and greedy take few`);
    return { ranks: greedy, solver: 'greedy', value: worth(greedy) };
  }
  const exact = knapsackRanks(items, states, unit);
  const better = worth(exact) > worth(greedy);
  return better || solver === 'dp'
    ? { ranks: exact, solver: 'dp', value: worth(exact) }
    : { ranks: greedy, solver: 'greedy', value: worth(greedy) };
}

/** The greatest measure of all costs; a coarser one where that would make too many states, so that costs are rounded up to it. */
function unitOf(items: readonly RankChoices[], total: number): number {
  const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));
  const measure = items.reduce((common, { cost }) => gcd(common, cost), 0);
  const whole = Number.isInteger(measure) && measure > 0;
  return whole && total / measure <= MOST_STATES ? measure : Math.max(Number.MIN_VALUE, total / MOST_STATES);
}

/** Multiple-choice knapsack: for every layer and every budget in units the best rank, then back from the whole budget. */
function knapsackRanks(items: readonly RankChoices[], states: number, unit: number): Map<string, number> {
  let best = new Float64Array(states);
  const chosen: Uint16Array[] = [];
  for (const { cost, gains } of items) {
    const size = Math.ceil(cost / unit - 1e-9);
    const next = best.slice();
    const choice = new Uint16Array(states);
    let value = 0;
    for (let rank = 1; rank <= gains.length && rank * size < states; rank++) {
      value += gains[rank - 1];
      const taken = rank * size;
      for (let state = taken; state < states; state++) {
        const sum = best[state - taken] + value;
        if (sum > next[state]) {
          next[state] = sum;
          choice[state] = rank;
        }
      }
    }
    best = next;
    chosen.push(choice);
  }
  const ranks = new Map<string, number>();
  let state = states - 1;
  for (let i = items.length - 1; i >= 0; i--) {
    const rank = chosen[i][state];
    ranks.set(items[i].name, rank);
    state -= rank * Math.ceil(items[i].cost / unit - 1e-9);
  }
  return ranks;
}

/** The best gains for their cost, the last in part. Gains do not rise, so that none comes before what it stands on. */
function fractionalValue(items: readonly RankChoices[], total: number): number {
  const all = items.flatMap(({ cost, gains }) => Array.from(gains, (gain) => ({ cost, gain })));
  all.sort((a, b) => b.gain / b.cost - a.gain / a.cost);
  let [left, value] = [total, 0];
  for (const { cost, gain } of all) {
    if (gain <= 0 || left <= 0) break;
    value += gain * Math.min(1, left / cost);
    left -= cost;
  }
  return value;
}

function sumOf(gains: ArrayLike<number>, count: number): number {
  let sum = 0;
  for (let k = 0; k < count; k++) sum += gains[k] ?? 0;
  return sum;
}
