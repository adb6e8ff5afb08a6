/** Operators that compute: elementwise, reductions, matrix products. */
import type { Attribute, Dim } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import { float, int, text } from '../attributes.ts';
import type { Value } from '../core.ts';
import { broadcastShapes, formatShape, GraphError, normalizeAxis } from '../shape.ts';
import { describe, LayoutOps } from './layout.ts';

export class ArithmeticOps extends LayoutOps {
  add(a: Value, b: Value): Value {
    return this.#binary('Add', a, b);
  }

  sub(a: Value, b: Value): Value {
    return this.#binary('Sub', a, b);
  }

  mul(a: Value, b: Value): Value {
    return this.#binary('Mul', a, b);
  }

  div(a: Value, b: Value): Value {
    return this.#binary('Div', a, b);
  }

  /** Elementwise larger one. */
  max(a: Value, b: Value): Value {
    return this.#binary('Max', a, b);
  }

  /** Elementwise smaller one. */
  min(a: Value, b: Value): Value {
    return this.#binary('Min', a, b);
  }

  /** BOOL: a < b. */
  less(a: Value, b: Value): Value {
    return this.#binary('Less', a, b, 'BOOL');
  }

  /** BOOL: a <= b. */
  lessOrEqual(a: Value, b: Value): Value {
    return this.#binary('LessOrEqual', a, b, 'BOOL');
  }

  /** BOOL: both. */
  and(a: Value, b: Value): Value {
    return this.#binary('And', a, b);
  }

  /** `a` where `condition` (BOOL) holds, else `b`. */
  where(condition: Value, a: Value, b: Value): Value {
    if (condition.dtype !== 'BOOL') throw new GraphError(`Where: the condition is ${describe(condition)}, not BOOL`);
    const inner = this.#broadcast('Where', a, b);
    const shape = broadcastShapes(condition.shape, inner);
    if (!shape) throw new GraphError(`Where: ${describe(condition)} does not fit ${formatShape(inner)}`);
    return this.node1('Where', [condition, a, b], { dtype: a.dtype, shape });
  }

  neg(x: Value): Value {
    return this.#unary('Neg', x);
  }

  abs(x: Value): Value {
    return this.#unary('Abs', x);
  }

  /** -1, 0 or 1. */
  sign(x: Value): Value {
    return this.#unary('Sign', x);
  }

  /** To the nearest whole number, halves to the even one. */
  round(x: Value): Value {
    return this.#unary('Round', x);
  }

  exp(x: Value): Value {
    return this.#unary('Exp', x);
  }

  log(x: Value): Value {
    return this.#unary('Log', x);
  }

  sqrt(x: Value): Value {
    return this.#unary('Sqrt', x);
  }

  erf(x: Value): Value {
    return this.#unary('Erf', x);
  }

  sigmoid(x: Value): Value {
    return this.#unary('Sigmoid', x);
  }

  tanh(x: Value): Value {
    return this.#unary('Tanh', x);
  }

  relu(x: Value): Value {
    return this.#unary('Relu', x);
  }

  /** x * sigmoid(x), as Sigmoid and Mul, which onnxruntime fuses. */
  silu(x: Value): Value {
    return this.mul(x, this.sigmoid(x));
  }

  /** 'none': x * Phi(x); 'tanh': 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). */
  gelu(x: Value, approximate: 'none' | 'tanh' = 'none'): Value {
    return this.#unary('Gelu', x, { approximate: text(approximate) });
  }

  /** Softmax over one axis, the last by default. */
  softmax(x: Value, axis = -1): Value {
    return this.#unary('Softmax', x, { axis: int(normalizeAxis(axis, x.shape.length, 'Softmax')) });
  }

  /** Running sum along an axis, the element itself included. */
  cumSum(x: Value, axis: number): Value {
    const at = this.scalar('I64', normalizeAxis(axis, x.shape.length, 'CumSum'));
    return this.node1('CumSum', [x, at], x);
  }

