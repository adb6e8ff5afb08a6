/** How much of a layer's output is wrong after quantization, by the calibration Hessian. */
import type { CalibrationStats } from '../../calibration/statistics.ts';
import type { Blas } from '../../compute/blas.ts';
import { dequantize, type QuantizedLinear } from './quantized-linear.ts';

/** Output rows that are looked at: evenly spaced, enough for two digits, a few percent of the work of all. */
const SAMPLED_ROWS = 256;
/** Rows of H that are float32 at a time. */
const STRIP = 512;

/** `tr(dW H dW^T) / tr(W H W^T)` with the undamped H, on at most 256 evenly spaced output rows; 0 for a layer without output. */
export async function relativeOutputError(
  blas: Blas,
  stats: CalibrationStats,
  weight: Float32Array,
  quantized: QuantizedLinear,
): Promise<number> {
  const { outFeatures, inFeatures: n } = quantized;
  const count = Math.min(outFeatures, SAMPLED_ROWS);
  // The sampled rows of W, then of dW.
  const rows = new Float32Array(2 * count * n);
  for (let i = 0; i < count; i++) {
    const row = Math.floor((i * outFeatures) / count);
    const original = weight.subarray(row * n, (row + 1) * n);
    const decoded = decodeRow(quantized, row);
    rows.set(original, i * n);
    for (let j = 0; j < n; j++) rows[(count + i) * n + j] = decoded[j] - original[j];
  }
  let energy = 0;
  let error = 0;
  for (let start = 0; start < n; start += STRIP) {
    const end = Math.min(start + STRIP, n);
    const strip = { rows: end - start, columns: n, data: Float32Array.from(stats.hessian.subarray(start * n, end * n)) };
    const { data } = await blas.gemm(strip, { rows: 2 * count, columns: n, data: rows }, { transposeB: true });
    for (let j = start; j < end; j++) {
      const product = (j - start) * 2 * count;
      for (let i = 0; i < count; i++) {
        energy += data[product + i] * rows[i * n + j];
        error += data[product + count + i] * rows[(count + i) * n + j];
      }
    }
  }
  return energy > 0 ? Math.max(0, error) / energy : 0;
}

function decodeRow(quantized: QuantizedLinear, row: number): Float32Array {
  const groups = quantized.bits.length;
  const grids = [row * groups, (row + 1) * groups] as const;
  const columns = [row * quantized.inFeatures, (row + 1) * quantized.inFeatures] as const;
  return dequantize({
    ...quantized,
    outFeatures: 1,
    codes: quantized.codes.subarray(...columns),
    scales: quantized.scales.subarray(...grids),
    zeroPoints: quantized.zeroPoints.subarray(...grids),
    ...(quantized.offsets && { offsets: quantized.offsets.subarray(...grids) }),
  });
}
