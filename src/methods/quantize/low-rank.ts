/** A low-rank branch beside a quantized layer, which makes up for a part of what its codes lose (adapters.md, section 6). */
import { roundToF16 } from '../../../formats/dtype.ts';

/** How wide a branch's factors may be stored. */
export const FACTOR_BITS = [16, 8, 4] as const;
export type FactorBits = (typeof FACTOR_BITS)[number];

/** Floats, or codes of 8 or 4 bits with a scale in float16 for each component on either side. */
export type FactorStorage = 'F32' | 'F16' | 'Q8' | 'Q4';

/** What the size of a branch depends on. */
export interface LowRankShape {
  readonly rank: number;
  /** How its factors are stored. */
  readonly dtype: FactorStorage;
}

/** `y += loraB (loraA x)`, x as the model makes it, whatever the codes beside it do to their input. Values are representable in `dtype`. */
export interface LowRankBranch extends LowRankShape {
  /** (rank, inFeatures). */
  readonly loraA: Float32Array;
  /** (outFeatures, rank). */
  readonly loraB: Float32Array;
  /** With codes: steps of each component's row of A and column of B; values are whole multiples of them. */
  readonly scales?: { readonly a: Float32Array; readonly b: Float32Array };
}

/** Above it float16 is near its end. */
const F16_MOST = 6e4;
/** Float16 may lose this part of a factor's norm: twice what rounding loses, so more is values below its normal range. */
const F16_LOSS = 2 ** -10;
/** Steps that are tried for 4 bits, in parts of the one that reaches the largest value: a few values may be cut for finer steps. */
const CUTS = [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6];

/** Factors as artifacts store them: rounded to float16, or kept in float32 when that is out of float16's range. */
export function storedBranch(rank: number, loraA: Float32Array, loraB: Float32Array): LowRankBranch {
  const [a, b] = [loraA, loraB].map((factor) => factor.map(roundToF16));
  const fits = fitsF16(loraA, a) && fitsF16(loraB, b);
  return fits ? { rank, dtype: 'F16', loraA: a, loraB: b } : { rank, dtype: 'F32', loraA, loraB };
}

function fitsF16(values: Float32Array, rounded: Float32Array): boolean {
  let square = 0;
  let lost = 0;
  for (let i = 0; i < values.length; i++) {
    if (!(Math.abs(values[i]) <= F16_MOST)) return false;
    square += values[i] ** 2;
    lost += (values[i] - rounded[i]) ** 2;
  }
  return lost <= F16_LOSS ** 2 * square;
}

/** How a branch is stored whose plan has these bits. */
export function factorStorage(bits: FactorBits | undefined): FactorStorage {
  return bits === 8 ? 'Q8' : bits === 4 ? 'Q4' : 'F16';
}

/** Bits of one parameter. */
export function factorBits(dtype: FactorStorage): 32 | FactorBits {
  return ({ F32: 32, F16: 16, Q8: 8, Q4: 4 } as const)[dtype];
}

/** Bits of one component's part of a factor, `length` values, with its scale: rows of codes are whole bytes. */
export function componentBits(dtype: FactorStorage, length: number): number {
  const bits = factorBits(dtype);
  return bits >= 16 ? bits * length : 8 * Math.ceil((bits * length) / 8) + 16;
}

/** A factor as whole multiples of one step a component. */
export interface RoundedFactor {
  readonly values: Float32Array;
  /** (rank), representable in float16. */
  readonly scales: Float32Array;
}

/**
 * Rounds each component to codes within +-127 or +-7. Undefined where float16 has no step for it: much too large, or so small that codes would be nothing.
 * @param values component k's i-th value is at `k * step + i * stride`
 */
export function roundFactor(
  values: Float32Array,
  rank: number,
  bits: 8 | 4,
  { step, stride }: { readonly step: number; readonly stride: number },
): RoundedFactor | undefined {
  const length = values.length / rank;
  const most = 2 ** (bits - 1) - 1;
  const rounded = new Float32Array(values.length);
  const scales = new Float32Array(rank);
  for (let k = 0; k < rank; k++) {
    const at = k * step;
    let largest = 0;
    for (let i = 0; i < length; i++) largest = Math.max(largest, Math.abs(values[at + i * stride]));
    if (largest === 0) continue;
    let least = Infinity;
    for (const cut of bits === 4 ? CUTS : [1]) {
      const scale = roundToF16((cut * largest) / most);
      if (!(scale > 0 && scale <= F16_MOST)) return undefined;
      let lost = 0;
      for (let i = 0; i < length; i++) {
        const value = values[at + i * stride];
        lost += (value - scale * codeOf(value, scale, most)) ** 2;
      }
      if (lost >= least) continue;
      least = lost;
      scales[k] = scale;
    }
    for (let i = 0; i < length; i++) rounded[at + i * stride] = scales[k] * codeOf(values[at + i * stride], scales[k], most);
  }
  return { values: rounded, scales };
}

function codeOf(value: number, scale: number, most: number): number {
  // No negative zero: a code has none.
  return Math.max(-most, Math.min(most, Math.round(value / scale))) + 0;
}

/** Codes of both factors, each (rank, length), from 1 up: 128 or 8 is nothing. */
export function branchCodes({ rank, dtype, loraA, loraB, scales }: LowRankBranch): {
  readonly a: Uint8Array;
  readonly b: Uint8Array;
} {
  const middle = 2 ** (factorBits(dtype) - 1);
  const [n, m] = [loraA.length / rank, loraB.length / rank];
  const [a, b] = [new Uint8Array(rank * n), new Uint8Array(rank * m)];
  for (let k = 0; k < rank; k++) {
    const [ofA, ofB] = [scales!.a[k] || 1, scales!.b[k] || 1];
    for (let j = 0; j < n; j++) a[k * n + j] = middle + Math.round(loraA[k * n + j] / ofA);
    for (let i = 0; i < m; i++) b[k * m + i] = middle + Math.round(loraB[i * rank + k] / ofB);
  }
  return { a, b };
}

/** The branch that codes stand for: reverse of `branchCodes`. */
export function branchOfCodes(
  { rank, dtype }: LowRankShape,
  codes: { readonly a: Uint8Array; readonly b: Uint8Array },
  scales: { readonly a: Float32Array; readonly b: Float32Array },
): LowRankBranch {
  const middle = 2 ** (factorBits(dtype) - 1);
  const [n, m] = [codes.a.length / rank, codes.b.length / rank];
  const loraA = Float32Array.from(codes.a, (code, at) => scales.a[Math.floor(at / n)] * (code - middle));
  const loraB = new Float32Array(m * rank);
  for (let k = 0; k < rank; k++) for (let i = 0; i < m; i++) loraB[i * rank + k] = scales.b[k] * (codes.b[k * m + i] - middle);
  return { rank, dtype, loraA, loraB, scales };
}

/** Adds the branch to W (rows, columns) in place, in natural order: sums over the rank in float64, one rounding a weight. */
export function addBranch(
  weight: Float32Array,
  rows: number,
  columns: number,
  { rank, loraA, loraB }: Pick<LowRankBranch, 'rank' | 'loraA' | 'loraB'>,
): void {
  const sums = new Float64Array(columns);
  for (let row = 0; row < rows; row++) {
    sums.fill(0);
    for (let k = 0; k < rank; k++) {
      const factor = loraB[row * rank + k];
      const at = k * columns;
      for (let j = 0; j < columns; j++) sums[j] += factor * loraA[at + j];
    }
    const at = row * columns;
    for (let j = 0; j < columns; j++) weight[at + j] += sums[j];
  }
}
