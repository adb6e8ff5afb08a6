/** DELLA's probabilities: `p = d - eps + 2 eps rank / (columns - 1)`, so that of each row the larger magnitudes are likelier to stay. */
import { RecipeError } from '../../errors.ts';
import type { KeepProbability } from './random-sparsifier.ts';
import { RowRanks } from './row-ranks.ts';
import { stretchLength } from './stretch.ts';

export const EPSILON = {
  type: 'number',
  summary:
    'how far the probability of being kept goes above and below the density, from the smallest magnitude of a row to the largest',
  default: 0.15,
  min: 0,
  perExpert: true,
} as const;

/** @throws RecipeError where a probability would leave (0, 1) */
export function magnitudeProbability(
  method: string,
  columns: number,
  density: readonly number[],
  epsilon: readonly number[],
): (KeepProbability | undefined)[] {
  const ranker = new RowRanks(columns);
  const ranks = new Uint32Array(stretchLength(columns));
  return density.map((d, k) => {
    if (d >= 1) return undefined;
    const [lowest, highest] = [d - epsilon[k], d + epsilon[k]];
    if (lowest <= 0 || highest >= 1)
      throw new RecipeError(
        `density ${d} with epsilon ${epsilon[k]}: ${method} keeps elements with probabilities from ${lowest} to ${highest}, which must lie within 0 and 1`,
      );
    if (columns === 1) return (_stretch, count, out) => void out.fill(d, 0, count);
    const step = (2 * epsilon[k]) / (columns - 1);
    return (stretch, count, out) => {
      for (let row = 0; row < count; row += columns) ranker.write(stretch.bits, row, ranks);
      for (let i = 0; i < count; i++) out[i] = lowest + step * ranks[i];
    };
  });
}
