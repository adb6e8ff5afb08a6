/** Our host arrays as onnxruntime tensors and back, without copying. */
import type { Tensor as OrtTensor } from 'onnxruntime-node';
import type { DType } from '../../formats/tensor.ts';
import { UnsupportedError } from '../errors.ts';
import type { NdArray, TypedArray } from './engine.ts';
import type { Ort } from './ort-runtime.ts';

type OrtType = OrtTensor.Type;

/** The element types that may cross the border; BF16 and the F8s are for the inside of a graph only. */
const ORT_TYPES = {
  F64: 'float64',
  F32: 'float32',
  F16: 'float16',
  I64: 'int64',
  I32: 'int32',
  I8: 'int8',
  U8: 'uint8',
  U16: 'uint16',
  BOOL: 'bool',
} as const satisfies Partial<Record<DType, OrtType>>;

const DTYPES = new Map<OrtType, DType>(Object.entries(ORT_TYPES).map(([dtype, type]) => [type, dtype as DType]));

/** A tensor over the array's own memory. `subject` names the value in errors. */
export function toOrtTensor(ort: Ort, array: NdArray, subject: string): OrtTensor {
  const type = (ORT_TYPES as Partial<Record<DType, OrtType>>)[array.dtype];
  if (type === undefined) {
    const allowed = Object.keys(ORT_TYPES).join(' ');
    throw new UnsupportedError(`${subject} is ${array.dtype}: onnxruntime-node takes and gives ${allowed}`);
  }
  if (array.data.buffer instanceof SharedArrayBuffer) {
    throw new Error(`${subject} is in shared memory, which onnxruntime-node refuses`);
  }
  const size = array.shape.reduce((product, dim) => product * dim, 1);
  if (size !== array.data.length) {
    throw new Error(`${subject} has shape (${array.shape.join(', ')}), ${size} elements, but holds ${array.data.length}`);
  }
  return new ort.Tensor(type, array.data as never, array.shape);
}

/** The array over the tensor's memory. */
export function fromOrtTensor(tensor: OrtTensor, subject: string): NdArray {
  const dtype = DTYPES.get(tensor.type);
  if (dtype === undefined) throw new UnsupportedError(`${subject} is ${tensor.type}, which pcomp does not read`);
  const data = tensor.data as TypedArray;
  // Node 24 hands float16 over as a Float16Array; ours are bits.
  const bits = dtype === 'F16' ? new Uint16Array(data.buffer as ArrayBuffer, data.byteOffset, data.length) : data;
  return { dtype, shape: tensor.dims, data: bits };
}
