/**
 * The asymmetric target (slim-llm 5.2): what earlier layers' quantization did to the input is partly predictable from the input itself,
 * and a layer can make up for that part. `W* = W + alpha D`, `D = W R H^-1`, `R = E[(x' - x) x^T]`.
 */
import type { Drift } from '../../../calibration/statistics.ts';
import type { Blas, Matrix } from '../../../compute/blas.ts';
import { hadamardScale, type InputTransform, rotateRuns } from '../input-transform.ts';
import type { PreparedInput } from './prepared-input.ts';

/** Rows of W that decide how much of the correction is taken. */
const SAMPLED_ROWS = 256;
/** A correction that leaves more than this part of the held-out error is not worth its risk. */
const WORTHWHILE = 0.98;
/** Rows of a triangular factor that are dense at a time. */
const STRIP = 512;

/** The correction of one site, already scaled. */
export interface DriftCorrection {
  readonly alpha: number;
  /** Held-out error with it over that without. */
  readonly heldOutRatio: number;
}

/**
 * Adds the correction to `columns`, W^T (features, outFeatures) in stored order, unless it does not help on held-out tokens.
 * @param alpha a fixed part to take, or undefined for the best on the held-out tokens
 */
export async function correctForDrift(
  blas: Blas,
  drift: Drift,
  input: PreparedInput,
  columns: Float32Array,
  fixedAlpha: number | undefined,
  centred: boolean,
): Promise<DriftCorrection> {
  if (fixedAlpha === 0) return { alpha: 0, heldOutRatio: 1 };
  const correction = await correctionOf(blas, drift, input, columns, centred);
  const { alpha, heldOutRatio } =
    fixedAlpha === undefined
      ? await bestAlpha(blas, drift, input, columns, correction, centred)
      : { alpha: fixedAlpha, heldOutRatio: Number.NaN };
  if (alpha > 0) for (let i = 0; i < columns.length; i++) columns[i] += alpha * correction[i];
  return { alpha, heldOutRatio };
}

/** `D^T = H^-1 R^T W^T` in stored order, (features, outFeatures). */
async function correctionOf(
  blas: Blas,
  drift: Drift,
  input: PreparedInput,
  columns: Float32Array,
  centred: boolean,
): Promise<Float32Array> {
  const n = input.features;
  const rows = columns.length / n;
  const cross = storedCross(drift, input.transform, n, centred);
  const { data } = await blas.gemm(
    { rows: n, columns: n, data: cross },
    { rows: n, columns: rows, data: columns },
    { transposeA: true },
  );
  // H^-1 = U^T U: twice a triangular product, a strip of U at a time.
  const once = new Float32Array(n * rows);
  for (let start = 0; start < n; start += STRIP) {
    const end = Math.min(start + STRIP, n);
    const strip = input.factor.rowStrip(start, end);
    const x = { rows: n - start, columns: rows, data: data.subarray(start * rows) };
    await blas.gemm(strip, x, {
      beta: 0,
      out: { rows: end - start, columns: rows, data: once.subarray(start * rows, end * rows) },
    });
  }
  data.fill(0);
  for (let start = 0; start < n; start += STRIP) {
    const end = Math.min(start + STRIP, n);
    const strip = input.factor.rowStrip(start, end);
    const x = { rows: end - start, columns: rows, data: once.subarray(start * rows, end * rows) };
    const out = { rows: n - start, columns: rows, data: data.subarray(start * rows) };
    await blas.gemm(strip, x, { transposeA: true, beta: 1, out });
  }
  return data;
}

/** R with rows and columns in stored order, (n, n): `T R T^T`, where T is what the transform does to an activation. */
function storedCross(drift: Drift, transform: InputTransform | undefined, n: number, centred: boolean): Float32Array {
  const { cross, mean, floatMean } = drift;
  const result = new Float32Array(n * n);
  const row = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    const source = transform ? transform.order[i] : i;
    for (let j = 0; j < n; j++) {
      const column = transform ? transform.order[j] : j;
      row[j] = cross[source * n + column] - (centred ? (floatMean[source] - mean[source]) * mean[column] : 0);
    }
    if (transform && transform.hadamard > 0) rotateRuns(row, transform.hadamard, hadamardScale(transform.hadamard));
    result.set(row, i * n);
  }
  if (transform && transform.hadamard > 0) {
    const size = transform.hadamard;
    const column = new Float64Array(n);
    for (let j = 0; j < n; j++) {
      for (let i = 0; i < n; i++) column[i] = result[i * n + j];
      rotateRuns(column, size, hadamardScale(size));
      for (let i = 0; i < n; i++) result[i * n + j] = column[i];
    }
  }
  return result;
}

/** `alpha = <D x, W (x' - x)> / |D x|^2` over the held-out tokens, within 0..1, or 0 when it does not help enough. */
async function bestAlpha(
  blas: Blas,
  drift: Drift,
  input: PreparedInput,
  columns: Float32Array,
  correction: Float32Array,
  centred: boolean,
): Promise<DriftCorrection> {
  const n = input.features;
  const [weight, change] = [sampleRows(columns, n), sampleRows(correction, n)];
  let product = 0;
  let square = 0;
  let before = 0;
  for await (const { actual, float } of drift.heldOut()) {
    const x = storedTokens(actual, input.transform, centred ? drift.mean : undefined);
    const difference = storedTokens(float, input.transform, centred ? drift.floatMean : undefined);
    for (let i = 0; i < x.data.length; i++) difference.data[i] -= x.data[i];
    const wanted = (await blas.gemm(difference, weight)).data;
    const made = (await blas.gemm(x, change)).data;
    for (let i = 0; i < wanted.length; i++) {
      product += made[i] * wanted[i];
      square += made[i] * made[i];
      before += wanted[i] * wanted[i];
    }
  }
  if (!(square > 0) || !(before > 0)) return { alpha: 0, heldOutRatio: 1 };
  const alpha = Math.min(1, Math.max(0, product / square));
  const ratio = (before - 2 * alpha * product + alpha * alpha * square) / before;
  return ratio > WORTHWHILE ? { alpha: 0, heldOutRatio: 1 } : { alpha, heldOutRatio: ratio };
}

/** Evenly spaced columns of (features, rows). */
function sampleRows(columns: Float32Array, features: number): Matrix {
  const rows = columns.length / features;
  const count = Math.min(rows, SAMPLED_ROWS);
  const data = new Float32Array(features * count);
  for (let j = 0; j < features; j++) {
    for (let i = 0; i < count; i++) data[j * count + i] = columns[j * rows + Math.floor((i * rows) / count)];
  }
  return { rows: features, columns: count, data };
}

/** Activations (tokens, features) as the stored weights take them; a copy. */
function storedTokens(tokens: Matrix, transform: InputTransform | undefined, mean: Float64Array | undefined): Matrix {
  const { rows, columns } = tokens;
  const data = new Float32Array(rows * columns);
  const row = new Float64Array(columns);
  for (let t = 0; t < rows; t++) {
    for (let k = 0; k < columns; k++) {
      const from = transform ? transform.order[k] : k;
      row[k] = tokens.data[t * columns + from] - (mean ? mean[from] : 0);
    }
    if (transform && transform.hadamard > 0) rotateRuns(row, transform.hadamard, hadamardScale(transform.hadamard));
    data.set(row, t * columns);
  }
  return { rows, columns, data };
}
