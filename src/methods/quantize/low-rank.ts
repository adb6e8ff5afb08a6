/** A low-rank branch beside a quantized layer, which makes up for a part of what its codes lose (adapters.md, section 6). */
import { roundToF16 } from '../../../formats/dtype.ts';

/** What the size of a branch depends on. */
export interface LowRankShape {
  readonly rank: number;
  /** How its factors are stored. */
  readonly dtype: 'F16' | 'F32';
}

/** `y += loraB (loraA x)`, x as the model makes it, whatever the codes beside it do to their input. Values are representable in `dtype`. */
export interface LowRankBranch extends LowRankShape {
  /** (rank, inFeatures). */
  readonly loraA: Float32Array;
  /** (outFeatures, rank). */
  readonly loraB: Float32Array;
}

/** Above it float16 is near its end. */
const F16_MOST = 6e4;
/** Float16 may lose this part of a factor's norm: twice what rounding loses, so more is values below its normal range. */
const F16_LOSS = 2 ** -10;

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

/** Adds the branch to W (rows, columns) in place, in natural order: sums over the rank in float64, one rounding a weight. */
export function addBranch(weight: Float32Array, rows: number, columns: number, { rank, loraA, loraB }: LowRankBranch): void {
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
