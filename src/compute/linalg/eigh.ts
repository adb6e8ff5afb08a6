/** Eigenvalues and eigenvectors of a symmetric matrix in float64: Householder to tridiagonal form, then implicit QL (EISPACK tred2, tql2). */

export interface Eigh {
  /** Descending, (n). */
  readonly values: Float64Array;
  /** Row i is the eigenvector of `values[i]`, of length 1; (n, n). */
  readonly vectors: Float64Array;
}

/** Iterations for one eigenvalue; a handful is usual. */
const MOST_ITERATIONS = 60;

/**
 * `matrix` (n, n) symmetric, not modified. Exact to about 1e-15 of the largest eigenvalue; deterministic. 9 n^3 flops on one thread.
 * Throws Error when it does not converge, which no finite matrix is known to do.
 */
export function eigh(matrix: Float64Array, n: number): Eigh {
  // Rows of z are what the textbook has in columns, so that every rotation goes along memory.
  const z = matrix.slice();
  const diagonal = new Float64Array(n);
  const beside = new Float64Array(n);
  tridiagonalize(z, diagonal, beside, n);
  iterate(z, diagonal, beside, n);
  const order = Uint32Array.from(diagonal.keys()).sort((a, b) => diagonal[b] - diagonal[a] || a - b);
  const vectors = new Float64Array(n * n);
  order.forEach((from, to) => {
    vectors.set(z.subarray(from * n, (from + 1) * n), to * n);
  });
  return { values: Float64Array.from(order, (i) => diagonal[i]), vectors };
}

/** Leaves Q^T in `z`, with `Q^T A Q` tridiagonal: `diagonal`, and `beside[i]` left of it in row i. */
function tridiagonalize(z: Float64Array, diagonal: Float64Array, beside: Float64Array, n: number): void {
  for (let i = n - 1; i > 0; i--) {
    const row = i * n;
    let scale = 0;
    for (let k = 0; k < i; k++) scale += Math.abs(z[row + k]);
    let h = 0;
    if (i === 1 || scale === 0) {
      beside[i] = z[row + i - 1];
    } else {
      for (let k = 0; k < i; k++) {
        z[row + k] /= scale;
        h += z[row + k] ** 2;
      }
      const f = z[row + i - 1];
      const g = f >= 0 ? -Math.sqrt(h) : Math.sqrt(h);
      beside[i] = scale * g;
      h -= f * g;
      z[row + i - 1] = f - g;
      // p = A u / h, the lower triangle standing for both.
      beside.fill(0, 0, i);
      for (let j = 0; j < i; j++) {
        const at = j * n;
        const u = z[row + j];
        let sum = z[at + j] * u;
        for (let k = 0; k < j; k++) {
          sum += z[at + k] * z[row + k];
          beside[k] += z[at + k] * u;
        }
        beside[j] += sum;
      }
      let along = 0;
      for (let j = 0; j < i; j++) {
        beside[j] /= h;
        along += beside[j] * z[row + j];
      }
      const half = along / (h + h);
      for (let j = 0; j < i; j++) beside[j] -= half * z[row + j];
      for (let j = 0; j < i; j++) {
        const at = j * n;
        const [u, q] = [z[row + j], beside[j]];
        for (let k = 0; k <= j; k++) z[at + k] -= u * beside[k] + q * z[row + k];
      }
    }
    diagonal[i] = h;
  }
  // The products of the reflections, smallest first; reflection i is in row i, and its scale in diagonal[i].
  const reflections = z.slice();
  diagonal[0] = 0;
  const scales = diagonal.slice();
  for (let i = 0; i < n; i++) diagonal[i] = z[i * n + i];
  z.fill(0);
  for (let i = 0; i < n; i++) z[i * n + i] = 1;
  const product = new Float64Array(n);
  for (let i = 1; i < n; i++) {
    if (scales[i] === 0) continue;
    const row = i * n;
    // Q <- Q (I - u u^T / h) on the leading part, kept turned: rows of z below i.
    product.fill(0, 0, i);
    for (let k = 0; k < i; k++) {
      const u = reflections[row + k];
      if (u === 0) continue;
      for (let j = 0; j < i; j++) product[j] += u * z[k * n + j];
    }
    for (let k = 0; k < i; k++) {
      const u = reflections[row + k] / scales[i];
      if (u === 0) continue;
      for (let j = 0; j < i; j++) z[k * n + j] -= u * product[j];
    }
  }
  // z holds Q (rows in the old basis); the iteration wants Q^T.
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < i; j++) {
      const swap = z[i * n + j];
      z[i * n + j] = z[j * n + i];
      z[j * n + i] = swap;
    }
  }
}

/** Diagonalizes the tridiagonal matrix; rows of `z` are turned along. */
function iterate(z: Float64Array, d: Float64Array, e: Float64Array, n: number): void {
  for (let i = 1; i < n; i++) e[i - 1] = e[i];
  if (n > 0) e[n - 1] = 0;
  for (let l = 0; l < n; l++) {
    for (let iteration = 0; ; iteration++) {
      let m = l;
      for (; m < n - 1; m++) {
        const size = Math.abs(d[m]) + Math.abs(d[m + 1]);
        if (Math.abs(e[m]) <= Number.EPSILON * size) break;
      }
      if (m === l) break;
      if (iteration === MOST_ITERATIONS) throw new Error(`eigenvalue ${l} of ${n} does not converge`);
      let g = (d[l + 1] - d[l]) / (2 * e[l]);
      let r = Math.hypot(g, 1);
      g = d[m] - d[l] + e[l] / (g + (g >= 0 ? r : -r));
      let [s, c, p] = [1, 1, 0];
      let i = m - 1;
      for (; i >= l; i--) {
        const f = s * e[i];
        const b = c * e[i];
        r = Math.hypot(f, g);
        e[i + 1] = r;
        if (r === 0) {
          d[i + 1] -= p;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        const [low, high] = [i * n, (i + 1) * n];
        for (let k = 0; k < n; k++) {
          const x = z[high + k];
          const y = z[low + k];
          z[high + k] = s * y + c * x;
          z[low + k] = c * y - s * x;
        }
      }
      if (r === 0 && i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0;
    }
  }
}
