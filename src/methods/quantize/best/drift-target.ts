/**
 * The asymmetric target (slim-llm 5.2): what earlier layers' quantization did to the input is partly predictable from the input itself,
 * and a layer can make up for that part. `W* = W + alpha D`, `D = W R H^-1`, `R = E[(x' - x) x^T]`.
 */
import type { Drift } from '../../../calibration/statistics.ts';
import type { Blas, Matrix } from '../../../compute/blas.ts';
import { type InputTransform, transformActivation, untransformColumns } from '../input-transform.ts';
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
  const { cross } = drift;
  const means = centred ? drift.means : undefined;
  const result = new Float32Array(n * n);
  const natural = new Float64Array(n);
  const stored = new Float64Array(n);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      natural[j] = cross[i * n + j] - (means ? (means.float[i] - means.actual[i]) * means.actual[j] : 0);
    }
    if (transform) transformActivation(transform, natural, stored);
    result.set(transform ? stored : natural, i * n);
  }
  if (!transform) return result;
  for (let j = 0; j < n; j++) {
    for (let i = 0; i < n; i++) natural[i] = result[i * n + j];
    transformActivation(transform, natural, stored);
    for (let i = 0; i < n; i++) result[i * n + j] = stored[i];
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
  // In natural order: a few rows of weights are turned back at less cost than every token is turned.
  const weight = sampleRows(columns, input);
  const change = sampleRows(correction, input);
  const means = centred ? drift.means : undefined;
  const shift =
    means &&
    offset(
      weight,
      means.float.map((value, j) => value - means.actual[j]),
    );
  const centre = means && offset(change, means.actual);
  let product = 0;
  let square = 0;
  let before = 0;
  for await (const { actual, difference } of drift.heldOut()) {
    const wanted = (await blas.gemm(difference, weight, { transposeB: true })).data;
    const made = (await blas.gemm(actual, change, { transposeB: true })).data;
    const count = weight.rows;
    for (let i = 0; i < wanted.length; i++) {
      const w = shift ? wanted[i] - shift[i % count] : wanted[i];
      const m = centre ? made[i] - centre[i % count] : made[i];
      product += m * w;
      square += m * m;
      before += w * w;
    }
  }
  if (!(square > 0) || !(before > 0)) return { alpha: 0, heldOutRatio: 1 };
  const alpha = Math.min(1, Math.max(0, product / square));
  const ratio = (before - 2 * alpha * product + alpha * alpha * square) / before;
  return ratio > WORTHWHILE ? { alpha: 0, heldOutRatio: 1 } : { alpha, heldOutRatio: ratio };
}

/** Evenly spaced rows of W, (count, features) in natural order, from W^T (features, rows) in stored order. */
function sampleRows(columns: Float32Array, { features, transform }: PreparedInput): Matrix {
  const rows = columns.length / features;
  const count = Math.min(rows, SAMPLED_ROWS);
  const data = new Float32Array(features * count);
  for (let i = 0; i < count; i++) {
    const from = Math.floor((i * rows) / count);
    for (let j = 0; j < features; j++) data[i * features + j] = columns[j * rows + from];
  }
  return { rows: count, columns: features, data: transform ? untransformColumns(transform, data, count, features) : data };
}

/** `W v`, (rows). */
function offset({ rows, columns, data }: Matrix, vector: Float64Array): Float64Array {
  const sums = new Float64Array(rows);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) sums[i] += data[i * columns + j] * vector[j];
  return sums;
}
