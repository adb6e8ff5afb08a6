/** Merged float32 values as they are stored: rounded once, to nearest even, and what that took away. */
import { bitsPerElement, fromFloat32, toFloat32 } from '../../../formats/dtype.ts';
import type { DType } from '../../../formats/tensor.ts';
import { vectors } from '../../compute/kernels/vectors.ts';
import { UnsupportedError } from '../../errors.ts';

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
 * Rounds merged values and hands their bytes to `write`, a piece at a time, each good until `write` returns. Adds to `loss` what rounding changed,
 * and where `base` is given how far the values are from it.
 * @param start flat index of the first value
 * @throws UnsupportedError naming the tensor and the value that its type cannot hold, unless `allowNonfinite`
 */
export function roundRows(
  target: RoundingTarget,
  values: Float32Array,
  { start, base, loss }: { readonly start: number; readonly base: Float32Array | undefined; readonly loss: RoundingLoss },
  write: (bytes: Uint8Array) => void,
): void {
  const most = vectors().outgoing.byteLength / (bitsPerElement(target.dtype) / 8);
  for (let from = 0; from < values.length; from += most) {
    const piece = values.subarray(from, from + most);
    write(roundPiece(target, piece, start + from, base?.subarray(from, from + most), loss));
  }
}

function roundPiece(
  target: RoundingTarget,
  values: Float32Array,
  start: number,
  base: Float32Array | undefined,
  loss: RoundingLoss,
): Uint8Array {
  const { dtype, allowNonfinite } = target;
  if (dtype === 'BF16' || dtype === 'F16') {
    const codes = vectors().outgoing.subarray(0, 2 * values.length);
    if (vectors().narrow(dtype, values, codes, base, loss)) return codes;
    const bytes = fromFloat32(dtype, values);
    if (!allowNonfinite) throw tooLarge(target, toFloat32(dtype, bytes), values, start);
    return bytes;
  }
  if (!allowNonfinite && !vectors().areFinite(values)) throw tooLarge(target, values, values, start);
  return dtype === 'F64'
    ? new Uint8Array(Float64Array.from(values).buffer)
    : new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

function tooLarge({ name, dtype }: RoundingTarget, stored: Float32Array, values: Float32Array, start: number): UnsupportedError {
  const at = stored.findIndex((value) => !Number.isFinite(value));
  return new UnsupportedError(
    `tensor "${name}": the merged value at flat index ${start + at} is ${values[at]}, which ${dtype} cannot hold` +
      `${dtype === 'F16' ? ' (its largest number is 65504)' : ''}; choose another --dtype, or let infinities through with --allow-nonfinite`,
  );
}
