/**
 * Products of float64 matrices, row-major, on the calling thread: for decompositions that need every digit. Blocks of both are packed into strips
 * and multiplied by a WASM kernel; the order of the sums depends on the sizes alone.
 */
import { type DenseExports, denseKernels } from '../kernels/dense.ts';

/** Rows of A, columns of B and their common side in a block: B's stays in the second cache, a strip of A in the first. */
const ROWS = 128;
const COLUMNS = 128;
const INNER = 256;
/** Below this many multiplications, packing costs more than it saves. */
const SMALL = 16 ** 3;

/** A matrix whose element (i, j) is `data[start + i down + j across]`: transposed and part matrices without a copy. */
export interface Strided {
  readonly data: Float64Array;
  readonly start: number;
  readonly down: number;
  readonly across: number;
}

/** A whole row-major matrix of `columns` columns. */
export function strided(data: Float64Array, columns: number): Strided {
  return { data, start: 0, down: columns, across: 1 };
}

/** Its transpose. */
export function turned({ data, start, down, across }: Strided): Strided {
  return { data, start, down: across, across: down };
}

export interface ProductOptions {
  /** What the product is multiplied by before it is added; 1. */
  readonly factor?: 1 | -1;
  /** Only elements on and below the diagonal are wanted. */
  readonly lower?: boolean;
}

interface Workspace {
  readonly kernels: DenseExports;
  readonly a: Float64Array;
  readonly b: Float64Array;
  readonly c: Float64Array;
}

let workspace: Workspace | undefined;

function ownWorkspace(): Workspace {
  if (!workspace) {
    const { kernels, arrays } = denseKernels([ROWS * INNER, INNER * COLUMNS, ROWS * COLUMNS]);
    workspace = { kernels, a: arrays[0], b: arrays[1], c: arrays[2] };
  }
  return workspace;
}

/** `C += factor A B`: (m, k) x (k, n) onto (m, n). */
export function addProduct(
  a: Strided,
  b: Strided,
  c: Strided,
  m: number,
  k: number,
  n: number,
  options: ProductOptions = {},
): void {
  const { factor = 1, lower = false } = options;
  if (m * k * n <= SMALL) {
    addSmall(a, b, c, m, k, n, factor);
    return;
  }
  const work = ownWorkspace();
  for (let p = 0; p < k; p += INNER) {
    const inner = Math.min(INNER, k - p);
    for (let j = 0; j < n; j += COLUMNS) {
      const columns = Math.min(COLUMNS, n - j);
      packStrips(turned(b), j, columns, p, inner, work.b);
      for (let i = lower ? Math.floor(j / ROWS) * ROWS : 0; i < m; i += ROWS) {
        const rows = Math.min(ROWS, m - i);
        packStrips(a, i, rows, p, inner, work.a);
        const width = (columns + 3) & ~3;
        const { a: left, b: right, c: out } = work;
        work.kernels.multiplyPacked(left.byteOffset, right.byteOffset, out.byteOffset, (rows + 3) & ~3, inner, width);
        addBlock(out, width, c, i, j, rows, columns, factor);
      }
    }
  }
}

/** Rows `from .. from + count` of a matrix, columns `p .. p + inner`, in strips of four rows; rows that are missing in the last are zeros. */
function packStrips(
  { data, start, down, across }: Strided,
  from: number,
  count: number,
  p: number,
  inner: number,
  out: Float64Array,
) {
  for (let strip = 0; strip < count; strip += 4) {
    const at = strip * inner;
    for (let row = 0; row < 4; row++) {
      let source = start + (from + strip + row) * down + p * across;
      const end = at + row + 4 * inner;
      if (strip + row < count) {
        for (let to = at + row; to < end; to += 4) {
          out[to] = data[source];
          source += across;
        }
      } else for (let to = at + row; to < end; to += 4) out[to] = 0;
    }
  }
}

function addBlock(
  block: Float64Array,
  width: number,
  { data, start, down, across }: Strided,
  i: number,
  j: number,
  rows: number,
  columns: number,
  factor: number,
): void {
  for (let row = 0; row < rows; row++) {
    let to = start + (i + row) * down + j * across;
    const from = row * width;
    for (let column = 0; column < columns; column++) {
      data[to] += factor * block[from + column];
      to += across;
    }
  }
}

function addSmall(a: Strided, b: Strided, c: Strided, m: number, k: number, n: number, factor: number): void {
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let p = 0; p < k; p++)
        sum += a.data[a.start + i * a.down + p * a.across] * b.data[b.start + p * b.down + j * b.across];
      c.data[c.start + i * c.down + j * c.across] += factor * sum;
    }
  }
}

/** `A B`: (m, k) x (k, n) -> (m, n). */
export function multiply(a: Float64Array, b: Float64Array, m: number, k: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  addProduct(strided(a, k), strided(b, n), strided(out, n), m, k, n);
  return out;
}

/** `A^T B`: (k, m) and (k, n) -> (m, n). */
export function multiplyTransposed(a: Float64Array, b: Float64Array, m: number, k: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  addProduct(turned(strided(a, m)), strided(b, n), strided(out, n), m, k, n);
  return out;
}

/** `A^T`: (m, n) -> (n, m). */
export function transposed(a: Float64Array, m: number, n: number): Float64Array {
  const out = new Float64Array(m * n);
  // In squares: rows of both stay in the cache.
  for (let top = 0; top < m; top += 32) {
    for (let left = 0; left < n; left += 32) {
      for (let i = top; i < Math.min(m, top + 32); i++) {
        for (let j = left; j < Math.min(n, left + 32); j++) out[j * m + i] = a[i * n + j];
      }
    }
  }
  return out;
}

/** `A A^T`: (m, n) -> (m, m), exactly symmetric. */
export function gramOfRows(a: Float64Array, m: number, n: number): Float64Array {
  const rows = strided(a, n);
  return symmetricProduct(rows, turned(rows), m, n);
}

/** `A^T A`: (m, n) -> (n, n), exactly symmetric. */
export function gramOfColumns(a: Float64Array, m: number, n: number): Float64Array {
  const rows = strided(a, n);
  return symmetricProduct(turned(rows), rows, n, m);
}

function symmetricProduct(a: Strided, b: Strided, m: number, k: number): Float64Array {
  const out = new Float64Array(m * m);
  addProduct(a, b, strided(out, m), m, k, m, { lower: true });
  for (let i = 0; i < m; i++) for (let j = 0; j < i; j++) out[j * m + i] = out[i * m + j];
  return out;
}
