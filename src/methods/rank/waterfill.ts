/** A budget poured over layers in proportion to their shares, between floors and ceilings (adapters.md 4.2). */

export interface Vessel {
  readonly name: string;
  /** What it is entitled to, at least 0. */
  readonly share: number;
  /** Of one unit. */
  readonly cost: number;
  readonly least: number;
  readonly most: number;
}

/** Halvings of the interval of the level: past the last bit of float64. */
const BISECTIONS = 200;

/**
 * Units of each vessel: `clip(level * share / cost, least, most)` with the level that spends `total`, rounded down, and what that leaves by the
 * largest fraction, then by name. Shares of nothing at all are equal shares. Never above `total`, unless the floors are.
 */
export function waterfill(vessels: readonly Vessel[], total: number): Map<string, number> {
  const sum = vessels.reduce((all, { share }) => all + share, 0);
  const shares = vessels.map(({ share, cost }) => (sum > 0 ? share : cost));
  const at = (level: number, i: number): number => {
    const { cost, least, most } = vessels[i];
    return Math.min(most, Math.max(least, (level * shares[i]) / cost));
  };
  const spent = (level: number) => vessels.reduce((all, { cost }, i) => all + cost * at(level, i), 0);
  let [low, high] = [0, 1];
  while (spent(high) < total && high < 1e300) high *= 2;
  for (let step = 0; step < BISECTIONS; step++) {
    const middle = (low + high) / 2;
    if (spent(middle) <= total) low = middle;
    else high = middle;
  }
  // A level a rounding below a whole unit is that unit.
  const exact = vessels.map((_, i) => at(low, i));
  const units = exact.map((value) => Math.floor(value + 1e-9));
  let room = total - vessels.reduce((all, { cost }, i) => all + cost * units[i], 0);
  const order = vessels
    .map(({ name }, i) => ({ name, i, fraction: exact[i] - units[i] }))
    .sort((a, b) => b.fraction - a.fraction || (a.name < b.name ? -1 : 1));
  for (let poured = true; poured; ) {
    poured = false;
    for (const { i } of order) {
      const { cost, most } = vessels[i];
      if (units[i] + 1 > most || cost > room + 1e-9) continue;
      units[i]++;
      room -= cost;
      poured = true;
    }
  }
  return new Map(vessels.map(({ name }, i) => [name, units[i]]));
}
