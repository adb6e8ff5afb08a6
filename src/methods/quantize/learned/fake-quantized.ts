/**
 * A quantized linear layer that is being learned: float parameters behind its codes and grids, and the derivative through the rounding
 * (gradients.md, section 4). With W in stored order, per row and group of Q + 1 levels:
 *
 *     u = W / s + z + V,   c = clip(round(u), 0, Q),   Wq = s (c - z)
 *
 * and straight through the rounding: inside, dWq/ds = c - z - W / s, dWq/dV = s; where c is clipped, dWq/ds = c - z, dWq/dz = -s.
 */
import { Parameter } from '../../../compute/optim/parameter.ts';
import { storedGrid } from '../grid.ts';
import { transformActivation, transformColumns, untransformRow } from '../input-transform.ts';
import { addBranch } from '../low-rank.ts';
import type { QuantizedLinear } from '../quantized-linear.ts';

/** What of a group's grid is learned. */
export type GridRule =
  /** One factor on the scale, by its logarithm: it starts at 1, the zero point stays. */
  | 'scale'
  /** A factor on each end of the start's range, from 1: the zero point follows. */
  | 'ends'
  /** The same on the range of the weights themselves, `sigmoid(beta)`, beta from 4 (OmniQuant's learnable clipping). */
  | 'clipping';

export interface LearningRules {
  readonly grid: GridRule;
  /** Whether each weight's rounding is learned. */
  readonly rounding: boolean;
}

/** Start of learnable clipping: sigmoid(4) = 0.982. */
const CLIPPING_START = 4;
/** Least and most that an end of the range may become, as a part of what it is. */
const LEAST_FACTOR = 0.1;
const LARGEST_FACTOR = 1.5;
/** How far a code that is not the nearest one starts from the edge of its cell, in steps. */
const EDGE = 0.01;
/** Most that a rounding is learned to depart from where it starts, in steps. */
const LARGEST_OFFSET = 0.5;
/** Adding and subtracting it rounds a float64 below 2^51 to a whole number, halves to even. */
const WHOLE = 1.5 * 2 ** 52;

/** One group's grid as the parameters have it, and the way back from it to them. */
interface LearnedGrid {
  scale: number;
  zero: number;
  /** The zero point is cut off at an end of the codes: nothing moves it. */
  fixed: boolean;
  high: number;
  low: number;
}

export class FakeQuantizedLinear {
  readonly start: QuantizedLinear;
  readonly #rules: LearningRules;
  readonly #rows: number;
  readonly #columns: number;
  readonly #groups: number;
  /** W (rows, columns) in stored order, less what a branch beside the codes adds. */
  readonly #weight: Float32Array;
  /** Offsets that make the start's codes of W; absent: they are the nearest. */
  readonly #offsets: Float32Array | undefined;
  /** (rows, groups); of 'scale' the start's scale and zero point, else the ends of the range that factors are on. */
  readonly #first: Float64Array;
  readonly #second: Float64Array;
  /** V, (rows, columns), beside the start's offsets. */
  readonly rounding: Parameter | undefined;
  /** (rows, groups): logarithm of the factor on the scale, or what the factor on the upper end is made of. */
  readonly upper: Parameter;
  /** (rows, groups), of the lower end. */
  readonly lower: Parameter | undefined;
  readonly #grid: LearnedGrid = { scale: 1, zero: 0, fixed: true, high: 0, low: 0 };

  /** @param weight (outFeatures, inFeatures) in natural order, what the codes are to stand for */
  constructor(weight: Float32Array, start: QuantizedLinear, rules: LearningRules) {
    const { outFeatures, inFeatures, bits } = start;
    this.start = start;
    this.#rules = rules;
    this.#rows = outFeatures;
    this.#columns = inFeatures;
    this.#groups = bits.length;
    this.#weight = storedWeight(weight, start);
    const count = outFeatures * bits.length;
    this.#first = new Float64Array(count);
    this.#second = new Float64Array(count);
    this.#setRanges();
    this.#offsets = rules.grid === 'clipping' ? undefined : this.#startOffsets();
    const initial = rules.grid === 'scale' ? 0 : rules.grid === 'ends' ? 1 : CLIPPING_START;
    const factors = () => new Parameter([outFeatures, bits.length], new Float32Array(count).fill(initial));
    this.upper = factors();
    this.lower = rules.grid === 'scale' ? undefined : factors();
    if (rules.rounding) this.rounding = new Parameter([outFeatures, inFeatures], new Float32Array(outFeatures * inFeatures));
  }

  get parameters(): readonly Parameter[] {
    return [this.upper, this.lower, this.rounding].filter((parameter) => parameter !== undefined);
  }

