/** Inner loops of dense float64 matrices. All arguments ending in `At` are byte offsets into memory that the caller manages. */

/** First free byte of the memory. */
export function memoryStart(): usize {
  return __heap_base;
}

/**
 * `C = A B` of packed blocks: A in strips of four rows, each with `inner` groups of four; B in strips of four columns likewise; C (rows, columns)
 * row-major. Rows and columns are multiples of four.
 */
export function multiplyPacked(aAt: usize, bAt: usize, cAt: usize, rows: i32, inner: i32, columns: i32): void {
  const strip = <usize>inner << 5;
  const line = <usize>columns << 3;
  for (let j = 0; j < columns; j += 4) {
    const bStrip = bAt + <usize>(j >> 2) * strip;
    for (let i = 0; i < rows; i += 4) {
      let a = aAt + <usize>(i >> 2) * strip;
      let b = bStrip;
      const end = b + strip;
      let c00 = f64x2.splat(0);
      let c01 = f64x2.splat(0);
      let c10 = f64x2.splat(0);
      let c11 = f64x2.splat(0);
      let c20 = f64x2.splat(0);
      let c21 = f64x2.splat(0);
      let c30 = f64x2.splat(0);
      let c31 = f64x2.splat(0);
      while (b < end) {
        const b0 = v128.load(b);
        const b1 = v128.load(b, 16);
        const a0 = v128.load64_splat(a);
        c00 = f64x2.add(c00, f64x2.mul(a0, b0));
        c01 = f64x2.add(c01, f64x2.mul(a0, b1));
        const a1 = v128.load64_splat(a, 8);
        c10 = f64x2.add(c10, f64x2.mul(a1, b0));
        c11 = f64x2.add(c11, f64x2.mul(a1, b1));
        const a2 = v128.load64_splat(a, 16);
        c20 = f64x2.add(c20, f64x2.mul(a2, b0));
        c21 = f64x2.add(c21, f64x2.mul(a2, b1));
        const a3 = v128.load64_splat(a, 24);
        c30 = f64x2.add(c30, f64x2.mul(a3, b0));
        c31 = f64x2.add(c31, f64x2.mul(a3, b1));
        a += 32;
        b += 32;
      }
      const c = cAt + <usize>i * line + (<usize>j << 3);
      v128.store(c, c00);
      v128.store(c, c01, 16);
      v128.store(c + line, c10);
      v128.store(c + line, c11, 16);
      v128.store(c + 2 * line, c20);
      v128.store(c + 2 * line, c21, 16);
      v128.store(c + 3 * line, c30);
      v128.store(c + 3 * line, c31, 16);
    }
  }
}

/**
 * One step of the reduction to tridiagonal form: `A -= v w^T + w v^T` on the lower triangle of the leading (n, n) part of a matrix with `stride` bytes
 * from row to row, and `y = A u`, in one pass over it.
 */
export function updateAndMultiply(
  matrixAt: usize,
  stride: usize,
  n: i32,
  vAt: usize,
  wAt: usize,
  uAt: usize,
  yAt: usize,
): void {
  memory.fill(yAt, 0, <usize>n << 3);
  for (let i = 0; i < n; i++) {
    const row = matrixAt + <usize>i * stride;
    const at = <usize>i << 3;
    const v = v128.load64_splat(vAt + at);
    const w = v128.load64_splat(wAt + at);
    const u = v128.load64_splat(uAt + at);
    let along0 = f64x2.splat(0);
    let along1 = f64x2.splat(0);
    let j: usize = 0;
    for (; j + 32 <= at; j += 32) {
      const a0 = f64x2.sub(v128.load(row + j), f64x2.add(f64x2.mul(v, v128.load(wAt + j)), f64x2.mul(w, v128.load(vAt + j))));
      const a1 = f64x2.sub(
        v128.load(row + j, 16),
        f64x2.add(f64x2.mul(v, v128.load(wAt + j, 16)), f64x2.mul(w, v128.load(vAt + j, 16))),
      );
      v128.store(row + j, a0);
      v128.store(row + j, a1, 16);
      along0 = f64x2.add(along0, f64x2.mul(a0, v128.load(uAt + j)));
      along1 = f64x2.add(along1, f64x2.mul(a1, v128.load(uAt + j, 16)));
      v128.store(yAt + j, f64x2.add(v128.load(yAt + j), f64x2.mul(a0, u)));
      v128.store(yAt + j, f64x2.add(v128.load(yAt + j, 16), f64x2.mul(a1, u)), 16);
    }
    const along = f64x2.add(along0, along1);
    let sum = f64x2.extract_lane(along, 0) + f64x2.extract_lane(along, 1);
    const v0 = load<f64>(vAt + at);
    const w0 = load<f64>(wAt + at);
    const u0 = load<f64>(uAt + at);
    for (; j < at; j += 8) {
      const a = load<f64>(row + j) - (v0 * load<f64>(wAt + j) + w0 * load<f64>(vAt + j));
      store<f64>(row + j, a);
      sum += a * load<f64>(uAt + j);
      store<f64>(yAt + j, load<f64>(yAt + j) + a * u0);
    }
    const diagonal = load<f64>(row + at) - 2 * v0 * w0;
    store<f64>(row + at, diagonal);
    store<f64>(yAt + at, load<f64>(yAt + at) + sum + diagonal * u0);
  }
}
