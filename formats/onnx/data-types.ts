/** ONNX element types: their numbers in the file and their names here. */
import type { DType } from '../tensor.ts';

/** TensorProto.DataType by number, for the types pcomp computes with. */
const NUMBERS = {
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
  F8_E4M3: 17,
  F8_E5M2: 19,
  U4: 21,
  I4: 22,
  U2: 25,
  I2: 26,
} as const satisfies Record<DType, number>;

/** Types ONNX 1.20 has and pcomp only carries along. */
const CARRIED: ReadonlyMap<number, string> = new Map([
  [8, 'string'],
  [14, 'complex64'],
  [15, 'complex128'],
  [18, 'float8e4m3fnuz'],
  [20, 'float8e5m2fnuz'],
  [23, 'float4e2m1'],
  [24, 'float8e8m0'],
]);

const DTYPES: ReadonlyMap<number, DType> = new Map(
  Object.entries(NUMBERS).map(([dtype, number]): [number, DType] => [number, dtype as DType]),
);

/** TensorProto.DataType of a dtype. */
export function onnxDataType(dtype: DType): number {
  return NUMBERS[dtype];
}

/** The dtype of a TensorProto.DataType, or `undefined` when pcomp has none for it. */
export function dtypeOf(dataType: number): DType | undefined {
  return DTYPES.get(dataType);
}

/** The ONNX name of a valid TensorProto.DataType that pcomp only carries along. */
export function carriedTypeName(dataType: number): string | undefined {
  return CARRIED.get(dataType);
}
