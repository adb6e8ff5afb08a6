/** Random quantized linears for tests: every width, short last groups, F16 grids. */
import { roundToF16 } from '../../formats/dtype.ts';
import type { InputTransform } from '../../src/methods/quantize/input-transform.ts';
import {
  type FactorBits,
  factorStorage,
  type LowRankBranch,
  roundFactor,
  storedBranch,
} from '../../src/methods/quantize/low-rank.ts';
import { groupCount, type QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';

/** Small deterministic generator (mulberry32), uniform in [0, 1). */
export function uniform(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export interface RandomLinearOptions {
  readonly rows: number;
  readonly columns: number;
  readonly groupSize: number;
  /** Widths of the groups; repeated as often as needed. */
  readonly bits: readonly number[];
  readonly seed?: number;
  readonly scaleDtype?: 'F16' | 'F32';
  /** Sorts the input at random, or with `signed` turns signs of it; `hadamard` rotates it too. */
  readonly transform?: { readonly hadamard: number; readonly signed?: boolean; readonly seed?: number };
  readonly bias?: boolean;
  /** Rank of a branch beside it. */
  readonly lowRank?: number;
  /** Of its factors; absent: 16. */
  readonly lowRankBits?: FactorBits;
}

export function randomLinear(options: RandomLinearOptions): QuantizedLinear {
  const { rows, columns, groupSize, seed = 1, scaleDtype = 'F16' } = options;
  const random = uniform(seed);
  const groups = groupCount(columns, groupSize);
  const bits = Uint8Array.from({ length: groups }, (_, g) => options.bits[g % options.bits.length]);
  const round = scaleDtype === 'F16' ? roundToF16 : Math.fround;
  const codes = Uint8Array.from({ length: rows * columns }, (_, i) => {
    const width = bits[Math.floor((i % columns) / groupSize)];
    return Math.floor(random() * (1 << width));
  });
  const scales = new Float32Array(rows * groups);
  const zeroPoints = new Uint8Array(rows * groups);
  const offsets = new Float32Array(rows * groups);
  for (let i = 0; i < scales.length; i++) {
    const width = bits[i % groups];
    scales[i] = width === 0 ? 1 : round(0.01 + 0.02 * random());
    if (width >= 2) zeroPoints[i] = Math.floor(random() * (1 << width));
    if (width === 1) offsets[i] = round(-0.03 * random());
  }
  const { transform } = options;
  return {
    outFeatures: rows,
    inFeatures: columns,
    groupSize,
    bits,
    codes,
    scales,
    zeroPoints,
    scaleDtype,
    ...(bits.includes(1) && { offsets }),
    ...(transform && { transform: randomTransform(columns, transform) }),
    ...(options.lowRank && {
      lowRank: branch(
        options.lowRank,
        Float32Array.from({ length: options.lowRank * columns }, () => 0.2 * random() - 0.1),
        Float32Array.from({ length: rows * options.lowRank }, () => 0.2 * random() - 0.1),
        options.lowRankBits ?? 16,
      ),
    }),
    ...(options.bias && { bias: Float32Array.from({ length: rows }, () => Math.round(random() * 16) / 8 - 1) }),
  };
}

function randomTransform(
  columns: number,
  { hadamard, signed = false, seed = 1 }: NonNullable<RandomLinearOptions['transform']>,
): InputTransform {
  if (!signed) return { order: randomOrder(columns, seed), hadamard };
  const random = uniform(seed);
  return { signs: Uint8Array.from({ length: columns }, () => (random() < 0.5 ? 1 : 0)), hadamard };
}

function branch(rank: number, loraA: Float32Array, loraB: Float32Array, bits: FactorBits): LowRankBranch {
  if (bits === 16) return storedBranch(rank, loraA, loraB);
  const a = roundFactor(loraA, rank, bits, { step: loraA.length / rank, stride: 1 })!;
  const b = roundFactor(loraB, rank, bits, { step: 1, stride: rank })!;
  return { rank, dtype: factorStorage(bits), loraA: a.values, loraB: b.values, scales: { a: a.scales, b: b.scales } };
}

/** A permutation of 0 to `count` - 1. */
function randomOrder(count: number, seed: number): Uint32Array {
  const random = uniform(seed);
  const order = Uint32Array.from({ length: count }, (_, k) => k);
  for (let k = count - 1; k > 0; k--) {
    const other = Math.floor(random() * (k + 1));
    [order[k], order[other]] = [order[other], order[k]];
  }
  return order;
}
