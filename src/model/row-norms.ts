/** Rows of a weight as lengths and directions (DoRA, arXiv 2402.09353). */

/** Euclidean norm of each row of a matrix. */
export function rowNorms(values: Float32Array, rows: number): Float64Array {
  const columns = values.length / rows;
  return Float64Array.from({ length: rows }, (_, i) => {
    let square = 0;
    for (let j = i * columns; j < (i + 1) * columns; j++) square += values[j] * values[j];
    return Math.sqrt(square);
  });
}

/** Multiplies each row of `weight` by its magnitude over its norm, in place. */
export function turnTo(weight: Float32Array, magnitude: Float32Array, norms: Float64Array): void {
  const n = weight.length / magnitude.length;
  for (let i = 0; i < magnitude.length; i++) {
    const factor = norms[i] > 0 ? magnitude[i] / norms[i] : 0;
    for (let j = i * n; j < (i + 1) * n; j++) weight[j] *= factor;
  }
}
