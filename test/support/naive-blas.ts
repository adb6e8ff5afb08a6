/** Matrix products one sum at a time in doubles: slow, obvious, and what the fast ones are compared with. */
import {
  type Blas,
  type GramAccumulator,
  type KlTarget,
  type Matrix,
  NotPositiveDefiniteError,
  type UpperFactor,
} from '../../src/compute/blas.ts';

/** A Blas without threads, sessions or blocking. Only for small matrices. */
export function naiveBlas(): Blas {
  return { gemm, gram, inverseFactor, pivots, meanKl, klTarget };
}

async function gemm(a: Matrix, b: Matrix, options: Parameters<Blas['gemm']>[2] = {}): Promise<Matrix> {
  const { transposeA = false, transposeB = false, alpha = 1, beta = 0 } = options;
  const [rows, inner] = transposeA ? [a.columns, a.rows] : [a.rows, a.columns];
  const [innerB, columns] = transposeB ? [b.columns, b.rows] : [b.rows, b.columns];
  const out = options.out ?? { rows, columns, data: new Float32Array(rows * columns) };
  if (inner !== innerB || out.rows !== rows || out.columns !== columns) throw new Error('shapes do not fit');
  for (const m of [a, b, out]) if (m.data.length !== m.rows * m.columns) throw new Error('data does not fit its shape');
  if (!options.out && beta !== 0) throw new Error('beta without out');
  const sums = new Float64Array(columns);
  for (let i = 0; i < rows; i++) {
    sums.fill(0);
    for (let k = 0; k < inner; k++) {
      const x = transposeA ? a.data[k * a.columns + i] : a.data[i * a.columns + k];
      for (let j = 0; j < columns; j++) sums[j] += x * (transposeB ? b.data[j * b.columns + k] : b.data[k * b.columns + j]);
    }
    for (let j = 0; j < columns; j++) {
      const before = beta === 0 ? 0 : beta * out.data[i * columns + j];
      out.data[i * columns + j] = alpha * sums[j] + before;
    }
  }
  return out;
}

function gram(features: number): GramAccumulator {
  const sums = new Float64Array(features * features);
  let tokenCount = 0;
  return {
    async add(x, mask) {
      for (let row = 0; row < x.rows; row++) {
        if (mask && mask[row] === 0) continue;
        tokenCount++;
        const v = x.data.subarray(row * features, (row + 1) * features);
        for (let i = 0; i < features; i++) for (let j = 0; j < features; j++) sums[i * features + j] += v[i] * v[j];
      }
    },
    get tokenCount() {
      return tokenCount;
    },
    finish: () => sums.map((sum) => sum / tokenCount),
  };
}

/** `H = R R^T` with R upper triangular, from the last column to the first; then R is inverted by back substitution. */
async function upper(hessian: Float64Array, n: number): Promise<Float64Array> {
  const r = new Float64Array(n * n);
  for (let j = n - 1; j >= 0; j--) {
    let pivot = hessian[j * n + j];
    for (let k = j + 1; k < n; k++) pivot -= r[j * n + k] ** 2;
    if (!(pivot > 0)) throw new NotPositiveDefiniteError(j, pivot);
    const root = Math.sqrt(pivot);
    r[j * n + j] = root;
    for (let i = 0; i < j; i++) {
      let sum = hessian[i * n + j];
      for (let k = j + 1; k < n; k++) sum -= r[i * n + k] * r[j * n + k];
      r[i * n + j] = sum / root;
    }
  }
  const u = new Float64Array(n * n);
  for (let j = 0; j < n; j++) {
    u[j * n + j] = 1 / r[j * n + j];
    for (let i = j - 1; i >= 0; i--) {
      let sum = 0;
      for (let k = i + 1; k <= j; k++) sum += r[i * n + k] * u[k * n + j];
      u[i * n + j] = -sum / r[i * n + i];
    }
  }
  return u;
}

const inverseFactor = async (hessian: Float64Array, n: number) => factorOf(await upper(hessian, n), n);

/** A dense (n, n) matrix as a factor. */
export function factorOf(dense: Float64Array, n: number): UpperFactor {
  return { readRow: (j, out) => out.set(dense.subarray(j * n + j, (j + 1) * n)) };
}

/** U whole, (n, n), as `blas` makes it. */
export async function upperOf(blas: Blas, hessian: Float64Array, n: number): Promise<Float64Array> {
  const factor = await blas.inverseFactor(hessian, n);
  const dense = new Float64Array(n * n);
  for (let j = 0; j < n; j++) factor.readRow(j, dense.subarray(j * n + j, (j + 1) * n));
  return dense;
}

/** By the definition: the reciprocal squares of U's diagonal. */
async function pivots(hessian: Float64Array, n: number): Promise<Float64Array> {
  const u = await upper(hessian, n);
  return Float64Array.from({ length: n }, (_, j) => 1 / u[j * n + j] ** 2);
}

async function meanKl(target: Matrix, trial: Matrix): Promise<number> {
  let total = 0;
  for (let row = 0; row < target.rows; row++) {
    const range = [row * target.columns, (row + 1) * target.columns] as const;
    const p = logSoftmax(target.data.subarray(...range));
    const q = logSoftmax(trial.data.subarray(...range));
    for (let j = 0; j < p.length; j++) total += Math.exp(p[j]) * (p[j] - q[j]);
  }
  return total / target.rows;
}

function logSoftmax(y: Float32Array): Float64Array {
  const logits = Float64Array.from(y);
  const top = logits.reduce((a, b) => Math.max(a, b));
  const sum = logits.reduce((total, value) => total + Math.exp(value - top), 0);
  return logits.map((value) => value - top - Math.log(sum));
}

/** Takes the target over as the real one does: its memory no longer holds the logits. */
async function klTarget(target: Matrix): Promise<KlTarget> {
  const own = { ...target, data: target.data.slice() };
  target.data.fill(Number.NaN);
  return { meanKl: (trial) => meanKl(own, trial) };
}