  reduceSum(x: Value, axes: readonly number[], keepDims = true): Value {
    return this.#reduce('ReduceSum', x, axes, keepDims);
  }

  reduceMax(x: Value, axes: readonly number[], keepDims = true): Value {
    return this.#reduce('ReduceMax', x, axes, keepDims);
  }

  reduceMean(x: Value, axes: readonly number[], keepDims = true): Value {
    return this.#reduce('ReduceMean', x, axes, keepDims);
  }

  /** Products of the last two axes, the axes before them broadcast: (..., M, K) x (..., K, N) -> (..., M, N). */
  matmul(a: Value, b: Value): Value {
    const rank = Math.min(a.shape.length, b.shape.length);
    const [rows, inner] = a.shape.slice(-2);
    const [innerB, columns] = b.shape.slice(-2);
    const batch = broadcastShapes(a.shape.slice(0, -2), b.shape.slice(0, -2));
    if (rank < 2 || a.dtype !== b.dtype || inner !== innerB || !batch) {
      throw new GraphError(`MatMul: ${describe(a)} does not multiply ${describe(b)}`);
    }
    return this.node1('MatMul', [a, b], { dtype: a.dtype, shape: [...batch, rows, columns] });
  }

  /** `alpha * op(a) * op(b) + beta * c` for matrices; `c` may be a row, a column or absent. */
  gemm(
    a: Value,
    b: Value,
    c: Value | null = null,
    options: { transposeA?: boolean; transposeB?: boolean; alpha?: number; beta?: number } = {},
  ): Value {
    const [rows, inner] = oriented(a, options.transposeA);
    const [innerB, columns] = oriented(b, options.transposeB);
    const shape: Dim[] = [rows, columns];
    if (a.dtype !== b.dtype || inner !== innerB) throw new GraphError(`Gemm: ${describe(a)} does not multiply ${describe(b)}`);
    if (c && (c.dtype !== a.dtype || broadcastShapes(c.shape, shape)?.join() !== shape.join())) {
      throw new GraphError(`Gemm: ${describe(c)} does not add to ${formatShape(shape)}`);
    }
    const attributes: Record<string, Attribute> = {
      transA: int(options.transposeA ? 1 : 0),
      transB: int(options.transposeB ? 1 : 0),
      alpha: float(options.alpha ?? 1),
      beta: float(options.beta ?? 1),
    };
    return this.node1('Gemm', [a, b, c], { dtype: a.dtype, shape }, attributes);
  }

  #unary(op: string, x: Value, attributes: Readonly<Record<string, Attribute>> = {}): Value {
    return this.node1(op, [x], { dtype: x.dtype, shape: x.shape }, attributes);
  }

  #binary(op: string, a: Value, b: Value, dtype: DType = a.dtype): Value {
    return this.node1(op, [a, b], { dtype, shape: this.#broadcast(op, a, b) });
  }

  #broadcast(op: string, a: Value, b: Value): readonly Dim[] {
    const shape = broadcastShapes(a.shape, b.shape);
    if (a.dtype !== b.dtype || !shape) throw new GraphError(`${op}: ${describe(a)} does not fit ${describe(b)}`);
    return shape;
  }

  #reduce(op: string, x: Value, axes: readonly number[], keepDims: boolean): Value {
    const places = axes.map((axis) => normalizeAxis(axis, x.shape.length, op));
    const shape = keepDims
      ? x.shape.map((dim, i): Dim => (places.includes(i) ? 1 : dim))
      : x.shape.filter((_, i) => !places.includes(i));
    return this.node1(op, [x, this.vector(places)], { dtype: x.dtype, shape }, { keepdims: int(keepDims ? 1 : 0) });
  }
}

function oriented(x: Value, transposed = false): readonly [Dim, Dim] {
  if (x.shape.length !== 2) throw new GraphError(`Gemm: ${describe(x)} is not a matrix`);
  return transposed ? [x.shape[1], x.shape[0]] : [x.shape[0], x.shape[1]];
}
