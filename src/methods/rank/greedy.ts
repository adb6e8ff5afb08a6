/** Ranks bought one by one, the most gain for its cost first (adapters.md 4.2). */

export interface RankChoices {
  readonly name: string;
  /** Of one rank. */
  readonly cost: number;
  /** What each rank adds; not rising. */
  readonly gains: ArrayLike<number>;
}

/**
 * Exact for equal costs; else what is lost is at most the gain of the first rank that did not fit. A rank that does not fit ends its layer's turn;
 * the others go on. Ties go to the layer whose name comes first.
 */
export function greedyRanks(layers: readonly RankChoices[], total: number): Map<string, number> {
  const items = layers.flatMap(({ name, cost, gains }) =>
    Array.from({ length: gains.length }, (_, k) => ({ name, k, cost, value: gains[k] / cost })),
  );
  items.sort((a, b) => b.value - a.value || (a.name < b.name ? -1 : a.name > b.name ? 1 : a.k - b.k));
  const ranks = new Map(layers.map(({ name }) => [name, 0]));
  const closed = new Set<string>();
  let spent = 0;
  for (const { name, k, cost, value } of items) {
    // Out of turn: gains that rise would be bought before what they stand on.
    if (closed.has(name) || k !== ranks.get(name) || value <= 0) continue;
    if (spent + cost > total) {
      closed.add(name);
      continue;
    }
    spent += cost;
    ranks.set(name, k + 1);
  }
  return ranks;
}
