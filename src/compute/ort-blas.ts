/** Blas on an Engine: a handful of tiny graphs with symbolic dimensions, run over the callers' own memory. */
import {
  type Blas,
  type GramAccumulator,
  type KlTarget,
  type Matrix,
  NotPositiveDefiniteError,
  type UpperFactor,
} from './blas.ts';
import type { Engine, NdArray, Program } from './engine.ts';
import { Staging, TiledGram, type TileProduct } from './gram.ts';
import { type Compile, meanKl, PreparedKl } from './kl.ts';
import { BLOCK, type Product64, reversedLower, reversedRow } from './linalg/block-columns.ts';
import { choleskyBlocked } from './linalg/cholesky.ts';
import { invertBlocked } from './linalg/triangular.ts';
import { type LiteralNode, type LiteralValues, literalGraph } from './literal-graph.ts';

/**
 * Operations per byte moved from which a product runs on the device: a bus of 12 GB/s then feeds 0.8 TFLOP/s, more than the cores make.
 * Cubes of 512 reach it; updates by blocks of 128 columns do not.
 */
const WORTH_MOVING = 64;

/** Blas on the engine; its programs are the engine's, so there is nothing to dispose. */
export function createBlas(engine: Engine): Blas {
  return new EngineBlas(engine);
}

class EngineBlas implements Blas {
  readonly #engine: Engine;
  readonly #staging = new Staging();

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  async gemm(
    a: Matrix,
    b: Matrix,
    options: { transposeA?: boolean; transposeB?: boolean; alpha?: number; beta?: number; out?: Matrix } = {},
  ): Promise<Matrix> {
    const { transposeA = false, transposeB = false, alpha = 1, beta = 0 } = options;
    const [rows, inner] = transposeA ? [a.columns, a.rows] : [a.rows, a.columns];
    const [innerB, columns] = transposeB ? [b.columns, b.rows] : [b.rows, b.columns];
    if (inner !== innerB) throw new Error(`gemm: (${rows}, ${inner}) times (${innerB}, ${columns}): the inner sides differ`);
    if (options.out === undefined && beta !== 0) throw new Error(`gemm: beta is ${beta}, but there is no out to multiply by it`);
    const out = options.out ?? { rows, columns, data: new Float32Array(rows * columns) };
    if (out.rows !== rows || out.columns !== columns) {
      throw new Error(`gemm: the result is (${rows}, ${columns}), but out is (${out.rows}, ${out.columns})`);
    }
    if (rows * columns === 0) return out;
    if (inner === 0) {
      for (let i = 0; i < out.data.length; i++) out.data[i] = beta === 0 ? 0 : out.data[i] * beta;
      return out;
    }
    const y = matrixArray(out);
    const feeds: Record<string, NdArray> = {
      a: matrixArray(a),
      b: matrixArray(b),
      c: y,
      alpha: scalar(alpha),
      beta: scalar(beta),
    };
    const engine = await this.#engineFor(rows, inner, columns);
    const program = await gemmProgram(engine, { dtype: 'F32', transposeA, transposeB, alpha, beta });
    await program.run(feeds, { into: { y } });
    return out;
  }

  gram(features: number): GramAccumulator {
    return new TiledGram(features, this.#staging, this.#tile);
  }

  async inverseFactor(hessian: Float64Array, n: number): Promise<UpperFactor> {
    // With J the reversal, J H J = L L^T gives H = R R^T for R = J L J, upper triangular, and U = R^-1 = J L^-1 J.
    const { lower, inverses, product } = await this.#factor('inverseFactor', hessian, n);
    await invertBlocked(lower, inverses, product);
    return { readRow: (j, out) => reversedRow(lower, j, out) };
  }

  async pivots(hessian: Float64Array, n: number): Promise<Float64Array> {
    const { lower } = await this.#factor('pivots', hessian, n);
    const pivots = new Float64Array(n);
    for (let j = 0; j < n; j++) {
      const column = Math.floor(j / BLOCK);
      const at = j - lower.start(column);
      pivots[n - 1 - j] = lower.columns[column][at * lower.width(column) + at] ** 2;
    }
    return pivots;
  }

  /** L of the reversed matrix, the inverses of its diagonal blocks, and what multiplies on. */
  async #factor(caller: string, hessian: Float64Array, n: number) {
    if (hessian.length !== n * n) throw new Error(`${caller}: ${hessian.length} elements are not (${n}, ${n})`);
    const engine = await this.#exactEngine();
    const product: Product64 = async ({ a, b, c, rows, inner, columns, transposeB = false, subtract = false }) => {
      const scalars = subtract ? { alpha: -1, beta: 1 } : { alpha: 1, beta: 0 };
      const program = await gemmProgram(engine, { dtype: 'F64', transposeA: false, transposeB, ...scalars });
      const y: NdArray = { dtype: 'F64', shape: [rows, columns], data: c };
      const shapeB = transposeB ? [columns, inner] : [inner, columns];
      const feeds = {
        a: { dtype: 'F64', shape: [rows, inner], data: a },
        b: { dtype: 'F64', shape: shapeB, data: b },
        c: y,
      } as const;
      await program.run(feeds, { into: { y } });
    };
    const lower = reversedLower(hessian, n, BLOCK);
    try {
      return { lower, inverses: await choleskyBlocked(lower, product), product };
    } catch (error) {
      if (error instanceof NotPositiveDefiniteError) throw new NotPositiveDefiniteError(n - 1 - error.pivot, error.value);
      throw error;
    }
  }

