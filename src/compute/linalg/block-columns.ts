/** The lower triangle of a square fp64 matrix, kept as block columns whose rows are contiguous, so that BLAS reads parts of it in place. */

/** Columns of one block: the part outside BLAS grows with it, the speed of a product with so short an inner side falls below it. */
export const BLOCK = 256;

/** `c = (subtract ? c - : ) a op(b)`; `a` is (rows, inner), `c` (rows, columns), `b` (inner, columns) or, transposed, (columns, inner). */
export type Product64 = (product: {
  readonly a: Float64Array;
  readonly b: Float64Array;
  readonly c: Float64Array;
  readonly rows: number;
  readonly inner: number;
  readonly columns: number;
  readonly transposeB?: boolean;
  readonly subtract?: boolean;
}) => Promise<void>;

/** Block column j holds rows `start(j)..n` of columns `start(j)..start(j) + width(j)`, row-major: half the memory of the square. */
export class BlockColumns {
  readonly n: number;
  readonly block: number;
  /** Number of block columns. */
  readonly count: number;
  readonly columns: Float64Array[] = [];

  constructor(n: number, block: number) {
    this.n = n;
    this.block = block;
    this.count = Math.ceil(n / block);
    for (let j = 0; j < this.count; j++) this.columns.push(new Float64Array(this.height(j) * this.width(j)));
  }

  start(j: number): number {
    return j * this.block;
  }

  width(j: number): number {
    return Math.min(this.block, this.n - this.start(j));
  }

  height(j: number): number {
    return this.n - this.start(j);
  }

  /** Rows `start(k)..n` of block column j, a view. */
  from(j: number, k: number): Float64Array {
    return this.columns[j].subarray((this.start(k) - this.start(j)) * this.width(j));
  }

  /** The block in block row k of block column j, (width(k), width(j)), a view. */
  tile(j: number, k: number): Float64Array {
    return this.from(j, k).subarray(0, this.width(k) * this.width(j));
  }
}

/** The lower triangle of the matrix with rows and columns reversed: element (i, j) is `matrix[n - 1 - i, n - 1 - j]`. */
export function reversedLower(matrix: Float64Array, n: number, block: number): BlockColumns {
  const lower = new BlockColumns(n, block);
  for (let j = 0; j < lower.count; j++) {
    const start = lower.start(j);
    const width = lower.width(j);
    const column = lower.columns[j];
    for (let row = start; row < n; row++) {
      const from = (n - row) * n - 1 - start;
      const to = (row - start) * width;
      const end = Math.min(width, row - start + 1);
      for (let i = 0; i < end; i++) column[to + i] = matrix[from - i];
    }
  }
  return lower;
}

/** Row j from its diagonal on of the upper triangular matrix whose reversal `lower` is. */
export function reversedRow(lower: BlockColumns, j: number, out: Float32Array | Float64Array): void {
  const row = lower.n - 1 - j;
  for (let k = 0; lower.start(k) <= row && k < lower.count; k++) {
    const start = lower.start(k);
    const from = (row - start) * lower.width(k);
    const column = lower.columns[k];
    const end = Math.min(lower.width(k), row - start + 1);
    for (let i = 0; i < end; i++) out[row - start - i] = column[from + i];
  }
}
