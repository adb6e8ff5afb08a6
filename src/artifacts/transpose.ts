/** Transposition of weights, tile by tile so that both sides stay in the cache. */
const TILE = 32;

/** (rows, columns) -> (columns, rows), both row-major. */
export function transpose(matrix: Float32Array, rows: number, columns: number): Float32Array {
  const result = new Float32Array(matrix.length);
  for (let r0 = 0; r0 < rows; r0 += TILE) {
    const r1 = Math.min(r0 + TILE, rows);
    for (let c0 = 0; c0 < columns; c0 += TILE) {
      const c1 = Math.min(c0 + TILE, columns);
      for (let r = r0; r < r1; r++) {
        for (let c = c0; c < c1; c++) result[c * rows + r] = matrix[r * columns + c];
      }
    }
  }
  return result;
}
