/** Merged float32 values as they are stored: rounded once, to nearest even, and what that took away. */
import { areFinite, type FloatDType, fromFloat32, toFloat32, widenInto } from '../formats/dtype.ts';
import type { DType } from '../formats/tensor.ts';
import { UnsupportedError } from './errors.ts';

/** Squared lengths in float64, for ||round(theta) - theta|| / ||theta - theta_0||. */
export interface RoundingLoss {
  error: number;
  change: number;
}

export interface RoundingTarget {
  readonly name: string;
  readonly dtype: DType;
  readonly allowNonfinite: boolean;
}

/**
 * The bytes of merged values. Adds to `loss` what rounding changed, and where `base` is given how far the values are from it.
 * @param start flat index of the first value
 * @throws UnsupportedError naming the tensor and the value that its type cannot hold, unless `allowNonfinite`
 */
export function roundRows(
  target: RoundingTarget,
  values: Float32Array,
  { start, base, loss }: { readonly start: number; readonly base: Float32Array | undefined; readonly loss: RoundingLoss },
): Uint8Array {
  const { dtype, allowNonfinite } = target;
  if (!allowNonfinite && !areFinite(bitsOf(values))) throw tooLarge(target, values, values, start);
  if (dtype === 'F64') return new Uint8Array(Float64Array.from(values).buffer);
  if (dtype === 'F32') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  if (!base) {
    const bytes = fromFloat32(dtype as FloatDType, values);
    if (!allowNonfinite && !areFiniteCodes(dtype, bytes)) throw tooLarge(target, toFloat32(dtype, bytes), values, start);
    return bytes;
  }
  const bytes = new Uint8Array(2 * values.length);
  const stored = new Float32Array(Math.min(CHUNK, values.length));
  // A piece at a time, so that what is rounded is still in the cache when it is compared.
  for (let from = 0; from < values.length; from += CHUNK) {
    const piece = values.subarray(from, from + CHUNK);
    const rounded = fromFloat32(dtype as FloatDType, piece);
    bytes.set(rounded, 2 * from);
    const back = stored.subarray(0, piece.length);
    const finite = widenInto(dtype as FloatDType, rounded, back);
    if (!finite && !allowNonfinite) throw tooLarge(target, back, piece, start + from);
    addLoss(loss, back, piece, base.subarray(from, from + CHUNK));
  }
  return bytes;
}

/** Whether 16-bit codes have no exponent of all ones. */
function areFiniteCodes(dtype: DType, bytes: Uint8Array): boolean {
  const [mask, last] = dtype === 'BF16' ? [0x7f80, 0x80] : [0x7c00, 0x400];
  const codes = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
  let carries = 0;
  for (let i = 0; i < codes.length; i++) carries |= (codes[i] & mask) + last;
  return (carries & 0x8000) === 0;
}

const CHUNK = 4096;

function bitsOf(values: Float32Array): Int32Array {
  return new Int32Array(values.buffer, values.byteOffset, values.length);
}

function addLoss(loss: RoundingLoss, stored: Float32Array, values: Float32Array, base: Float32Array): void {
  let [error, change] = [0, 0];
  for (let i = 0; i < values.length; i++) {
    const lost = stored[i] - values[i];
    const moved = values[i] - base[i];
    error += lost * lost;
    change += moved * moved;
  }
  loss.error += error;
  loss.change += change;
}

function tooLarge({ name, dtype }: RoundingTarget, stored: Float32Array, values: Float32Array, start: number): UnsupportedError {
  const at = stored.findIndex((value) => !Number.isFinite(value));
  return new UnsupportedError(
    `tensor "${name}": the merged value at flat index ${start + at} is ${values[at]}, which ${dtype} cannot hold` +
      `${dtype === 'F16' ? ' (its largest number is 65504)' : ''}; choose another --dtype, or let infinities through with --allow-nonfinite`,
  );
}
