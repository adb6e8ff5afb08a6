/** Operators that move, cut, join and describe tensors without computing on their elements. */
import type { Dim } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import { int, ints } from '../attributes.ts';
import { GraphCore, type Value } from '../core.ts';
import {
  addDims,
  broadcastShapes,
  elementCount,
  formatShape,
  GraphError,
  normalizeAxis,
  type Shape,
  sameShape,
} from '../shape.ts';

export class LayoutOps extends GraphCore {
  /** Converts element types; the value itself when it has that type already. */
  cast(x: Value, to: DType): Value {
    if (x.dtype === to) return x;
    const code = ONNX_TYPES[to];
    if (code === undefined) throw new GraphError(`Cast: no ONNX element type for ${to}`);
    return this.node1('Cast', [x], { dtype: to, shape: x.shape }, { to: int(code) });
  }

  /**
   * Reshapes to `shape`. A named dimension must stand where the input has it, except one, which takes what is left.
   * For anything freer see `reshapeTo`.
   */
  reshape(x: Value, shape: Shape): Value {
    if (sameShape(x.shape, shape)) return x;
    const before = elementCount(x.shape);
    const after = elementCount(shape);
    if (typeof before === 'number' && typeof after === 'number' && before !== after) {
      throw new GraphError(`Reshape: ${formatShape(x.shape)} has ${before} elements, ${formatShape(shape)} has ${after}`);
    }
    let inferred = 0;
    const target = shape.map((dim, i) => {
      if (typeof dim === 'number') return dim;
      if (x.shape[i] === dim) return 0;
      inferred++;
      return -1;
    });
    if (inferred > 1)
      throw new GraphError(`Reshape: ${formatShape(x.shape)} to ${formatShape(shape)} leaves ${inferred} dimensions open`);
    return this.node1('Reshape', [x, this.vector(target)], { dtype: x.dtype, shape });
  }

  /** Reshapes to dimensions computed in the graph, an I64 vector; `shape` names them. */
  reshapeTo(x: Value, dims: Value, shape: Shape): Value {
    return this.node1('Reshape', [x, dims], { dtype: x.dtype, shape });
  }

  /** Output axis i is input axis `perm[i]`. */
  transpose(x: Value, perm: readonly number[]): Value {
    if ([...perm].sort((a, b) => a - b).some((axis, i) => axis !== i) || perm.length !== x.shape.length) {
      throw new GraphError(`Transpose: ${JSON.stringify(perm)} is no permutation of the axes of ${formatShape(x.shape)}`);
    }
    return this.node1('Transpose', [x], { dtype: x.dtype, shape: perm.map((axis) => x.shape[axis]) }, { perm: ints(perm) });
  }

  /** Cuts `x` along `axis` into parts of the given sizes. */
  split(x: Value, sizes: readonly number[], axis: number): Value[] {
    const at = normalizeAxis(axis, x.shape.length, 'Split');
    const total = sizes.reduce((sum, size) => sum + size, 0);
    if (x.shape[at] !== total)
      throw new GraphError(`Split: parts of ${sizes.join(' + ')} = ${total}, but axis ${at} of ${formatShape(x.shape)}`);
    const outputs = sizes.map((size) => ({ dtype: x.dtype, shape: x.shape.map((dim, i): Dim => (i === at ? size : dim)) }));
    return this.node('Split', [x, this.vector(sizes)], { attributes: { axis: int(at) }, outputs });
  }

  /** Joins along `axis`; all other dimensions must agree. */
  concat(parts: readonly Value[], axis: number): Value {
    const [first, ...rest] = parts;
    const at = normalizeAxis(axis, first.shape.length, 'Concat');
    const fits = (part: Value): boolean =>
      part.dtype === first.dtype &&
      part.shape.length === first.shape.length &&
      part.shape.every((dim, i) => i === at || dim === first.shape[i]);
    const misfit = rest.find((part) => !fits(part));
    if (misfit) {
      throw new GraphError(`Concat: ${describe(misfit)} does not join ${describe(first)} along axis ${at}`);
    }
    const length = rest.reduce((sum, part) => addDims(sum, part.shape[at]), first.shape[at]);
    const shape = first.shape.map((dim, i) => (i === at ? length : dim));
    return this.node1('Concat', parts, { dtype: first.dtype, shape }, { axis: int(at) });
  }

  /** Picks entries of `axis` by the integers in `indices`, whose shape takes that axis's place. */
  gather(x: Value, indices: Value, axis = 0): Value {
    const at = normalizeAxis(axis, x.shape.length, 'Gather');
    if (indices.dtype !== 'I64' && indices.dtype !== 'I32')
      throw new GraphError(`Gather: indices are ${indices.dtype}, not I64 or I32`);
    const shape = [...x.shape.slice(0, at), ...indices.shape, ...x.shape.slice(at + 1)];
    return this.node1('Gather', [x, indices], { dtype: x.dtype, shape }, { axis: int(at) });
  }

