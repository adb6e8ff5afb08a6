/** The mean of the changes at each element over the experts that made one: the common part of RAM and RAM+. */
import type { MergeBlock, TensorMerge } from './merger.ts';

export const EPSILON = {
  type: 'number',
  summary: 'an element is changed where |delta| is above this',
  default: 1e-5,
  min: 0,
} as const;

/** @param uniqueFactors per expert, of an element that only it changed; asked for once, after the scans */
export function activeMean(epsilon: number, uniqueFactors: () => Float64Array, scans: TensorMerge['scans'] = []): TensorMerge {
  let factors: Float64Array | undefined;
  const merge = ({ base, experts, length }: MergeBlock): Float32Array => {
    factors ??= uniqueFactors();
    const result = new Float32Array(length);
    for (let i = 0; i < length; i++) {
      const origin = base![i];
      let sum = 0;
      let active = 0;
      let last = 0;
      for (let k = 0; k < experts.length; k++) {
        const change = experts[k][i] - origin;
        if (Math.abs(change) > epsilon) {
          sum += change;
          active++;
          last = k;
        }
      }
      if (active === 0) result[i] = origin;
      else result[i] = origin + (active === 1 ? factors[last] * sum : sum / active);
    }
    return result;
  };
  return { scans, merge };
}
