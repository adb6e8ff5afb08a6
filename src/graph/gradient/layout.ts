/** Derivatives of operators that move elements (gradients.md, section 2). */
import { text } from '../attributes.ts';
import type { Value } from '../builder.ts';
import { GraphError } from '../shape.ts';
import { intAttribute, only, staticShape, unbroadcast, type Vjp, zerosLike } from './vjp.ts';

/** Same elements, other shape. */
const reshaped: Vjp = (call) => [call.builder.reshape(only(call), staticShape(call.inputs[0]!))];

const transpose: Vjp = (call) => {
  const attribute = call.node.attributes['perm'];
  if (attribute?.kind !== 'ints') throw new GraphError(`${call.node.name}: without a permutation`);
  const inverse: number[] = [];
  attribute.value.forEach((axis, i) => {
    inverse[Number(axis)] = i;
  });
  return [call.builder.transpose(only(call), inverse)];
};

const split: Vjp = ({ builder, node, outputs, cotangents }) => {
  const parts = outputs.map((output, i) => cotangents[i] ?? zerosLike(builder, output!));
  return [builder.concat(parts, intAttribute(node, 'axis', 0))];
};

const concat: Vjp = (call) => {
  const { builder, node, inputs } = call;
  const axis = intAttribute(node, 'axis', 0);
  const sizes = inputs.map((input) => staticShape(input!)[axis]);
  return builder.split(only(call), sizes, axis);
};

/** Rows that are picked twice get both cotangents. */
const gather: Vjp = (call) => {
  const { builder, node, inputs } = call;
  const [table, indices] = [inputs[0]!, inputs[1]!];
  if (intAttribute(node, 'axis', 0) !== 0) throw new GraphError(`${node.name}: only gathers of rows can be differentiated`);
  const [, ...rest] = staticShape(table);
  const count = staticShape(indices).reduce((product, dim) => product * dim, 1);
  const rows = builder.reshape(builder.cast(indices, 'I64'), [count, 1]);
  const updates = builder.reshape(only(call), [count, ...rest]);
  return [scatterAdd(call.builder, zerosLike(builder, table), rows, updates)];
};

function scatterAdd(builder: Parameters<typeof zerosLike>[0], target: Value, rows: Value, updates: Value): Value {
  return builder.node1('ScatterND', [target, rows, updates], target, { reduction: text('add') });
}

const cast: Vjp = (call) => {
  const { builder, node, inputs, outputs } = call;
  const floats = new Set(['F64', 'F32', 'F16', 'BF16']);
  if (!floats.has(inputs[0]!.dtype) || !floats.has(outputs[0]!.dtype)) {
    throw new GraphError(`${node.name}: a cast from ${inputs[0]!.dtype} to ${outputs[0]!.dtype} has no derivative`);
  }
  return [builder.cast(only(call), inputs[0]!.dtype)];
};

/** Entries [start, end) of an axis: the rest is padded with zeros. Bounds must be constants. */
const slice: Vjp = (call) => {
  const { builder, node, inputs } = call;
  const [x, start, , axes] = inputs;
  const from = builder.numbersOf(start!)?.[0];
  const axis = builder.numbersOf(axes!)?.[0];
  if (from === undefined || axis === undefined) throw new GraphError(`${node.name}: its bounds are not constant`);
  const shape = staticShape(x!);
  const taken = staticShape(call.outputs[0]!)[axis];
  const zeros = (length: number): Value[] =>
    length === 0
      ? []
      : [builder.expand(builder.scalar(x!.dtype === 'F64' ? 'F64' : 'F32', 0), builder.vector(sized(length)), sized(length))];
  const sized = (length: number) => shape.map((dim, i) => (i === axis ? length : dim));
  return [builder.concat([...zeros(from), only(call), ...zeros(shape[axis] - from - taken)], axis)];
};

/** C's cotangent only where it is there; operands may be turned. */
const gemm: Vjp = (call) => {
  const { builder, node, inputs, wanted } = call;
  const [a, b, c] = inputs;
  const g = only(call);
  const [transposeA, transposeB] = [intAttribute(node, 'transA', 0) === 1, intAttribute(node, 'transB', 0) === 1];
  const scale = (name: 'alpha' | 'beta') => {
    const attribute = node.attributes[name];
    return attribute?.kind === 'float' ? attribute.value : 1;
  };
  const alpha = scale('alpha');
  const left = transposeA
    ? builder.gemm(b!, g, null, { transposeA: transposeB, transposeB: true, alpha })
    : builder.gemm(g, b!, null, { transposeB: !transposeB, alpha });
  const right = transposeB
    ? builder.gemm(g, a!, null, { transposeA: true, transposeB: transposeA, alpha })
    : builder.gemm(a!, g, null, { transposeA: !transposeA, alpha });
  const beta = builder.scalar(g.dtype === 'F64' ? 'F64' : 'F32', scale('beta'));
  return [
    wanted[0] ? left : undefined,
    wanted[1] ? right : undefined,
    c && wanted[2] ? unbroadcast(builder, builder.mul(g, beta), c) : undefined,
  ];
};

/** Values go back to where they were found; a choice has no derivative. */
const topK: Vjp = ({ builder, inputs, outputs, cotangents }) => [
  cotangents[0] && builder.scatterElements(zerosLike(builder, inputs[0]!), outputs[1]!, cotangents[0]),
];

/** What was written over gets nothing. */
const scatterElements: Vjp = (call) => {
  const { builder, inputs, wanted } = call;
  const [, indices, updates] = inputs;
  return [
    wanted[0] ? builder.scatterElements(only(call), indices!, zerosLike(builder, updates!)) : undefined,
    undefined,
    wanted[2] ? builder.gatherElements(only(call), indices!) : undefined,
  ];
};

export const LAYOUT: Readonly<Record<string, Vjp>> = {
  Reshape: reshaped,
  Unsqueeze: reshaped,
  Squeeze: reshaped,
  Identity: (call) => [only(call)],
  Expand: (call) => [unbroadcast(call.builder, only(call), call.inputs[0]!)],
  Transpose: transpose,
  Split: split,
  Concat: concat,
  Gather: gather,
  TopK: topK,
  ScatterElements: scatterElements,
  Cast: cast,
  Slice: slice,
  Gemm: gemm,
};
