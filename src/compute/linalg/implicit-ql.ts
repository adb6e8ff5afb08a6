/** Eigenvalues and eigenvectors of a small tridiagonal matrix: implicit QL (EISPACK tql2). */

/** Iterations for one eigenvalue; a handful is usual. */
const MOST_ITERATIONS = 60;

/**
 * Diagonalizes: `d` becomes the eigenvalues, in no order, and row i of `z` (n, n) the eigenvector of `d[i]`, turned from what it was. `e[i]` stands
 * between `d[i]` and `d[i + 1]`, `e[n - 1]` is room; it is used up. Throws Error when it does not converge.
 */
export function implicitQl(z: Float64Array, d: Float64Array, e: Float64Array, n: number): void {
  if (n > 0) e[n - 1] = 0;
  // Beside the whole matrix: beside two diagonal elements that are rounding themselves, nothing would ever be small.
  let negligible = 0;
  for (let i = 0; i < n; i++) negligible = Math.max(negligible, Number.EPSILON * (Math.abs(d[i]) + Math.abs(e[i])));
  for (let l = 0; l < n; l++) {
    for (let iteration = 0; ; iteration++) {
      let m = l;
      for (; m < n - 1; m++) {
        if (Math.abs(e[m]) <= negligible) break;
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
