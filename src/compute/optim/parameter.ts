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
  /**
   * Update after which it came to be, for all values or one by one: 0 for what is there from the start. The next is the first that moves it; moments are
   * unbiased, and warm-up counted, from there.
   */
  readonly born: number | Int32Array;

  constructor(shape: readonly number[], values: Float32Array, born: number | Int32Array = 0) {
    const length = shape.reduce((product, dim) => product * dim, 1);
    if (length !== values.length) throw new RangeError(`${values.length} values for the shape ${shape.join(' x ')}`);
    this.shape = shape;
    this.values = values;
    this.gradient = new Float32Array(length);
    this.first = new Float32Array(length);
    this.second = new Float32Array(length);
    this.born = born;
  }

  /**
   * One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101).
   * @param step counted from 1 over the whole run; @param rate one for all, or by the update after which a value came to be
   */
  update(step: number, rate: number | ((born: number) => number), rules: AdamRules = ADAM): void {
    const { beta1, beta2, epsilon, weightDecay } = rules;
    const { values, gradient, first, second, frozen, born } = this;
    const factors = new Map<number, StepFactors>();
    const of = (birth: number): StepFactors => {
      const age = step - birth;
      const made = {
        rate: typeof rate === 'number' ? rate : rate(birth),
        unbias1: 1 - beta1 ** age,
        unbias2: 1 - beta2 ** age,
      };
      factors.set(birth, made);
      return made;
    };
    let birth = -1;
    let { rate: own, unbias1, unbias2 } = { rate: 0, unbias1: 1, unbias2: 1 };
    for (let i = 0; i < values.length; i++) {
      const at = typeof born === 'number' ? born : born[i];
      if (at >= step) continue;
      if (at !== birth) {
        ({ rate: own, unbias1, unbias2 } = factors.get(at) ?? of(at));
        birth = at;
      }
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
      values[i] = values[i] * (1 - own * weightDecay) - (own * (m / unbias1)) / (Math.sqrt(v / unbias2) + epsilon);
    }
  }

  /**
   * The same matrix of another size (rows, columns), or vector, with moments, gradient and what is frozen: cut, or filled up from `fresh`, values of the
   * new shape, as born after update `born`.
   */
  resized(shape: readonly number[], fresh?: { readonly values: Float32Array; readonly born: number }): Parameter {
    const [rows, columns] = sides(shape);
    const [oldRows, oldColumns] = sides(this.shape);
    const births = new Int32Array(rows * columns).fill(fresh?.born ?? 0);
    const made = new Parameter(shape, fresh?.values.slice() ?? new Float32Array(rows * columns), births);
    if (this.frozen) made.frozen = new Uint8Array(rows * columns);
    for (let i = 0; i < Math.min(rows, oldRows); i++) {
      for (let j = 0; j < Math.min(columns, oldColumns); j++) {
        const [to, from] = [i * columns + j, i * oldColumns + j];
        for (const part of ['values', 'gradient', 'first', 'second'] as const) made[part][to] = this[part][from];
        births[to] = typeof this.born === 'number' ? this.born : this.born[from];
        if (made.frozen) made.frozen[to] = this.frozen![from];
      }
    }
    return made;
  }
}

interface StepFactors {
  readonly rate: number;
  readonly unbias1: number;
  readonly unbias2: number;
}

function sides(shape: readonly number[]): readonly [number, number] {
  return shape.length === 1 ? [1, shape[0]] : [shape[0], shape[1]];
}
