/** Checkpoint tensors inside a graph: stored once, under their own name and in their own dtype. */
import type { Initializer } from '../../formats/onnx/model.ts';
import type { TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { FormatError } from '../errors.ts';
import type { GraphBuilder, Value } from '../graph/builder.ts';

/** The tensor as an initializer with the checkpoint's dtype and layout; its bytes are read when the graph is written or compiled. */
export function storedTensor(builder: GraphBuilder, tensors: TensorSource, name: string): Value {
  const info = tensors.tensors.get(name);
  if (!info) throw new FormatError(tensors.path, 'tensor-missing', `tensor "${name}" is missing`);
  return builder.initializer(lazyInitializer(tensors, info));
}

/** As `storedTensor`, with a Cast to F32 that the runtime folds when it loads the model. */
export function floatTensor(builder: GraphBuilder, tensors: TensorSource, name: string): Value {
  return builder.cast(storedTensor(builder, tensors, name), 'F32');
}

function lazyInitializer(tensors: TensorSource, info: TensorInfo): Initializer {
  const { name, dtype, shape, byteLength } = info;
  return {
    name,
    dtype,
    shape,
    byteLength,
    async read(start = 0, end = byteLength) {
      if (start === 0 && end === byteLength) return (await tensors.read(name)).data;
      // Only the rows that hold the range: an embedding table is written in pieces.
      const rowBytes = byteLength / shape[0];
      const firstRow = Math.floor(start / rowBytes);
      const { data } = await tensors.readRows(name, firstRow, Math.ceil(end / rowBytes));
      return data.subarray(start - firstRow * rowBytes, end - firstRow * rowBytes);
    },
  };
}
