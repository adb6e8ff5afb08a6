/** First-order optimizers over one flat array of parameters (gradients.md, section 7): state in float32, scalars in float64. */

export interface AdamOptions {
  readonly learningRate: number;
  readonly beta1?: number;
  readonly beta2?: number;
  readonly epsilon?: number;
  /** Decoupled from the gradient: AdamW. */
  readonly weightDecay?: number;
}

/** What a stopped run needs to go on as if nothing had happened. */
export interface AdamState {
  readonly step: number;
  readonly m: readonly number[];
  readonly v: readonly number[];
}

/** AdamW (Loshchilov and Hutter, arXiv 1711.05101); without decay, Adam. */
export class AdamW {
  readonly #options: Required<AdamOptions>;
  readonly #m: Float32Array;
  readonly #v: Float32Array;
  #step = 0;

  constructor(length: number, options: AdamOptions) {
    this.#options = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0, ...options };
    this.#m = new Float32Array(length);
    this.#v = new Float32Array(length);
  }

  /** Moves `parameters` in place. @param factor of the schedule, on the learning rate */
  step(parameters: Float32Array, gradient: Float64Array, factor = 1): void {
    const { beta1, beta2, epsilon, weightDecay, learningRate } = this.#options;
    const rate = learningRate * factor;
    this.#step++;
    const [unbias1, unbias2] = [1 - beta1 ** this.#step, 1 - beta2 ** this.#step];
    for (let i = 0; i < parameters.length; i++) {
      const g = gradient[i];
      const m = beta1 * this.#m[i] + (1 - beta1) * g;
      const v = beta2 * this.#v[i] + (1 - beta2) * g * g;
      this.#m[i] = m;
      this.#v[i] = v;
      parameters[i] = parameters[i] * (1 - rate * weightDecay) - (rate * (m / unbias1)) / (Math.sqrt(v / unbias2) + epsilon);
    }
  }

  get state(): AdamState {
    return { step: this.#step, m: Array.from(this.#m), v: Array.from(this.#v) };
  }

  restore({ step, m, v }: AdamState): void {
    this.#step = step;
    this.#m.set(m);
    this.#v.set(v);
  }
}
