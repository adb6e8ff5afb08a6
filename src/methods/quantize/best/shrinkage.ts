/**
 * Off-diagonal shrinkage of a Hessian (slim-llm 5.1): few tokens make correlations that are not there, and `H <- (1 - rho) H + rho diag(H)`
 * takes out as many as the oracle-approximating estimate says (Chen et al., arXiv 0907.4698, eq. 23).
 */

/** Least shrinkage, and most retries with twice as much when a matrix does not factor. */
export const LEAST_SHRINKAGE = 0.001;
/** Part of the mean diagonal that is always added, so that an exactly singular matrix factors. */
const JITTER = 1e-9;
/** A channel that is always zero counts as this part of the median channel: it sorts last, and survives waking up later. */
const DEAD_ENERGY = 1e-4;

/** `rho` for a Hessian (n, n) measured over `tokenCount` tokens; channels with a zero diagonal do not count. At least `LEAST_SHRINKAGE`. */
export function shrinkageOf(hessian: Float64Array, n: number, tokenCount: number): number {
  const reciprocal = new Float64Array(n);
  let p = 0;
  for (let j = 0; j < n; j++) {
    const energy = hessian[j * n + j];
    if (energy > 0) {
      reciprocal[j] = 1 / energy;
      p++;
    }
  }
  let t = 0;
  for (let i = 0; i < n; i++) {
    let row = 0;
    for (let j = 0; j < n; j++) {
      const value = hessian[i * n + j];
      row += value * value * reciprocal[j];
    }
    t += row * reciprocal[i];
  }
  if (t <= p) return 1;
  const rho = ((1 - 2 / p) * t + p * p) / ((tokenCount + 1 - 2 / p) * (t - p));
  return Math.min(1, Math.max(rho, LEAST_SHRINKAGE));
}

/** Shrinks `hessian` (n, n) in place, gives dead channels a little energy, and adds the jitter. Returns the dead channels. */
export function shrink(hessian: Float64Array, n: number, rho: number): number[] {
  const diagonal = Float64Array.from({ length: n }, (_, j) => hessian[j * n + j]);
  const keep = 1 - rho;
  for (let i = 0; i < n * n; i++) hessian[i] *= keep;
  const live = diagonal.filter((energy) => energy > 0).sort();
  const median = live.length > 0 ? live[live.length >> 1] : 1;
  const dead: number[] = [];
  const mean = diagonal.reduce((sum, energy) => sum + energy, 0) / n || 1;
  for (let j = 0; j < n; j++) {
    if (diagonal[j] === 0) dead.push(j);
    hessian[j * n + j] = (diagonal[j] || DEAD_ENERGY * median) + JITTER * mean;
  }
  return dead;
}
