/** Values of a graph as tfjs holds them: F32 as float32, BOOL as bool, I32 and I64 both as int32, which is all the integers it has. */
import type * as TfModule from '@tensorflow/tfjs';
import type { DType } from '../../../formats/tensor.ts';
import { UnsupportedError } from '../../errors.ts';
import type { NdArray } from '../engine.ts';

export type Tf = typeof TfModule;
export type TfTensor = TfModule.Tensor;

/** A value on tfjs's backend, under the element type that ONNX gives it. */
export interface TfValue {
  readonly dtype: DType;
  readonly tensor: TfTensor;
}

const TF_DTYPES: Partial<Record<DType, 'float32' | 'int32' | 'bool'>> = {
  F32: 'float32',
  I32: 'int32',
  I64: 'int32',
  BOOL: 'bool',
};

/** tfjs's element type for ours. Throws UnsupportedError; `subject` names the value. */
export function tfDtype(dtype: DType | null, subject: string): 'float32' | 'int32' | 'bool' {
  const found = dtype === null ? undefined : TF_DTYPES[dtype];
  if (found !== undefined) return found;
  throw new UnsupportedError(`${subject} is ${dtype ?? 'untyped'}: tfjs has ${Object.keys(TF_DTYPES).join(' ')}`);
}

/** A new value of the array's elements; the array must not change while the value lives. I64 beyond 32 bits is refused. */
export function toTfValue(tf: Tf, array: NdArray, subject: string): TfValue {
  const type = tfDtype(array.dtype, subject);
  const data = array.data instanceof BigInt64Array ? narrowed(array.data, subject) : array.data;
  const size = array.shape.reduce((product, dim) => product * dim, 1);
  if (size !== data.length) {
    throw new Error(`${subject} has shape (${array.shape.join(', ')}), ${size} elements, but holds ${data.length}`);
  }
  return { dtype: array.dtype, tensor: tf.tensor(data as Float32Array | Int32Array | Uint8Array, [...array.shape], type) };
}

/** The value's elements; memory of the backend's own where it computes on the CPU. */
export async function fromTfValue({ dtype, tensor }: TfValue): Promise<NdArray> {
  const data = await tensor.data();
  return { dtype, shape: tensor.shape, data: dtype === 'I64' ? BigInt64Array.from(data, BigInt) : data };
}

function narrowed(data: BigInt64Array, subject: string): Int32Array {
  const result = new Int32Array(data.length);
  for (let i = 0; i < data.length; i++) {
    result[i] = Number(data[i]);
    if (BigInt(result[i]) !== data[i])
      throw new UnsupportedError(`${subject} holds ${data[i]}: the integers of tfjs have 32 bits`);
  }
  return result;
}
