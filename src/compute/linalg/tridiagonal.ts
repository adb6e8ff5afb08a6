/** Reduction of a symmetric matrix to tridiagonal form by reflections, in one pass over the matrix for each, and the way back by products. */
import { denseKernels } from '../kernels/dense.ts';
import { addProduct, type Strided, strided, turned } from './products.ts';

/** Reflections that are applied together on the way back. */
const PANEL = 64;

/** `A = Q T Q^T`. */
export interface Tridiagonal {
  readonly n: number;
  /** T's diagonal. */
  readonly diagonal: Float64Array;
  /** `beside[i]` between `diagonal[i]` and `diagonal[i + 1]`; n long. */
  readonly beside: Float64Array;
  /** Row i has the reflection `I - u u^T / scale_i` of the first i components; Q is the product of those from the last to row 1. */
  readonly reflections: Float64Array;
  /** Floats from one row of `reflections` to the next. */
  readonly stride: number;
  /** 0: no reflection. */
  readonly scales: Float64Array;
}

/** Floats from one row to the next: no power of two, so that rows do not fight for the same cache sets. */
function strideOf(n: number): number {
  return 8 * Math.ceil(n / 8) + 8;
}

/** Rows of the largest matrix that `tridiagonalize` takes: its float64 fill the 4 GiB that a kernel addresses. */
export const LARGEST = 23_160;

/** Of `matrix / scale`, which is (n, n) and symmetric: only what is on and below the diagonal is read. (4/3) n^3 flops. Throws UnsupportedError for one that does not fit. */
export function tridiagonalize(matrix: Float64Array, n: number, scale: number): Tridiagonal {
  const stride = strideOf(n);
  const { kernels, arrays } = denseKernels([n * stride, n, n, n, n]);
  const [a, v, w, u, y] = arrays;
  for (let i = 0; i < n; i++) for (let j = 0; j <= i; j++) a[i * stride + j] = matrix[i * n + j] / scale;
  const diagonal = new Float64Array(n);
  const beside = new Float64Array(n);
  const scales = new Float64Array(n);
  // A - v w^T - w v^T is due when row i is looked at, and is done with the product of the next reflection.
  for (let i = n - 1; i >= 0; i--) {
    const row = i * stride;
    for (let j = 0; j <= i; j++) a[row + j] -= v[i] * w[j] + w[i] * v[j];
    diagonal[i] = a[row + i];
    if (i === 0) break;
    let rest = 0;
    for (let j = 0; j < i - 1; j++) rest += a[row + j] ** 2;
    const last = a[row + i - 1];
    if (rest === 0) {
      beside[i - 1] = last;
      u.fill(0, 0, i);
    } else {
      const length = Math.sqrt(rest + last * last);
      const image = last >= 0 ? -length : length;
      beside[i - 1] = image;
      scales[i] = rest + last * last - last * image;
      a[row + i - 1] = last - image;
      u.set(a.subarray(row, row + i));
    }
    kernels.updateAndMultiply(a.byteOffset, 8 * stride, i, v.byteOffset, w.byteOffset, u.byteOffset, y.byteOffset);
    v.set(u.subarray(0, i));
    if (scales[i] === 0) {
      w.fill(0, 0, i);
      continue;
    }
    let along = 0;
    for (let j = 0; j < i; j++) along += u[j] * y[j];
    const half = along / (2 * scales[i]);
    for (let j = 0; j < i; j++) w[j] = (y[j] - half * u[j]) / scales[i];
  }
  return { n, diagonal, beside, reflections: a, stride, scales };
}

/** Turns rows that are eigenvectors of T into eigenvectors of A: `Z <- Z Q^T`, `z` being (count, n), in place. */
export function turnBack({ n, reflections, stride, scales }: Tridiagonal, z: Float64Array, count: number): void {
  const rows = strided(z, n);
  for (let from = 1; from < n; from += PANEL) {
    const size = Math.min(PANEL, n - from);
    const length = from + size - 1;
    // U^T (size, length), zeros where a reflection is shorter.
    const vectors = new Float64Array(size * length);
    for (let k = 0; k < size; k++) {
      const at = (from + k) * stride;
      if (scales[from + k] !== 0) vectors.set(reflections.subarray(at, at + from + k), k * length);
    }
    const u = strided(vectors, length);
    const factor = strided(panelFactor(u, scales.subarray(from, from + size), size, length), size);
    // Z <- Z - (Z U) T U^T.
    const along: Strided = strided(new Float64Array(count * size), size);
    addProduct(rows, turned(u), along, count, length, size);
    const scaled: Strided = strided(new Float64Array(count * size), size);
    addProduct(along, factor, scaled, count, size, size);
    addProduct(scaled, u, rows, count, size, length, { factor: -1 });
  }
}

/** Upper triangular T with `H_1 H_2 ... = I - U T U^T`, `H_k = I - u_k u_k^T / scale_k`. */
function panelFactor(u: Strided, scales: Float64Array, size: number, length: number): Float64Array {
  const gram = new Float64Array(size * size);
  addProduct(u, turned(u), strided(gram, size), size, length, size);
  const t = new Float64Array(size * size);
  for (let k = 0; k < size; k++) {
    if (scales[k] === 0) continue;
    const tau = 1 / scales[k];
    t[k * size + k] = tau;
    for (let i = 0; i < k; i++) {
      let sum = 0;
      for (let p = i; p < k; p++) sum += t[i * size + p] * gram[p * size + k];
      t[i * size + k] = -tau * sum;
    }
  }
  return t;
}
