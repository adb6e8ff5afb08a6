/** The synthetic layer of slim-llm section 12: heavy-tailed weights, low-rank activations, a few channels twelve times as loud. */
import type { CalibrationStats } from '../../src/calibration/statistics.ts';
import type { Matrix } from '../../src/compute/blas.ts';

const IN = 512;
const OUT = 64;
const BASE = 1000;

/** The 32-bit generator of the test vectors; the product uses another. */
export function mulberry32(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return (t ^ (t >>> 14)) >>> 0;
  };
}

/** Standard normals by Box and Muller, the cosine of each pair. */
export function normals(seed: number, count: number): Float64Array {
  const next = mulberry32(seed);
  return Float64Array.from({ length: count }, () => {
    const u = (next() + 0.5) / 2 ** 32;
    const v = (next() + 0.5) / 2 ** 32;
    return Math.sqrt(-2 * Math.log(u)) * Math.cos(2 * Math.PI * v);
  });
}

export interface ReferenceLayer {
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly weight: Float32Array;
  /** W before it was rounded to float32. */
  readonly weight64: Float64Array;
  /** Calibration tokens, (1536, inFeatures). */
  readonly calibration: Matrix;
  /** Held-out tokens, (512, inFeatures). */
  readonly test: Matrix;
}

export function referenceLayer(): ReferenceLayer {
  const mixing = normals(BASE + 1, IN * 128).map((value) => value / Math.sqrt(128));
  const loudness = normals(BASE + 2, IN).map((value) => Math.exp(0.6 * value));
  for (let k = 0; k < 12; k++) loudness[(7 + 41 * k) % IN] *= 12;
  const z = normals(BASE + 3, 2 * OUT * IN);
  const weight64 = Float64Array.from({ length: OUT * IN }, (_, i) => {
    return (0.02 * z[2 * i] * Math.exp(0.5 * z[2 * i + 1])) / loudness[i % IN] ** 0.3;
  });
  return {
    outFeatures: OUT,
    inFeatures: IN,
    weight: Float32Array.from(weight64),
    weight64,
    calibration: tokens(mixing, loudness, BASE + 10, 1536),
    test: tokens(mixing, loudness, BASE + 20, 512),
  };
}

/** X^T of the vectors' X, which has a token a column. */
function tokens(mixing: Float64Array, loudness: Float64Array, seed: number, count: number): Matrix {
  const common = normals(seed, 128 * count);
  const own = normals(seed + 1, IN * count);
  const data = new Float32Array(count * IN);
  for (let i = 0; i < IN; i++) {
    const row = new Float64Array(count);
    for (let k = 0; k < 128; k++) {
      const a = mixing[i * 128 + k];
      for (let t = 0; t < count; t++) row[t] += a * common[k * count + t];
    }
    for (let t = 0; t < count; t++) data[t * IN + i] = loudness[i] * (0.8 * row[t] + 0.6 * own[i * count + t]);
  }
  return { rows: count, columns: IN, data };
}

/** Statistics of the given tokens; `batches` replays `replay`, all of them unless told otherwise, `batchRows` at a time. */
export function statsOf(x: Matrix, replay: Matrix = x, batchRows = replay.rows): CalibrationStats {
  const n = x.columns;
  const hessian = new Float64Array(n * n);
  for (let t = 0; t < x.rows; t++) {
    const v = x.data.subarray(t * n, (t + 1) * n);
    for (let i = 0; i < n; i++) {
      const a = v[i] / x.rows;
      for (let j = 0; j <= i; j++) hessian[i * n + j] += a * v[j];
    }
  }
  for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) hessian[j * n + i] = hessian[i * n + j];
  return {
    input: 'x',
    features: n,
    tokenCount: x.rows,
    hessian,
    async *batches() {
      for (let start = 0; start < replay.rows; start += batchRows) {
        const end = Math.min(start + batchRows, replay.rows);
        yield { rows: end - start, columns: n, data: replay.data.subarray(start * n, end * n) };
      }
    },
  };
}
