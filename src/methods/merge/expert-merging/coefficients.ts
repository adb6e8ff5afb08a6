/**
 * The numbers that Expert Merging learns (merging.md 6.1): one coefficient per tensor, expert and chunk. The merged tensor is
 * `start + sum_k sum_s alpha_ks tau_k[chunk s]`.
 */
import type { ChunkBounds } from './chunks.ts';

/** A tensor whose coefficients are learned. Without chunks (the published floor rule gives some tensors none) it keeps the anchor. */
export interface LearnedTensor {
  readonly name: string;
  readonly bounds: ChunkBounds;
}

/** `linear`: the coefficient itself, clamped. `sigmoid`: its logit, so that it stays between 0 and 1. */
export type Parametrization = 'linear' | 'sigmoid';

export interface CoefficientRules {
  readonly parametrization: Parametrization;
  /** Where coefficients start, and what the regularizer pulls them to. */
  readonly anchor: number;
  /** Linear only: least and greatest coefficient. */
  readonly range: readonly [number, number];
  /** One coefficient of an expert for all tensors, which have one chunk each. */
  readonly shared?: boolean;
}

export class Coefficients {
  readonly tensors: readonly LearnedTensor[];
  readonly expertCount: number;
  readonly rules: CoefficientRules;
  /** What the optimizer moves: tensor after tensor, expert after expert, chunk after chunk. */
  readonly parameters: Float32Array;
  readonly #starts: readonly number[];

  constructor(tensors: readonly LearnedTensor[], expertCount: number, rules: CoefficientRules) {
    this.tensors = tensors;
    this.expertCount = expertCount;
    this.rules = rules;
    let length = rules.shared ? expertCount : 0;
    this.#starts = tensors.map(({ bounds }) => {
      if (rules.shared) return 0;
      const start = length;
      length += expertCount * (bounds.length - 1);
      return start;
    });
    const { parametrization, anchor } = rules;
    this.parameters = new Float32Array(length).fill(parametrization === 'linear' ? anchor : Math.log(anchor / (1 - anchor)));
  }

  /** Chunks of all tensors, those without elements included. */
  get chunkCount(): number {
    if (this.rules.shared) return 1;
    return this.tensors.reduce((sum, { bounds }) => sum + bounds.length - 1, 0);
  }

  /** Coefficients of an expert in a tensor, a chunk each; a tensor without chunks has one, the anchor. */
  of(tensor: number, expert: number): number[] {
    const chunks = this.tensors[tensor].bounds.length - 1;
    if (chunks === 0) return [this.rules.anchor];
    return Array.from({ length: chunks }, (_, s) => this.#value(this.index(tensor, expert, s)));
  }

  /** Place of a coefficient in `parameters`. */
  index(tensor: number, expert: number, chunk: number): number {
    return this.#starts[tensor] + expert * (this.tensors[tensor].bounds.length - 1) + chunk;
  }

  /** Sets coefficients of an expert in a tensor. */
  set(tensor: number, expert: number, values: readonly number[]): void {
    const { parametrization } = this.rules;
    values.forEach((value, s) => {
      this.parameters[this.index(tensor, expert, s)] = parametrization === 'linear' ? value : Math.log(value / (1 - value));
    });
  }

  /** The chain rule from coefficients to parameters, in place: `d alpha / d w` is 1, or `alpha (1 - alpha)`. */
  toParameters(gradient: Float64Array): Float64Array {
    if (this.rules.parametrization === 'linear') return gradient;
    for (let i = 0; i < gradient.length; i++) {
      const alpha = this.#value(i);
      gradient[i] *= alpha * (1 - alpha);
    }
    return gradient;
  }

  /**
   * `gamma sum |alpha - anchor| / chunks`, the form of the released code: K times the printed one. Adds its derivative by the coefficients
   * to `gradient`; at the anchor that is 0, so that the first step is pure alignment.
   */
  regularize(gamma: number, gradient: Float64Array): number {
    const scale = this.chunkCount === 0 ? 0 : gamma / this.chunkCount;
    let sum = 0;
    const { anchor } = this.rules;
    for (let i = 0; i < gradient.length; i++) {
      // In float32, as parameters are: a coefficient that has not moved is at the anchor exactly.
      const away = this.parameters[i] === this.#anchorParameter ? 0 : this.#value(i) - anchor;
      sum += Math.abs(away);
      gradient[i] += scale * Math.sign(away);
    }
    return scale * sum;
  }

  /** Keeps linear coefficients in their range. Returns how many were out of it. */
  clamp(): number {
    if (this.rules.parametrization !== 'linear') return 0;
    const [least, most] = this.rules.range;
    let hits = 0;
    for (let i = 0; i < this.parameters.length; i++) {
      const value = this.parameters[i];
      if (value >= least && value <= most) continue;
      this.parameters[i] = Math.min(most, Math.max(least, value));
      hits++;
    }
    return hits;
  }

  get #anchorParameter(): number {
    const { parametrization, anchor } = this.rules;
    return Math.fround(parametrization === 'linear' ? anchor : Math.log(anchor / (1 - anchor)));
  }

  #value(i: number): number {
    const parameter = this.parameters[i];
    return this.rules.parametrization === 'linear' ? parameter : 1 / (1 + Math.exp(-parameter));
  }
}

/** `<gradient[chunk], taskVector[chunk]>` for every chunk, summed in float64: the derivative of the loss by the coefficients. */
export function chunkProducts(bounds: ChunkBounds, gradient: Float32Array, taskVector: Float32Array): Float64Array {
  const products = new Float64Array(bounds.length - 1);
  for (let s = 0; s < products.length; s++) {
    let sum = 0;
    const end = bounds[s + 1];
    for (let i = bounds[s]; i < end; i++) sum += gradient[i] * taskVector[i];
    products[s] = sum;
  }
  return products;
}

/** Adds `coefficient[chunk] * taskVector` to `target`, in place. One coefficient for all elements when there are no chunks. */
export function addScaled(
  target: Float32Array,
  bounds: ChunkBounds,
  coefficients: readonly number[],
  taskVector: Float32Array,
): void {
  if (bounds.length <= 2) {
    const [coefficient] = coefficients;
    for (let i = 0; i < target.length; i++) target[i] += coefficient * taskVector[i];
    return;
  }
  for (let s = 0; s + 1 < bounds.length; s++) {
    const coefficient = coefficients[s];
    for (let i = bounds[s]; i < bounds[s + 1]; i++) target[i] += coefficient * taskVector[i];
  }
}

/** `<update, tau> / |tau|^2`: how much of an expert is in a merged tensor, 0 for an expert that did not change it (merging.md 6.6). */
export function effectiveCoefficient(update: Float32Array, taskVector: Float32Array): number {
  let [product, square] = [0, 0];
  for (let i = 0; i < update.length; i++) {
    product += update[i] * taskVector[i];
    square += taskVector[i] * taskVector[i];
  }
  return square === 0 ? 0 : product / square;
}
