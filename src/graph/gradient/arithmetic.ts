/** Derivatives of elementwise operators and reductions (gradients.md, section 2). */
import type { GraphBuilder, Value } from '../builder.ts';
import { GraphError } from '../shape.ts';
import { asRows, only, scalarLike, staticShape, unbroadcast, type Vjp, type VjpCall } from './vjp.ts';

/** An operator of one input: cotangent from the output's cotangent, the input and the output. */
function unary(derive: (builder: GraphBuilder, g: Value, x: Value, y: Value) => Value): Vjp {
  return (call) => [derive(call.builder, only(call), call.inputs[0]!, call.outputs[0]!)];
}

/** An operator of two inputs that broadcast. */
function binary(
  left: (call: VjpCall, g: Value, a: Value, b: Value) => Value,
  right: (call: VjpCall, g: Value, a: Value, b: Value) => Value,
): Vjp {
  return (call) => {
    const [a, b] = [call.inputs[0]!, call.inputs[1]!];
    const g = only(call);
    return [
      call.wanted[0] ? unbroadcast(call.builder, left(call, g, a, b), a) : undefined,
      call.wanted[1] ? unbroadcast(call.builder, right(call, g, a, b), b) : undefined,
    ];
  };
}

/** `g` where the first operand is taken, else zeros. A tie goes to the first. */
function chosen(first: 'larger' | 'smaller'): Vjp {
  const firstWins = (builder: GraphBuilder, a: Value, b: Value) =>
    first === 'larger' ? builder.lessOrEqual(b, a) : builder.lessOrEqual(a, b);
  return binary(
    ({ builder }, g, a, b) => builder.where(firstWins(builder, a, b), g, scalarLike(builder, g, 0)),
    ({ builder }, g, a, b) => builder.where(firstWins(builder, a, b), scalarLike(builder, g, 0), g),
  );
}

const where: Vjp = ({ builder, inputs, cotangents, wanted }) => {
  const [condition, a, b] = [inputs[0]!, inputs[1]!, inputs[2]!];
  const g = cotangents[0]!;
  const zero = scalarLike(builder, g, 0);
  return [
    undefined,
    wanted[1] ? unbroadcast(builder, builder.where(condition, g, zero), a) : undefined,
    wanted[2] ? unbroadcast(builder, builder.where(condition, zero, g), b) : undefined,
  ];
};

/** Sums and means: every element of a run gets the cotangent, of a mean its part of it. */
function reduction(mean: boolean): Vjp {
  return (call) => {
    const { builder, inputs, node } = call;
    const x = inputs[0]!;
    const shape = staticShape(x);
    const axes = builder.numbersOf(inputs[1]!);
    if (axes === undefined) throw new GraphError(`${node.name}: its axes are not constant`);
    const kept = shape.map((dim, i) => (axes.includes(i) ? 1 : dim));
    const count = axes.reduce((product, axis) => product * shape[axis], 1);
    const g = builder.reshape(only(call), kept);
    const part = mean ? builder.mul(g, scalarLike(builder, g, 1 / count)) : g;
    return [builder.expand(part, builder.vector(shape), shape)];
  };
}

const matmul: Vjp = ({ builder, inputs, cotangents, wanted }) => {
  const [a, b] = [inputs[0]!, inputs[1]!];
  const g = cotangents[0]!;
  const turned = (x: Value) => {
    const last = x.shape.length - 1;
    return builder.transpose(
      x,
      [...x.shape.keys()].map((i) => (i < last - 1 ? i : 2 * last - 1 - i)),
    );
  };
  const left = wanted[0] ? unbroadcast(builder, builder.matmul(g, turned(b)), a) : undefined;
  if (!wanted[1]) return [left, undefined];
  if (b.shape.length !== 2) return [left, unbroadcast(builder, builder.matmul(turned(a), g), b)];
  // One product over all rows, and turned: where b is a weight turned, the two turns cancel.
  return [left, builder.transpose(builder.gemm(asRows(builder, g), asRows(builder, a), null, { transposeA: true }), [1, 0])];
};

export const ARITHMETIC: Readonly<Record<string, Vjp>> = {
  Add: binary(
    (_, g) => g,
    (_, g) => g,
  ),
  Sub: binary(
    (_, g) => g,
    ({ builder }, g) => builder.neg(g),
  ),
  Mul: binary(
    ({ builder }, g, _, b) => builder.mul(g, b),
    ({ builder }, g, a) => builder.mul(g, a),
  ),
  Div: binary(
    ({ builder }, g, _, b) => builder.div(g, b),
    ({ builder, outputs }, g, _, b) => builder.neg(builder.div(builder.mul(g, outputs[0]!), b)),
  ),
  Max: chosen('larger'),
  Min: chosen('smaller'),
  Where: where,
  Neg: unary((builder, g) => builder.neg(g)),
  Exp: unary((builder, g, _, y) => builder.mul(g, y)),
  Log: unary((builder, g, x) => builder.div(g, x)),
  Sqrt: unary((builder, g, _, y) => builder.div(builder.mul(g, scalarLike(builder, g, 0.5)), y)),
  Abs: unary((builder, g, x) => builder.mul(g, builder.sign(x))),
  Tanh: unary((builder, g, _, y) => builder.mul(g, builder.sub(scalarLike(builder, g, 1), builder.mul(y, y)))),
  Sigmoid: unary((builder, g, _, y) => builder.mul(g, builder.mul(y, builder.sub(scalarLike(builder, g, 1), y)))),
  // As max(x, 0): a tie goes to x.
  Relu: unary((builder, g, x) => {
    const zero = scalarLike(builder, x, 0);
    return builder.where(builder.less(x, zero), zero, g);
  }),
  ReduceSum: reduction(false),
  ReduceMean: reduction(true),
  MatMul: matmul,
};
