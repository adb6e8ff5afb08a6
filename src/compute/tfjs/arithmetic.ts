/** Operators that compute: elementwise, reductions, matrix products. */
import type { DType } from '../../../formats/tensor.ts';
import type { Call, Operator } from './operator.ts';
import type { Tf, TfTensor } from './values.ts';

const unary =
  (compute: (tf: Tf, x: TfTensor) => TfTensor): Operator =>
  (call) => [{ dtype: call.input(0).dtype, tensor: compute(call.tf, call.tensor(0)) }];

const binary =
  (compute: (tf: Tf, a: TfTensor, b: TfTensor) => TfTensor, dtype?: DType): Operator =>
  (call) => [{ dtype: dtype ?? call.input(0).dtype, tensor: compute(call.tf, call.tensor(0), call.tensor(1)) }];

const reduction =
  (compute: (x: TfTensor, axes: number[], keepDims: boolean) => TfTensor): Operator =>
  (call) => {
    const { dtype, tensor } = call.input(0);
    const axes = call.has(1) ? call.numbers(1) : tensor.shape.map((_, i) => i);
    return [{ dtype, tensor: compute(tensor, axes, call.int('keepdims', 1) === 1) }];
  };

/** tfjs has these over the last axis only. */
const overLastAxis =
  (compute: (tf: Tf, x: TfTensor) => TfTensor): Operator =>
  (call) => {
    const { dtype, tensor } = call.input(0);
    const axis = call.int('axis', -1);
    if (call.axis(axis, tensor.rank) !== tensor.rank - 1) call.refuse(`axis ${axis} other than the last one`);
    return [{ dtype, tensor: compute(call.tf, tensor) }];
  };

function matMul(call: Call): ReturnType<Operator> {
  const { tf } = call;
  const [a, b] = [call.tensor(0), call.tensor(1)];
  // One product of all rows: tfjs would repeat the matrix for each entry of the batch.
  if (a.rank > 2 && b.rank === 2) {
    const [inner, columns]: number[] = b.shape;
    const rows = tf.matMul(a.reshape([-1, inner]), b);
    return [{ dtype: 'F32', tensor: rows.reshape([...a.shape.slice(0, -1), columns]) }];
  }
  return [{ dtype: 'F32', tensor: tf.matMul(a, b) }];
}

function gemm(call: Call): ReturnType<Operator> {
  const { tf } = call;
  const product = tf.matMul(call.tensor(0), call.tensor(1), call.int('transA', 0) === 1, call.int('transB', 0) === 1);
  const [alpha, beta] = [call.float('alpha', 1), call.float('beta', 1)];
  const scaled = alpha === 1 ? product : product.mul(alpha);
  if (!call.has(2) || beta === 0) return [{ dtype: 'F32', tensor: scaled }];
  return [{ dtype: 'F32', tensor: scaled.add(beta === 1 ? call.tensor(2) : call.tensor(2).mul(beta)) }];
}

function cumSum(call: Call): ReturnType<Operator> {
  const { dtype, tensor } = call.input(0);
  const [axis] = call.numbers(1);
  const summed = call.tf.cumsum(
    tensor,
    call.axis(axis, tensor.rank),
    call.int('exclusive', 0) === 1,
    call.int('reverse', 0) === 1,
  );
  return [{ dtype, tensor: summed }];
}

function gelu(call: Call): ReturnType<Operator> {
  const { tf } = call;
  const x = call.tensor(0);
  const tanh = call.text('approximate', 'none') === 'tanh';
  const bent = tanh
    ? x
        .add(x.mul(x).mul(x).mul(0.044715))
        .mul(Math.sqrt(2 / Math.PI))
        .tanh()
    : tf.erf(x.mul(Math.SQRT1_2));
  return [{ dtype: 'F32', tensor: x.mul(0.5).mul(bent.add(1)) }];
}

export const ARITHMETIC: Readonly<Record<string, Operator>> = {
  Add: binary((tf, a, b) => tf.add(a, b)),
  Sub: binary((tf, a, b) => tf.sub(a, b)),
  Mul: binary((tf, a, b) => tf.mul(a, b)),
  Div: (call) => {
    // Integers would be divided towards minus infinity here, towards zero in ONNX.
    if (call.input(0).dtype !== 'F32') call.refuse(`quotient of ${call.input(0).dtype}`);
    return [{ dtype: 'F32', tensor: call.tf.div(call.tensor(0), call.tensor(1)) }];
  },
  Max: binary((tf, a, b) => tf.maximum(a, b)),
  Less: binary((tf, a, b) => tf.less(a, b), 'BOOL'),
  LessOrEqual: binary((tf, a, b) => tf.lessEqual(a, b), 'BOOL'),
  And: binary((tf, a, b) => tf.logicalAnd(a, b)),
  Where: (call) => [{ dtype: call.input(1).dtype, tensor: call.tf.where(call.tensor(0), call.tensor(1), call.tensor(2)) }],
  Neg: unary((tf, x) => tf.neg(x)),
  Sigmoid: unary((tf, x) => tf.sigmoid(x)),
  Tanh: unary((tf, x) => tf.tanh(x)),
  Relu: unary((tf, x) => tf.relu(x)),
  Gelu: gelu,
  Softmax: overLastAxis((tf, x) => tf.softmax(x)),
  LogSoftmax: overLastAxis((tf, x) => tf.logSoftmax(x)),
  CumSum: cumSum,
  ReduceSum: reduction((x, axes, keepDims) => x.sum(axes, keepDims)),
  ReduceMean: reduction((x, axes, keepDims) => x.mean(axes, keepDims)),
  MatMul: matMul,
  Gemm: gemm,
};
