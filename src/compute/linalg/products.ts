/** Products of float64 matrices, row-major, on the calling thread: for decompositions that need every digit. */

/** `A B`: (m, k) x (k, n) -> (m, n). */
export function multiply(a: Float64Array, b: Float64Array, m: number, k: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    const to = i * n;
    // Two rows of B at a time: a row of the result is loaded and stored half as often.
    let p = 0;
    for (; p + 1 < k; p += 2) {
      const [x, y] = [a[i * k + p], a[i * k + p + 1]];
      const [first, second] = [p * n, (p + 1) * n];
      for (let j = 0; j < n; j++) out[to + j] += x * b[first + j] + y * b[second + j];
    }
    if (p < k) for (let j = 0; j < n; j++) out[to + j] += a[i * k + p] * b[p * n + j];
  }
  return out;
}

/** `A^T`: (m, n) -> (n, m). */
export function transposed(a: Float64Array, m: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) out[j * m + i] = a[i * n + j];
  return out;
}

/** `A A^T`: (m, n) -> (m, m), exactly symmetric. */
export function gramOfRows(a: Float64Array, m: number, n: number): Float64Array {
  const out = new Float64Array(m * m);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j <= i; j++) {
      const [x, y] = [i * n, j * n];
      let [even, odd] = [0, 0];
      let k = 0;
      for (; k + 1 < n; k += 2) {
        even += a[x + k] * a[y + k];
        odd += a[x + k + 1] * a[y + k + 1];
      }
      if (k < n) even += a[x + k] * a[y + k];
      out[i * m + j] = even + odd;
      out[j * m + i] = even + odd;
    }
  }
  return out;
}
