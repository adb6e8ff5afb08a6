/** What one operator's derivative is given and gives: the vector-Jacobian product, as more nodes of the same graph. */
import type { Node } from '../../../formats/onnx/model.ts';
import type { GraphBuilder, Value } from '../builder.ts';
import { elementCount, GraphError } from '../shape.ts';

/** A node on the way from what is differentiated to what it is differentiated by. */
export interface VjpCall {
  readonly builder: GraphBuilder;
  readonly node: Node;
  /** `undefined` for an optional input that is left out. */
  readonly inputs: readonly (Value | undefined)[];
  readonly outputs: readonly (Value | undefined)[];
  /** Of each output; undefined where nothing that is differentiated depends on it. */
  readonly cotangents: readonly (Value | undefined)[];
  /** Inputs whose cotangents are asked for. */
  readonly wanted: readonly boolean[];
}

/** Cotangents of the inputs, undefined for those that are not wanted or have none. */
export type Vjp = (call: VjpCall) => readonly (Value | undefined)[];

/** A scalar constant of the element type of `like`. */
export function scalarLike(builder: GraphBuilder, like: Value, value: number): Value {
  return builder.scalar(like.dtype === 'F64' ? 'F64' : 'F32', value);
}

export function zerosLike(builder: GraphBuilder, like: Value): Value {
  return builder.expand(scalarLike(builder, like, 0), builder.vector(staticShape(like)), like.shape);
}

/** Dimensions as numbers: derivatives are taken of graphs with fixed sizes. */
export function staticShape({ name, shape }: Value): number[] {
  return shape.map((dim) => {
    if (typeof dim !== 'number')
      throw new GraphError(`"${name}" has the open dimension "${dim}": fix the sizes to differentiate`);
    return dim;
  });
}

/** Sums `g` over the axes that broadcasting added to `like` or stretched. */
export function unbroadcast(builder: GraphBuilder, g: Value, like: Value): Value {
  const [from, to] = [staticShape(g), staticShape(like)];
  const added = from.length - to.length;
  const axes = from.map((_, i) => i).filter((i) => i < added || (to[i - added] === 1 && from[i] !== 1));
  const summed = axes.length === 0 ? g : builder.reduceSum(g, axes);
  return builder.reshape(summed, to);
}

/** The cotangent of the only output. */
export function only({ cotangents }: VjpCall): Value {
  return cotangents[0]!;
}

/** (..., columns) as (rows, columns). */
export function asRows(builder: GraphBuilder, x: Value): Value {
  const shape = staticShape(x);
  const columns = shape[shape.length - 1];
  return builder.reshape(x, [Number(elementCount(shape.slice(0, -1))), columns]);
}

export function intAttribute(node: Node, name: string, fallback: number): number {
  const attribute = node.attributes[name];
  return attribute?.kind === 'int' ? Number(attribute.value) : fallback;
}

export function floatAttribute(node: Node, name: string, fallback: number): number {
  const attribute = node.attributes[name];
  return attribute?.kind === 'float' ? attribute.value : fallback;
}
