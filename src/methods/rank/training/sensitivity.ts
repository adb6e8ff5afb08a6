/** Sensitivity times uncertainty of every entry of a tensor (AdaLoRA, arXiv 2303.10512, eq. 8 to 10): what the loss loses without it, smoothed. */

const SENSITIVITY_DECAY = 0.85;
const UNCERTAINTY_DECAY = 0.85;

export class Sensitivity {
  readonly mean: Float32Array;
  readonly deviation: Float32Array;

  constructor(length: number) {
    this.mean = new Float32Array(length);
    this.deviation = new Float32Array(length);
  }

  /** Takes in one step: `I = |w g|`. */
  add(values: Float32Array, gradient: Float32Array): void {
    this.addImportance(values.map((value, i) => Math.abs(value * gradient[i])));
  }

  /** Takes in one step's I. The deviation is from the updated mean. */
  addImportance(importance: Float32Array): void {
    for (let i = 0; i < importance.length; i++) {
      const now = importance[i];
      this.mean[i] = SENSITIVITY_DECAY * this.mean[i] + (1 - SENSITIVITY_DECAY) * now;
      this.deviation[i] = UNCERTAINTY_DECAY * this.deviation[i] + (1 - UNCERTAINTY_DECAY) * Math.abs(now - this.mean[i]);
    }
  }

  at(i: number): number {
    return this.mean[i] * this.deviation[i];
  }
}
