/** A tensor that is trained: its values beside their gradient and AdamW's moments, so that it can grow, shrink, freeze and be saved as a whole. */

export interface AdamRules {
  readonly beta1: number;
  readonly beta2: number;
  readonly epsilon: number;
  /** Decoupled from the gradient. */
  readonly weightDecay: number;
}

export const ADAM: AdamRules = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0 };

export class Parameter {
  readonly shape: readonly number[];
  readonly values: Float32Array;
  /** Summed up by whoever computes it; `update` leaves it alone. */
  readonly gradient: Float32Array;
  readonly first: Float32Array;
  readonly second: Float32Array;
  /** 1: the value stays, without gradient, moments or decay. Absent: all train. */
  frozen: Uint8Array | undefined;
  /** Update after which it came to be: 0 for what is there from the start. Moments are unbiased, and warm-up counted, from there. */
  readonly born: number;

  constructor(shape: readonly number[], values: Float32Array, born = 0) {
    const length = shape.reduce((product, dim) => product * dim, 1);
    if (length !== values.length) throw new RangeError(`${values.length} values for the shape ${shape.join(' x ')}`);
    this.shape = shape;
    this.values = values;
    this.gradient = new Float32Array(length);
    this.first = new Float32Array(length);
    this.second = new Float32Array(length);
    this.born = born;
  }

  /** One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101). @param step counted from 1 over the whole run */
  update(step: number, rate: number, { beta1, beta2, epsilon, weightDecay }: AdamRules = ADAM): void {
    const { values, gradient, first, second, frozen } = this;
    const age = step - this.born;
    const [unbias1, unbias2] = [1 - beta1 ** age, 1 - beta2 ** age];
    for (let i = 0; i < values.length; i++) {
      if (frozen?.[i]) {
        first[i] = 0;
        second[i] = 0;
        continue;
      }
      const g = gradient[i];
      const m = beta1 * first[i] + (1 - beta1) * g;
      const v = beta2 * second[i] + (1 - beta2) * g * g;
      first[i] = m;
      second[i] = v;
      values[i] = values[i] * (1 - rate * weightDecay) - (rate * (m / unbias1)) / (Math.sqrt(v / unbias2) + epsilon);
    }
  }
}