  /** Picks an entry along the last axis for each of the I64 `indices`, (..., count). */
  gatherElements(x: Value, indices: Value): Value {
    return this.node1('GatherElements', [x, indices], { dtype: x.dtype, shape: indices.shape }, { axis: int(-1) });
  }

  /** `x` with `updates` (..., count) in the places of the last axis that `indices` name, I64 (..., count), no place twice. */
  scatterElements(x: Value, indices: Value, updates: Value): Value {
    if (!sameShape(indices.shape, updates.shape) || updates.dtype !== x.dtype)
      throw new GraphError(`ScatterElements: ${describe(updates)} does not fill ${describe(indices)} places of ${describe(x)}`);
    return this.node1('ScatterElements', [x, indices, updates], x, { axis: int(-1) });
  }

  /** The `count` largest entries along the last axis, descending, and where they stand (I64); of equal ones the first. */
  topK(x: Value, count: number): { readonly values: Value; readonly indices: Value } {
    const last = x.shape[x.shape.length - 1];
    if (typeof last === 'number' && count > last) throw new GraphError(`TopK: ${count} of the ${last} entries of ${describe(x)}`);
    const shape = [...x.shape.slice(0, -1), count];
    const [values, indices] = this.node('TopK', [x, this.vector([count])], {
      attributes: { axis: int(-1) },
      outputs: [
        { dtype: x.dtype, shape },
        { dtype: 'I64', shape },
      ],
    });
    return { values, indices };
  }

  /** Entries [start, end) of one axis, with bounds computed in the graph (I64 vectors of one element); `length` names the result's size. */
  slice(x: Value, start: Value, end: Value, axis: number, length: Dim): Value {
    const at = normalizeAxis(axis, x.shape.length, 'Slice');
    const shape = x.shape.map((dim, i) => (i === at ? length : dim));
    return this.node1('Slice', [x, start, end, this.vector([at])], { dtype: x.dtype, shape });
  }

  /** Inserts axes of size 1; `axes` are places in the result. */
  unsqueeze(x: Value, axes: readonly number[]): Value {
    const rank = x.shape.length + axes.length;
    const places = axes.map((axis) => normalizeAxis(axis, rank, 'Unsqueeze')).sort((a, b) => a - b);
    const shape: Dim[] = [...x.shape];
    for (const place of places) shape.splice(place, 0, 1);
    return this.node1('Unsqueeze', [x, this.vector(places)], { dtype: x.dtype, shape });
  }

  /** Removes axes of size 1. */
  squeeze(x: Value, axes: readonly number[]): Value {
    const places = axes.map((axis) => normalizeAxis(axis, x.shape.length, 'Squeeze'));
    if (places.some((place) => x.shape[place] !== 1))
      throw new GraphError(`Squeeze: axes ${places.join()} of ${formatShape(x.shape)} are not all 1`);
    const shape = x.shape.filter((_, i) => !places.includes(i));
    return this.node1('Squeeze', [x, this.vector(places)], { dtype: x.dtype, shape });
  }

  /** Repeats axes of size 1 to the dimensions in `dims`, an I64 vector; `shape` names them. */
  expand(x: Value, dims: Value, shape: Shape): Value {
    if (!broadcastShapes(x.shape, shape))
      throw new GraphError(`Expand: ${formatShape(x.shape)} does not stretch to ${formatShape(shape)}`);
    return this.node1('Expand', [x, dims], { dtype: x.dtype, shape });
  }

  /** The dimensions [start, end) of `x` as an I64 vector. */
  shapeOf(x: Value, start = 0, end = x.shape.length): Value {
    return this.node1('Shape', [x], { dtype: 'I64', shape: [end - start] }, { start: int(start), end: int(end) });
  }

  /** One dimension of `x`, an I64 scalar. */
  dimOf(x: Value, axis: number): Value {
    const at = normalizeAxis(axis, x.shape.length, 'Shape');
    return this.squeeze(this.shapeOf(x, at, at + 1), [0]);
  }

  /** 0, 1, ... `count` - 1 for an I64 scalar `count`; `length` names the result's size. */
  range(count: Value, length: Dim): Value {
    return this.node1('Range', [this.scalar('I64', 0), count, this.scalar('I64', 1)], { dtype: 'I64', shape: [length] });
  }
}

/** `F32 [2, 3] "name"`, for messages. */
export function describe(value: Value): string {
  return `${value.dtype} ${formatShape(value.shape)} "${value.name}"`;
}

/** TensorProto.DataType of the types Cast can be asked for. */
const ONNX_TYPES: Partial<Record<DType, number>> = {
  F32: 1,
  U8: 2,
  I8: 3,
  U16: 4,
  I16: 5,
  I32: 6,
  I64: 7,
  BOOL: 9,
  F16: 10,
  F64: 11,
  U32: 12,
  U64: 13,
  BF16: 16,
};
