/** Which ranks of a task vector Model Breadcrumbs keeps. */
import type { RankBand } from './largest.ts';

export const GAMMA = {
  type: 'number',
  summary: 'share of each task vector that is dropped as outliers, from the largest magnitude down',
  default: 0.01,
  min: 0,
  max: 1,
  perExpert: true,
} as const;

/** Where density and gamma together ask for more than there is, fewer outliers are dropped. Undefined keeps everything. */
export function middleBand(n: number, density: number, gamma: number): RankBand | undefined {
  if (density >= 1) return undefined;
  const keep = Math.floor(density * n);
  return { drop: Math.min(Math.floor(gamma * n), n - keep), keep };
}
