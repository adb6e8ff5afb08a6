/** Bits and ranks of one layer from one budget: a rank takes a part off whatever loss the widths leave (adapters.md 5.1, `--joint`). */
import type { Frontier } from './frontier.ts';
import { lowerHull } from './hull.ts';

/** What branches do for a layer. */
export interface Repair {
  /** `left[r]`: part of the loss that a branch of rank r leaves, from 1; does not rise. */
  readonly left: ArrayLike<number>;
  /** What one rank takes, in whole bits of whatever the frontier counts. */
  readonly rankSize: number;
}

/**
 * All sensible ways to spend on widths and ranks together. The parts that ranks leave were measured at one choice of widths and stand for all: errors
 * of other widths have about the same shape. Widths are those of the frontier's lower hull, on which every allocation moves.
 */
export function withRanks(frontier: Frontier, { left, rankSize }: Repair): Frontier {
  if (!Number.isSafeInteger(rankSize) || rankSize <= 0) throw new RangeError(`a rank takes ${rankSize} bits.`);
  const points = lowerHull(frontier.sizes, frontier.costs).flatMap((point) =>
    Array.from({ length: left.length }, (_, rank) => ({
      codeSize: frontier.sizes[point],
      rank,
      size: frontier.sizes[point] + rank * rankSize,
      cost: frontier.costs[point] * left[rank],
    })),
  );
  points.sort((a, b) => a.size - b.size || a.cost - b.cost || a.rank - b.rank);
  let least = Infinity;
  const kept = points.filter(({ cost }) => {
    if (cost >= least) return false;
    least = cost;
    return true;
  });
  return {
    layer: frontier.layer,
    sizes: Float64Array.from(kept, ({ size }) => size),
    costs: Float64Array.from(kept, ({ cost }) => cost),
    cell: frontier.cell,
    branches: kept.map(({ codeSize, rank }) => ({ codeSize, rank })),
  };
}
