/** LaMDA++ (Azizi et al., arXiv 2406.12832): more rank where a weight's spectrum is flat. The paper only names the analysis; the rule is pcomp's (adapters.md 5.4). */
import type { AdaptedShape, SpendableBudget } from './rank-budget.ts';

/** Rank of each fifth of the layers, from the flattest spectra to the steepest, in parts of the mean. */
const FIFTHS = [3 / 2, 5 / 4, 1, 3 / 4, 1 / 2];

export interface SpectralLayer extends AdaptedShape {
  /** Position in the model. */
  readonly block: number;
  /** `energy(k)`: part of the squared weights that k directions hold; up to `most`. */
  energy(rank: number): number;
  readonly most: number;
}

/** @param invert more rank where the spectrum is steep */
export function lamdaRanks(layers: readonly SpectralLayer[], budget: SpendableBudget, invert: boolean): Map<string, number> {
  let best: Map<string, number> | undefined;
  let order: readonly SpectralLayer[] = [];
  const cost = (ranks: ReadonlyMap<string, number>) =>
    layers.reduce((sum, layer) => sum + budget.cost(layer) * ranks.get(layer.name)!, 0);
  const most = Math.max(...layers.map((layer) => layer.most));
  for (let mean = 1; mean <= most; mean++) {
    const sorted = byFlatness(layers, mean, invert);
    const ranks = new Map(
      sorted.map((layer, i) => {
        const part = FIFTHS[Math.floor((FIFTHS.length * i) / sorted.length)];
        return [layer.name, Math.min(layer.most, Math.floor(mean * part + 0.5))];
      }),
    );
    if (cost(ranks) > budget.total) break;
    [best, order] = [ranks, sorted];
  }
  const ranks = best ?? new Map(layers.map(({ name }) => [name, 0]));
  if (order.length === 0) order = byFlatness(layers, 1, invert);
  // What is left, rank by rank in the same order.
  let room = budget.total - cost(ranks);
  for (let given = true; given; ) {
    given = false;
    for (const layer of order) {
      const rank = ranks.get(layer.name)!;
      if (rank >= layer.most || budget.cost(layer) > room + 1e-9) continue;
      ranks.set(layer.name, rank + 1);
      room -= budget.cost(layer);
      given = true;
    }
  }
  return ranks;
}

/** Layers by the energy of their first `rank` directions, counted between the least and the most of their own type. */
function byFlatness(layers: readonly SpectralLayer[], rank: number, invert: boolean): SpectralLayer[] {
  const energies = new Map(layers.map((layer) => [layer.name, layer.energy(Math.min(rank, layer.most))]));
  const ranges = new Map<string, [number, number]>();
  for (const { name } of layers) {
    const [low, high] = ranges.get(typeOf(name)) ?? [Infinity, -Infinity];
    const own = energies.get(name)!;
    ranges.set(typeOf(name), [Math.min(low, own), Math.max(high, own)]);
  }
  const relative = ({ name }: SpectralLayer): number => {
    const [low, high] = ranges.get(typeOf(name))!;
    return high > low ? (energies.get(name)! - low) / (high - low) : 0.5;
  };
  const sign = invert ? -1 : 1;
  return layers.toSorted(
    (a, b) => sign * (relative(a) - relative(b)) || a.block - b.block || (typeOf(a.name) < typeOf(b.name) ? -1 : 1),
  );
}

/** `q_proj` of `model.layers.0.self_attn.q_proj`. */
function typeOf(name: string): string {
  return name.slice(name.lastIndexOf('.') + 1);
}
