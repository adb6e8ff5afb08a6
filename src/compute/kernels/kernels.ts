/**
 * Inner loops of weight quantization over one group of input columns. What they compute is said here; the WASM SIMD build
 * (assembly/, wasm-kernels.ts) is what runs, and the tests hold it to a plain twin, code for code.
 */

/** A group of columns of W, transposed: a column of W is contiguous, rows are output rows. */
export interface Group {
  /** Input columns, the group's width. */
  readonly columns: number;
  /** Output rows. */
  readonly rows: number;
  /** (columns, rows), row-major. */
  readonly values: Float32Array;
}

/**
 * Grids of all rows of a group. b >= 2 bits: scale s and integer zero z, `q = clip(round(w / s) + z, 0, 2^b - 1)`, `wq = s (q - z)`.
 * 1 bit: scale s and offset o, `q = 1 iff w >= o + s / 2`, `wq = o + s q`. 0 bits: the b >= 2 form with s = 1, z = 0, which is always 0.
 */
export interface Grid {
  /** s, (rows). */
  readonly scale: Float32Array;
  /** z, or o for 1 bit, (rows). */
  readonly shift: Float32Array;
}

/** What GPTQ leaves of a group: (columns, rows) both. */
export interface Compensated {
  readonly codes: Uint8Array;
  /** `e_j = (w_j - wq_j) / U_jj`, what later columns must make up for. */
  readonly errors: Float32Array;
}

/** A grid fitted to a group, and what it costs. */
export interface Fitted {
  /** Scales and 1-bit offsets as artifacts store them: F16 values, except outside F16's normal range. */
  readonly grid: Grid;
  /** `sum_j weight_j (w_j - wq_j)^2`, (rows). */
  readonly losses: Float32Array;
}

/** Rounding is half to even, arithmetic IEEE float32 in a fixed order, so that every implementation gives the same codes. */
export interface Kernels {
  /** Min-max grid with zero in range, or with its zero point at `2^(b-1)` when symmetric (slim-llm 4.3, section 9 for rows of zeros). b >= 2. */
  minMaxGrid(group: Group, bits: number, symmetric: boolean): Grid;
  /** The 1-bit grid: levels `mu -+ a`, `mu = mean w` (0 when symmetric), `a = mean |w|` (slim-llm 4.3). A constant row is exact. */
  twoLevelGrid(group: Group, symmetric: boolean): Grid;
  /**
   * Scales that minimise `sum weight |w - wq|^2.4` among 101 multiples of the given grid's within 10 % (slim-llm 4.3); zeros stay. b >= 2.
   * The loss of the chosen factor is within 1e-5 of the best, relatively. `weights` is laid out as the group is; absent means 1.
   */
  searchScales(group: Group, bits: number, grid: Grid, weights?: Float32Array): Float32Array;
  /** Codes (columns, rows) of plain rounding. */
  roundCodes(group: Group, bits: number, grid: Grid): Uint8Array;
  /**
   * GPTQ inside a group (slim-llm 3.4). `upper` is U of the group's columns, (columns, columns) row-major; `bits` one width a column;
   * `grid` is (rows) when all columns share it, or (columns, rows).
   */
  compensate(group: Group, upper: Float32Array, bits: Uint8Array, grid: Grid): Compensated;
  /** Grids with the least `sum_j weight_j (w_j - wq_j)^2` over scale and zero point (slim-llm 5.4); `weights` has one value a column. Any width of 1..8 bits. */
  fitWeighted(group: Group, bits: number, weights: Float32Array): Fitted;
  /**
   * One sweep of coordinate descent inside a group (slim-llm 5.8): for each column j, `wq_j <- quantise(wq_j - D_j / H_jj)`, then
   * `D_k += delta H_jk` for all columns k of the group.
   * @param decoded wq (columns, rows), as `codes` and `grid` decode; replaced
   * @param gradient D = (Wq - W) H of these columns, (columns, rows); replaced
   * @param hessian H of the group's columns among themselves, (columns, columns)
   * @returns the new codes and the changes of wq, (columns, rows) both
   */
  polish(
    decoded: Float32Array,
    gradient: Float32Array,
    hessian: Float32Array,
    bits: number,
    grid: Grid,
  ): { readonly codes: Uint8Array; readonly changes: Float32Array };
}

/** The kernels as promises: rows may be divided among worker threads. Arguments are not changed unless said so, results are those of `Kernels`. */
export type AsyncKernels = {
  readonly [K in keyof Kernels]: (...args: Parameters<Kernels[K]>) => Promise<ReturnType<Kernels[K]>>;
};
