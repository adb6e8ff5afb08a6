/** Merged float32 values as they are stored: rounded once, to nearest even, and what that took away. */
import { type FloatDType, fromFloat32, toFloat32 } from '../formats/dtype.ts';
import type { DType } from '../formats/tensor.ts';
import { UnsupportedError } from './errors.ts';

/** Squared lengths in float64, for ||round(theta) - theta|| / ||theta - theta_0||. */
export interface RoundingLoss {
  error: number;
  change: number;
}

/**
 * The bytes of merged values. Adds to `loss` what rounding changed, and where `base` is given how far the values are from it.
 * @param start flat index of the first value
 * @throws UnsupportedError naming the tensor and the value that its type cannot hold, unless `allowNonfinite`
 */
export function roundRows(
  { name, dtype, allowNonfinite }: { readonly name: string; readonly dtype: DType; readonly allowNonfinite: boolean },
  values: Float32Array,
  { start, base, loss }: { readonly start: number; readonly base: Float32Array | undefined; readonly loss: RoundingLoss },
): Uint8Array {
  if (dtype === 'F64') {
    if (!allowNonfinite) requireFinite(name, dtype, values, values, start);
    return new Uint8Array(Float64Array.from(values).buffer);
  }
  const bytes = fromFloat32(dtype as FloatDType, values);
  const stored = dtype === 'F32' ? values : toFloat32(dtype, bytes);
  if (!allowNonfinite) requireFinite(name, dtype, stored, values, start);
  if (dtype !== 'F32' && base) {
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
  return bytes;
}

function requireFinite(name: string, dtype: DType, stored: Float32Array, values: Float32Array, start: number): void {
  // x - x is 0 unless x is NaN or infinite, so one sum answers for all.
  let sum = 0;
  for (let i = 0; i < stored.length; i++) sum += stored[i] - stored[i];
  if (sum === 0) return;
  const at = stored.findIndex((value) => !Number.isFinite(value));
  throw new UnsupportedError(
    `tensor "${name}": the merged value at flat index ${start + at} is ${values[at]}, which ${dtype} cannot hold` +
      `${dtype === 'F16' ? ' (its largest number is 65504)' : ''}; choose another --dtype, or let infinities through with --allow-nonfinite`,
  );
}