  meanKl(target: Matrix, trial: Matrix): Promise<number> {
    return meanKl(this.#compileExact, target, trial);
  }

  klTarget(target: Matrix, memory?: Float32Array): Promise<KlTarget> {
    return PreparedKl.prepare(this.#compileExact, target, memory);
  }

  async #exactEngine(): Promise<Engine> {
    return (await this.#engine.doublePrecision?.()) ?? this.#engine;
  }

  /** Divergences are compared to the sixth digit and read their logits once: exact logarithms are worth more than a device's speed. */
  readonly #compileExact: Compile = async (model, options) => (await this.#exactEngine()).compile(model, options);

  /** The device, for products that are worth the way there and back. */
  async #engineFor(rows: number, inner: number, columns: number): Promise<Engine> {
    if (this.#engine.device === 'cpu') return this.#engine;
    const bytes = 4 * (rows * inner + inner * columns + 2 * rows * columns);
    return (2 * rows * inner * columns) / bytes < WORTH_MOVING ? this.#exactEngine() : this.#engine;
  }

  /**
   * Product, conversion and sum in one graph: the sum runs on all threads and the fp32 tile never leaves the cache. What is in the
   * host's memory is summed there, whatever the device: `fused-gram.ts` sums what is made on a device.
   */
  readonly #tile: TileProduct = async ({ a, b, sum, tokens, rows, columns }) => {
    const program = await (await this.#exactEngine()).compile(GRAM_TILE, { key: 'gram tile' });
    const y: NdArray = { dtype: 'F64', shape: [rows, columns], data: sum };
    const strips = {
      a: { dtype: 'F32', shape: [tokens, rows], data: a },
      b: { dtype: 'F32', shape: [tokens, columns], data: b },
    } as const;
    await program.run({ ...strips, sum: y }, { into: { y } });
  };
}

const GRAM_TILE = literalGraph('gram tile', {
  inputs: { a: ['F32', 'tokens', 'rows'], b: ['F32', 'tokens', 'columns'], sum: ['F64', 'rows', 'columns'] },
  outputs: { y: ['F64', 'rows', 'columns'] },
  nodes: [
    { op: 'Gemm', inputs: ['a', 'b'], output: 'product', attributes: { transA: 1 } },
    // 11 is DOUBLE among ONNX's element types.
    { op: 'Cast', inputs: ['product'], output: 'wide', attributes: { to: 11 } },
    { op: 'Add', inputs: ['wide', 'sum'], output: 'y' },
  ],
});

interface GemmVariant {
  readonly dtype: 'F32' | 'F64';
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  readonly alpha: number;
  readonly beta: number;
}

/**
 * `y = alpha op(a) op(b) + beta c`. The usual scalars are attributes of one Gemm; any other value is an input of a graph that serves them all,
 * so that a schedule of a thousand alphas is one session, not a thousand. With beta 0 the old contents of c, NaN included, do not matter.
 */
function gemmProgram(engine: Engine, { dtype, transposeA, transposeB, alpha, beta }: GemmVariant): Promise<Program> {
  const sides: LiteralValues = {
    a: transposeA ? [dtype, 'inner', 'rows'] : [dtype, 'rows', 'inner'],
    b: transposeB ? [dtype, 'columns', 'inner'] : [dtype, 'inner', 'columns'],
  };
  const c = { c: [dtype, 'rows', 'columns'] } as const;
  const common = (alpha === 1 || alpha === -1) && (beta === 0 || beta === 1);
  const kind = `${common ? alpha : 'any'} ${common || beta === 0 ? beta : 'any'}`;
  const name = `gemm ${dtype} ${transposeA ? 'T' : 'N'}${transposeB ? 'T' : 'N'} ${kind}`;
  const transposes = { transA: Number(transposeA), transB: Number(transposeB) };
  const parts = (inputs: LiteralValues, nodes: readonly LiteralNode[]): Promise<Program> =>
    engine.compile(literalGraph(name, { inputs: { ...sides, ...inputs }, outputs: { y: [dtype, 'rows', 'columns'] }, nodes }), {
      key: name,
    });
  if (common) {
    const attributes = { ...transposes, alpha, beta };
    const inputs = beta === 0 ? ['a', 'b'] : ['a', 'b', 'c'];
    return parts(beta === 0 ? {} : c, [{ op: 'Gemm', inputs, output: 'y', attributes }]);
  }
  const product = { op: 'Gemm', inputs: ['a', 'b'], output: 'product', attributes: transposes };
  if (beta === 0) {
    return parts({ alpha: [dtype] }, [product, { op: 'Mul', inputs: ['product', 'alpha'], output: 'y' }]);
  }
  return parts({ ...c, alpha: [dtype], beta: [dtype] }, [
    product,
    { op: 'Mul', inputs: ['product', 'alpha'], output: 'scaled' },
    { op: 'Mul', inputs: ['c', 'beta'], output: 'kept' },
    { op: 'Add', inputs: ['scaled', 'kept'], output: 'y' },
  ]);
}

function matrixArray({ rows, columns, data }: Matrix): NdArray {
  return { dtype: 'F32', shape: [rows, columns], data };
}

function scalar(value: number): NdArray {
  return { dtype: 'F32', shape: [], data: Float32Array.of(value) };
}
