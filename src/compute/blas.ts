/** Matrix products, injected into methods so that a method never opens a session itself. Everything is row-major. */

export interface Matrix {
  readonly rows: number;
  readonly columns: number;
  /** (rows, columns) */
  readonly data: Float32Array;
}

/** An upper triangular matrix, in whatever way it is kept: whole it would be twice as large, at the moment of highest memory. */
export interface UpperFactor {
  /** Row j from its diagonal on, n - j elements, into `out`. */
  readRow(j: number, out: Float32Array | Float64Array): void;
}

/** Dense products on an Engine. All calls may run on several threads; results on one engine are deterministic. */
export interface Blas {
  /**
   * `out = alpha * op(a) * op(b) + beta * out`; returns `out` (allocated when absent, then `beta` must be absent or 0).
   * `op` transposes when asked. `out.data` may be a view into a larger array.
   */
  gemm(
    a: Matrix,
    b: Matrix,
    options?: {
      readonly transposeA?: boolean;
      readonly transposeB?: boolean;
      readonly alpha?: number;
      readonly beta?: number;
      readonly out?: Matrix;
    },
  ): Promise<Matrix>;
  /** Starts accumulating `sum x x^T` over tokens, in fp64 across calls; `x` is (tokens, features). */
  gram(features: number): GramAccumulator;
  /**
   * Upper triangular U with `H^-1 = U^T U`, by one Cholesky of the row-and-column-reversed H and one triangular inverse
   * (slim-llm, section 3.2). `hessian` is (n, n) symmetric, not modified. Throws NotPositiveDefiniteError.
   */
  inverseFactor(hessian: Float64Array, n: number): Promise<UpperFactor>;
  /**
   * `R_jj^2 = 1 / U_jj^2` alone, (n): what `inverseFactor` begins with, at half its work. `hessian` is not modified. Throws
   * NotPositiveDefiniteError.
   */
  pivots(hessian: Float64Array, n: number): Promise<Float64Array>;
  /** Mean over rows of `KL(softmax(target row) || softmax(trial row))`, in nats; log-softmax in fp32 or better, no clamps. */
  meanKl(target: Matrix, trial: Matrix): Promise<number>;
  /**
   * The same against one target many times, at half the work. Takes `target.data` over: it is overwritten. So is `memory`, of the same
   * length, when it is given: for a caller with many targets, one after the other.
   */
  klTarget(target: Matrix, memory?: Float32Array): Promise<KlTarget>;
}

/** A target distribution per row, ready to be compared with. */
export interface KlTarget {
  /** Mean over rows of `KL(target || softmax(trial row))`, in nats; exactly 0 for the target's own logits. */
  meanKl(trial: Matrix): Promise<number>;
}

export interface GramAccumulator {
  /** Adds the tokens of `x` (tokens, features); rows with `mask[row] === 0` are left out. */
  add(x: Matrix, mask?: Uint8Array): Promise<void>;
  /** Tokens added so far. */
  readonly tokenCount: number;
  /** `sum x x^T / tokenCount`, (features, features), full and exactly symmetric. Ends the accumulation. */
  finish(): Float64Array;
}

/** The matrix is not positive definite: more damping is needed. */
export class NotPositiveDefiniteError extends Error {
  /** Index of the first pivot that was not positive. */
  readonly pivot: number;
  /** What it was. */
  readonly value: number;
  constructor(pivot: number, value: number) {
    super(`pivot ${pivot} of the Cholesky factorization is ${value}, not positive`);
    this.pivot = pivot;
    this.value = value;
  }
}