  /** After a step: back to where offsets and factors may be. */
  project(): void {
    if (this.rounding) clamp(this.rounding.values, -LARGEST_OFFSET, LARGEST_OFFSET);
    if (this.#rules.grid !== 'ends') return;
    for (const parameter of [this.upper, this.lower!]) clamp(parameter.values, LEAST_FACTOR, LARGEST_FACTOR);
  }

  /** W as it is quantized now, (outFeatures, inFeatures) in natural order, into `weight`. */
  decode(weight: Float32Array): void {
    const { transform, lowRank } = this.start;
    const columns = this.#columns;
    const row = new Float64Array(columns);
    for (let r = 0; r < this.#rows; r++) {
      this.#forward(r, row);
      const at = r * columns;
      if (transform === undefined) {
        weight.set(row, at);
        continue;
      }
      untransformRow(transform, row, weight.subarray(at, at + columns));
    }
    if (lowRank) addBranch(weight, this.#rows, columns, lowRank);
  }

  /** Sets the parameters' gradients. @param cotangent of what `decode` made, (outFeatures, inFeatures) */
  backward(cotangent: Float32Array): void {
    const { transform, bits, groupSize } = this.start;
    const columns = this.#columns;
    const row = new Float64Array(columns);
    for (let r = 0; r < this.#rows; r++) {
      const at = r * columns;
      const own = cotangent.subarray(at, at + columns);
      if (transform) transformActivation(transform, own, row);
      else row.set(own);
      for (let g = 0; g < this.#groups; g++) {
        this.#groupBackward(r, g, bits[g], row, g * groupSize, Math.min((g + 1) * groupSize, columns));
      }
    }
  }

  /** Codes and grids as they are now, ready to be stored. */
  finish(): QuantizedLinear {
    const { bits, groupSize } = this.start;
    const [rows, columns, groups] = [this.#rows, this.#columns, this.#groups];
    const codes = new Uint8Array(rows * columns);
    const scales = this.start.scales.slice();
    const zeroPoints = this.start.zeroPoints.slice();
    const offsets = this.start.offsets?.slice();
    let scaleDtype: 'F16' | 'F32' = 'F16';
    for (let r = 0; r < rows; r++) {
      for (let g = 0; g < groups; g++) {
        const at = r * groups + g;
        if (bits[g] === 0) continue;
        const { scale, zero } = this.#gridOf(r, g, bits[g]);
        const shift = Float32Array.of(bits[g] === 1 ? -scale * zero : zero);
        const stored = storedGrid({ scale: Float32Array.of(scale), shift }, bits[g]);
        if (!stored.fitsF16) scaleDtype = 'F32';
        scales[at] = stored.grid.scale[0];
        if (bits[g] === 1) offsets![at] = stored.grid.shift[0];
        else zeroPoints[at] = zero;
        const end = Math.min((g + 1) * groupSize, columns);
        const most = 2 ** bits[g] - 1;
        for (let i = r * columns + g * groupSize; i < r * columns + end; i++) {
          codes[i] = Math.min(most, Math.max(0, this.#place(i, scale, zero) + WHOLE - WHOLE));
        }
      }
    }
    return { ...this.start, codes, scales, zeroPoints, ...(offsets && { offsets }), scaleDtype };
  }

  /** u of the weight at `i`. */
  #place(i: number, scale: number, zero: number): number {
    return (
      this.#weight[i] / scale + zero + (this.#offsets ? this.#offsets[i] : 0) + (this.rounding ? this.rounding.values[i] : 0)
    );
  }

  #forward(r: number, row: Float64Array): void {
    const { bits, groupSize } = this.start;
    const columns = this.#columns;
    for (let g = 0; g < this.#groups; g++) {
      const end = Math.min((g + 1) * groupSize, columns);
      if (bits[g] === 0) {
        row.fill(0, g * groupSize, end);
        continue;
      }
      const { scale, zero } = this.#gridOf(r, g, bits[g]);
      const most = 2 ** bits[g] - 1;
      for (let k = g * groupSize; k < end; k++) {
        const rounded = this.#place(r * columns + k, scale, zero) + WHOLE - WHOLE;
        const code = rounded < 0 ? 0 : rounded > most ? most : rounded;
        row[k] = scale * (code - zero);
      }
    }
  }

  #groupBackward(r: number, g: number, bits: number, cotangent: Float64Array, start: number, end: number): void {
    const at = r * this.#groups + g;
    const rounding = this.rounding?.gradient;
    const base = r * this.#columns;
    if (bits === 0) {
      rounding?.fill(0, base + start, base + end);
      this.upper.gradient[at] = 0;
      if (this.lower) this.lower.gradient[at] = 0;
      return;
    }
    const { scale, zero, fixed, low } = this.#gridOf(r, g, bits);
    const most = 2 ** bits - 1;
    let ofScale = 0;
    let ofZero = 0;
    for (let k = start; k < end; k++) {
      const i = base + k;
      const back = cotangent[k];
      const rounded = this.#place(i, scale, zero) + WHOLE - WHOLE;
      if (rounded < 0 || rounded > most) {
        ofScale += back * ((rounded < 0 ? 0 : most) - zero);
        ofZero -= back * scale;
        if (rounding) rounding[i] = 0;
      } else {
        ofScale += back * (rounded - zero - this.#weight[i] / scale);
        if (rounding) rounding[i] = scale * back;
      }
    }
    if (this.#rules.grid === 'scale') {
      this.upper.gradient[at] = ofScale * scale;
      return;
    }
    // z = -low / s straight through its rounding, s = (high - low) / Q.
    const throughZero = fixed ? 0 : ofZero;
    const total = ofScale + (throughZero * low) / (scale * scale);
    const slopes = [this.upper, this.lower!].map((parameter) => factorSlope(this.#rules.grid, parameter.values[at]));
    this.upper.gradient[at] = (total / most) * this.#second[at] * slopes[0];
    this.lower!.gradient[at] = (-total / most - throughZero / scale) * this.#first[at] * slopes[1];
  }

  #gridOf(r: number, g: number, bits: number): LearnedGrid {
    const at = r * this.#groups + g;
    const grid = this.#grid;
    const { grid: rule } = this.#rules;
    if (rule === 'scale') {
      grid.scale = this.#first[at] * Math.exp(this.upper.values[at]);
      grid.zero = this.#second[at];
      return grid;
    }
    const most = 2 ** bits - 1;
    grid.low = this.#first[at] * factorOf(rule, this.lower!.values[at]);
    grid.high = this.#second[at] * factorOf(rule, this.upper.values[at]);
    grid.scale = Math.max((grid.high - grid.low) / most, Number.MIN_VALUE);
    const zero = -grid.low / grid.scale;
    const rounded = bits === 1 ? zero : zero + WHOLE - WHOLE;
    grid.zero = bits === 1 ? zero : Math.min(most, Math.max(0, rounded));
    grid.fixed = grid.zero !== rounded;
    return grid;
  }

  /** Scales and zero points of the start, or the ends of the range that is learned; all of zeros keeps the start's. */
  #setRanges(): void {
    const { bits, groupSize, scales, zeroPoints, offsets } = this.start;
    for (let r = 0; r < this.#rows; r++) {
      for (let g = 0; g < this.#groups; g++) {
        const at = r * this.#groups + g;
        const scale = scales[at];
        const zero = bits[g] === 1 ? -(offsets?.[at] ?? 0) / scale : zeroPoints[at];
        if (this.#rules.grid === 'scale') {
          [this.#first[at], this.#second[at]] = [scale, zero];
          continue;
        }
        [this.#first[at], this.#second[at]] = [-scale * zero, scale * (2 ** bits[g] - 1 - zero)];
        if (this.#rules.grid === 'ends' || bits[g] < 2) continue;
        const base = r * this.#columns;
        const values = this.#weight.subarray(base + g * groupSize, base + Math.min((g + 1) * groupSize, this.#columns));
        const low = values.reduce((least, w) => Math.min(least, w), 0);
        const high = values.reduce((most, w) => Math.max(most, w), 0);
        if (high > low) [this.#first[at], this.#second[at]] = [low, high];
      }
    }
  }

  /** 0 where the start's code is the nearest; else what puts W just inside the code's cell, on the side where it is. */
  #startOffsets(): Float32Array | undefined {
    const { bits, groupSize, codes, scales, zeroPoints, offsets: low } = this.start;
    const offsets = new Float32Array(codes.length);
    const columns = this.#columns;
    let any = false;
    for (let i = 0; i < codes.length; i++) {
      const r = Math.floor(i / columns);
      const g = Math.floor((i - r * columns) / groupSize);
      if (bits[g] === 0) continue;
      const at = r * this.#groups + g;
      const zero = bits[g] === 1 ? -(low?.[at] ?? 0) / scales[at] : zeroPoints[at];
      const place = this.#weight[i] / scales[at] + zero;
      const nearest = Math.min(2 ** bits[g] - 1, Math.max(0, place + WHOLE - WHOLE));
      if (nearest === codes[i]) continue;
      offsets[i] = Math.min(codes[i] + 0.5 - EDGE, Math.max(codes[i] - 0.5 + EDGE, place)) - place;
      any = true;
    }
    return any ? offsets : undefined;
  }
}

function factorOf(rule: GridRule, value: number): number {
  return rule === 'clipping' ? 1 / (1 + Math.exp(-value)) : value;
}

function factorSlope(rule: GridRule, value: number): number {
  if (rule !== 'clipping') return 1;
  const factor = factorOf(rule, value);
  return factor * (1 - factor);
}

function storedWeight(weight: Float32Array, { outFeatures, inFeatures, transform, lowRank }: QuantizedLinear): Float32Array {
  let rest = weight;
  if (lowRank) {
    rest = new Float32Array(weight.length);
    addBranch(rest, outFeatures, inFeatures, lowRank);
    for (let i = 0; i < rest.length; i++) rest[i] = weight[i] - rest[i];
  }
  return transform ? transformColumns(transform, rest, outFeatures, inFeatures) : rest;
}

function clamp(values: Float32Array, least: number, most: number): void {
  for (let i = 0; i < values.length; i++) values[i] = Math.min(most, Math.max(least, values[i]));
}
