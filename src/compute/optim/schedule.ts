/** Factors on a learning rate, update after update (gradients.md, section 7). `t` counts updates from 0. */

/** From 1 to `floor` over `updates` along half a cosine, after `warmUp` updates that rise linearly to 1. */
export function cosine(t: number, updates: number, options: { readonly floor?: number; readonly warmUp?: number } = {}): number {
  const { floor = 0, warmUp = 0 } = options;
  if (t < warmUp) return (t + 1) / (warmUp + 1);
  const part = Math.min(1, (t - warmUp) / Math.max(1, updates - warmUp));
  return floor + (1 - floor) * 0.5 * (1 + Math.cos(Math.PI * part));
}

/** The same again and again: the first period is `period` updates, each later one twice as long as the one before. */
export function cosineWithRestarts(t: number, period: number, floor: number): number {
  let [start, length] = [0, period];
  while (t >= start + length) {
    start += length;
    length *= 2;
  }
  return cosine(t - start, length, { floor });
}

/** Scales `gradient` in place so that its length is at most `most`. Returns the length it had. */
export function clipByNorm(gradient: Float64Array, most: number): number {
  let sum = 0;
  for (const value of gradient) sum += value * value;
  const norm = Math.sqrt(sum);
  const factor = Math.min(1, most / (norm + 1e-6));
  if (factor < 1) for (let i = 0; i < gradient.length; i++) gradient[i] *= factor;
  return norm;
}
