/** Which tensors get more chunks: importance of each, and the budget of chunks shared out by it (merging.md 6.6). */

/** What a tensor's importance is made of. */
export interface TensorWeight {
  /** Coefficient of each expert. */
  readonly coefficients: readonly number[];
  /** Mean |task vector| of each expert. */
  readonly magnitudes: readonly number[];
  readonly elements: number;
  /** Most chunks that the tensor can be cut into. */
  readonly limit: number;
}

export interface ChunkBudget {
  /** Mean chunks per tensor. */
  readonly perTensor: number;
  /** Shares go by importance to this power. */
  readonly sharpness: number;
}

/** `J = sum_k |a_k| mean|tau_k| n`, not normalized. */
export function importanceOf({ coefficients, magnitudes, elements }: TensorWeight): number {
  return coefficients.reduce((sum, coefficient, k) => sum + Math.abs(coefficient) * magnitudes[k] * elements, 0);
}

/** `p = I^sharpness / sum I^sharpness`; all alike when nothing is important. */
function sharesOf(tensors: readonly TensorWeight[], sharpness: number): number[] {
  const importances = tensors.map(importanceOf);
  const total = importances.reduce((sum, value) => sum + value, 0);
  const powers = total > 0 ? importances.map((value) => (value / total) ** sharpness) : importances.map(() => 1);
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** `floor(budget share)`, as published: many tensors get none, and keep a constant coefficient. */
export function floorChunks(tensors: readonly TensorWeight[], { perTensor, sharpness }: ChunkBudget): number[] {
  const budget = perTensor * tensors.length;
  return sharesOf(tensors, sharpness).map((share, l) => Math.min(Math.floor(budget * share), tensors[l].limit));
}

/** One chunk each, and the rest of the budget by largest remainder: it is spent to the last chunk that any tensor has room for. */
export function evenChunks(tensors: readonly TensorWeight[], { perTensor, sharpness }: ChunkBudget): number[] {
  const chunks = tensors.map(() => 1);
  let left = Math.max(tensors.length, Math.floor(perTensor * tensors.length + 0.5)) - tensors.length;
  // Who is full passes its surplus on.
  while (left > 0) {
    const open = tensors.map((_, l) => l).filter((l) => chunks[l] < tensors[l].limit);
    if (open.length === 0) break;
    const extra = largestRemainder(
      left,
      sharesOf(
        open.map((l) => tensors[l]),
        sharpness,
      ),
    );
    for (const [i, l] of open.entries()) {
      const taken = Math.min(extra[i], tensors[l].limit - chunks[l]);
      chunks[l] += taken;
      left -= taken;
    }
  }
  return chunks;
}

/** Whole numbers near `total * shares` that sum to `total`; ties go to the lower index. */
export function largestRemainder(total: number, shares: readonly number[]): number[] {
  const whole = shares.map((share) => Math.floor(total * share));
  const missing = total - whole.reduce((sum, value) => sum + value, 0);
  const order = shares.map((_, i) => i).sort((a, b) => remainder(b) - remainder(a) || a - b);
  for (const i of order.slice(0, missing)) whole[i]++;
  return whole;

  function remainder(i: number): number {
    return total * shares[i] - Math.floor(total * shares[i]);
  }
}
