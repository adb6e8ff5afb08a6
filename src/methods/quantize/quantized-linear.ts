/** A quantized linear layer as a method leaves it: integer codes and grids, not packed. */
import { type InputTransform, untransformColumns } from './input-transform.ts';
import { addBranch, type LowRankBranch } from './low-rank.ts';

/**
 * Columns are in stored order: the natural one, unless `transform` changes the input. Group g covers stored columns `[g * groupSize, min((g+1) * groupSize, inFeatures))`.
 * A group of b >= 2 bits decodes as `scale * (code - zeroPoint)`; a 1-bit group as `offset + scale * code`; one of 0 bits as 0.
 * Scales and offsets are exactly representable in F16 unless `scaleDtype` is 'F32'.
 */
export interface QuantizedLinear {
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly groupSize: number;
  /** Width of each group, (groups). */
  readonly bits: Uint8Array;
  /** (outFeatures, inFeatures), row-major. */
  readonly codes: Uint8Array;
  /** (outFeatures, groups). */
  readonly scales: Float32Array;
  /** (outFeatures, groups); 0 for groups of 1 bit. */
  readonly zeroPoints: Uint8Array;
  /** (outFeatures, groups); value of code 0 in 1-bit groups, 0 elsewhere. Absent when no group has 1 bit. */
  readonly offsets?: Float32Array;
  readonly scaleDtype: 'F16' | 'F32';
  /** What is done to the input before the codes multiply it; absent: nothing. */
  readonly transform?: InputTransform;
  /** (outFeatures); replaces the checkpoint's bias. Only for a site that has one; values are representable in the bias' stored dtype. */
  readonly bias?: Float32Array;
  /** Added to what the codes decode to; absent: nothing. */
  readonly lowRank?: LowRankBranch;
}

/** Number of groups of a row: `ceil(inFeatures / groupSize)`. */
export function groupCount(inFeatures: number, groupSize: number): number {
  return Math.ceil(inFeatures / groupSize);
}

/** Decodes to float32 W (outFeatures, inFeatures), which multiplies the input as the model makes it: what `transform` does to the input is folded in, a branch added. */
export function dequantize(q: QuantizedLinear): Float32Array {
  const stored = decodeStored(q);
  const weight = q.transform === undefined ? stored : untransformColumns(q.transform, stored, q.outFeatures, q.inFeatures);
  if (q.lowRank) addBranch(weight, q.outFeatures, q.inFeatures, q.lowRank);
  return weight;
}

/** Decodes the codes alone to float32 W in stored column order, (outFeatures, inFeatures): one rounding per value, exactly what every artifact's reader computes. */
export function decodeStored(q: QuantizedLinear): Float32Array {
  const { outFeatures, inFeatures, groupSize, bits, codes, scales, zeroPoints, offsets } = q;
  const groups = bits.length;
  const weight = new Float32Array(outFeatures * inFeatures);
  for (let row = 0; row < outFeatures; row++) {
    for (let g = 0; g < groups; g++) {
      const width = bits[g];
      if (width === 0) continue;
      const scale = scales[row * groups + g];
      const zeroPoint = zeroPoints[row * groups + g];
      const offset = width === 1 && offsets ? offsets[row * groups + g] : 0;
      const end = row * inFeatures + Math.min((g + 1) * groupSize, inFeatures);
      for (let i = row * inFeatures + g * groupSize; i < end; i++) {
        weight[i] = width === 1 ? offset + Math.fround(scale * codes[i]) : scale * (codes[i] - zeroPoint);
      }
    }
  }
  return weight;
}
