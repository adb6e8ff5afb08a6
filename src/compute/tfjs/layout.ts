/** Operators that move, cut, join and describe tensors without computing on their elements. */
import type { DType } from '../../../formats/tensor.ts';
import type { Call, Operator } from './operator.ts';
import type { TfTensor } from './values.ts';

/** TensorProto.DataType of what Cast can be asked for. */
const CASTS: Readonly<Record<number, readonly [DType, 'float32' | 'int32' | 'bool']>> = {
  1: ['F32', 'float32'],
  6: ['I32', 'int32'],
  7: ['I64', 'int32'],
  9: ['BOOL', 'bool'],
};

const same =
  (move: (call: Call, x: TfTensor) => TfTensor): Operator =>
  (call) => [{ dtype: call.input(0).dtype, tensor: move(call, call.tensor(0)) }];

const reshape = same((call, x) => {
  // 0 keeps the dimension in its place, -1 takes what is left.
  const shape = call.numbers(1).map((dim, i) => (dim === 0 ? x.shape[i] : dim));
  return x.reshape(shape);
});

const unsqueeze = same((call, x) => {
  const axes = call.numbers(1);
  const rank = x.rank + axes.length;
  const shape = [...x.shape];
  for (const place of axes.map((axis) => call.axis(axis, rank)).sort((a, b) => a - b)) shape.splice(place, 0, 1);
  return x.reshape(shape);
});

const squeeze = same((call, x) => {
  const axes = call.has(1) ? call.numbers(1).map((axis) => call.axis(axis, x.rank)) : undefined;
  return x.reshape(x.shape.filter((dim, i) => (axes ? !axes.includes(i) : dim !== 1)));
});

const slice = same((call, x) => {
  const [starts, ends] = [call.numbers(1), call.numbers(2)];
  const axes = call.has(3) ? call.numbers(3) : starts.map((_, i) => i);
  if (call.has(4) && call.numbers(4).some((step) => step !== 1)) call.refuse('steps other than 1');
  const begin = x.shape.map(() => 0);
  const size = [...x.shape];
  axes.forEach((axis, i) => {
    const at = call.axis(axis, x.rank);
    const [start, end] = [starts[i], ends[i]].map((bound) => Math.min(x.shape[at], bound < 0 ? bound + x.shape[at] : bound));
    begin[at] = start;
    size[at] = Math.max(0, end - start);
  });
  return x.slice(begin, size);
});

function split(call: Call): ReturnType<Operator> {
  const { dtype, tensor } = call.input(0);
  const axis = call.axis(call.int('axis', 0), tensor.rank);
  const count = call.node.outputs.length;
  const sizes = call.has(1) ? call.numbers(1) : call.node.outputs.map(() => tensor.shape[axis] / count);
  return call.tf.split(tensor, sizes, axis).map((part) => ({ dtype, tensor: part }));
}

function shapeOf(call: Call): ReturnType<Operator> {
  const { shape } = call.tensor(0);
  const part = shape.slice(call.int('start', 0), call.int('end', shape.length));
  return [{ dtype: 'I64', tensor: call.tf.tensor1d(part, 'int32') }];
}

function range(call: Call): ReturnType<Operator> {
  const { dtype } = call.input(0);
  const [start, limit, delta] = [0, 1, 2].map((index) => call.numbers(index)[0]);
  return [{ dtype, tensor: call.tf.range(start, limit, delta, dtype === 'F32' ? 'float32' : 'int32') }];
}

function cast(call: Call): ReturnType<Operator> {
  const to = CASTS[call.int('to', 0)];
  if (to === undefined) return call.refuse(`element type ${call.int('to', 0)}`);
  return [{ dtype: to[0], tensor: call.tensor(0).cast(to[1]) }];
}

export const LAYOUT: Readonly<Record<string, Operator>> = {
  Identity: same((_, x) => x.clone()),
  Reshape: reshape,
  Transpose: same((call, x) => x.transpose(call.ints('perm'))),
  Split: split,
  Concat: (call) => {
    const { dtype, tensor } = call.input(0);
    const parts = call.inputs().map((part) => part.tensor);
    return [{ dtype, tensor: call.tf.concat(parts, call.axis(call.int('axis', 0), tensor.rank)) }];
  },
  Gather: same((call, x) => {
    return call.tf.gather(x, call.tensor(1) as never, call.axis(call.int('axis', 0), x.rank));
  }),
  Slice: slice,
  Unsqueeze: unsqueeze,
  Squeeze: squeeze,
  // Both sides stretch in ONNX: a dimension of the target that is 1 leaves the tensor's own.
  Expand: same((call, x) => {
    const target = call.numbers(1);
    const own = [...Array<number>(Math.max(0, target.length - x.rank)).fill(1), ...x.shape];
    const asked = [...Array<number>(own.length - target.length).fill(1), ...target];
    return call.tf.broadcastTo(
      x,
      own.map((dim, i) => Math.max(dim, asked[i])),
    );
  }),
  Shape: shapeOf,
  Range: range,
  Cast: cast,
};
