/** Rows divided by a symmetric positive definite matrix, by its blocked Cholesky factor. */
import { BLOCK, BlockColumns, type Product64 } from './block-columns.ts';
import { choleskyBlocked } from './cholesky.ts';
import { addProduct, type Strided, strided, turned } from './products.ts';

/** `X <- X A^-1`: x is (rows, n), replaced; `matrix` (n, n), of which only what is on and below the diagonal is read. Throws NotPositiveDefiniteError. */
export async function solveRows(x: Float64Array, rows: number, matrix: Float64Array, n: number): Promise<void> {
  const lower = new BlockColumns(n, BLOCK);
  for (let j = 0; j < lower.count; j++) {
    const [from, width] = [lower.start(j), lower.width(j)];
    for (let i = from; i < n; i++) lower.columns[j].set(matrix.subarray(i * n + from, i * n + from + width), (i - from) * width);
  }
  const inverses = await choleskyBlocked(lower, onThisThread);
  const part = (j: number): Strided => ({ data: x, start: lower.start(j), down: n, across: 1 });
  const tile = (j: number, k: number) => strided(lower.tile(j, k), lower.width(j));
  // X L^T = B from the left, then Y L = X from the right; a division by a diagonal block is a product with its inverse.
  for (let j = 0; j < lower.count; j++) {
    for (let k = 0; k < j; k++) {
      addProduct(part(k), turned(tile(k, j)), part(j), rows, lower.width(k), lower.width(j), { factor: -1 });
    }
    replace(part(j), turned(strided(inverses[j], lower.width(j))), rows, lower.width(j));
  }
  for (let j = lower.count - 1; j >= 0; j--) {
    for (let k = j + 1; k < lower.count; k++) {
      addProduct(part(k), tile(j, k), part(j), rows, lower.width(k), lower.width(j), { factor: -1 });
    }
    replace(part(j), strided(inverses[j], lower.width(j)), rows, lower.width(j));
  }
}

/** `X <- X B`, B (width, width). */
function replace(x: Strided, b: Strided, rows: number, width: number): void {
  const product = strided(new Float64Array(rows * width), width);
  addProduct(x, b, product, rows, width, width);
  for (let i = 0; i < rows; i++) {
    x.data.set(product.data.subarray(i * width, (i + 1) * width), x.start + i * x.down);
  }
}

const onThisThread: Product64 = async ({ a, b, c, rows, inner, columns, transposeB, subtract }) => {
  if (!subtract) c.fill(0);
  const right = transposeB ? turned(strided(b, inner)) : strided(b, columns);
  addProduct(strided(a, inner), right, strided(c, columns), rows, inner, columns, { factor: subtract ? -1 : 1 });
};
