/** From the logits of one row to a token. */
import type { Random } from '../compute/random.ts';

/** The likeliest; of equals the first. */
export function likeliestToken(logits: Float32Array): number {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

/** A token drawn from the softmax of `logits / temperature`. */
export function drawToken(logits: Float32Array, random: Random, temperature = 1): number {
  let most = Number.NEGATIVE_INFINITY;
  for (const value of logits) most = Math.max(most, value);
  let total = 0;
  for (const value of logits) total += Math.exp((value - most) / temperature);
  let left = random.nextFloat() * total;
  for (let j = 0; j < logits.length; j++) {
    left -= Math.exp((logits[j] - most) / temperature);
    if (left < 0) return j;
  }
  return logits.length - 1;
}
