/** ValueInfoProto to plain data and back. What a dtype and a shape cannot tell is kept encoded. */
import { FormatError } from '../../src/errors.ts';
import { carriedTypeName, dtypeOf, onnxDataType } from './data-types.ts';
import { checkName, decode, unknownOf } from './decoding.ts';
import type { Dim, ValueInfo } from './model.ts';
import { type DimensionMessage, fromInt64, type TypeMessage, toInt64, typeCodec, type ValueInfoMessage } from './schema.ts';

export function readValueInfo(message: ValueInfoMessage, path: string): ValueInfo {
  const name = checkName(message.name ?? '', path, 'a value');
  if (message.type === undefined) return { name, dtype: null, shape: null, ...unknownOf(message) };
  const type = decode(typeCodec, message.type, path, `the type of value "${name}"`);
  const elemType = type.tensorType?.elemType ?? 0;
  if (elemType !== 0 && dtypeOf(elemType) === undefined && carriedTypeName(elemType) === undefined) {
    throw new FormatError(path, 'data-type-unknown', `value "${name}" has data type ${elemType}; ONNX 1.20 defines 1 to 26`);
  }
  const plain: ValueInfo = { name, ...plainType(type), ...unknownOf(message) };
  const spelled = typeCodec.encode(typeMessage(plain) ?? {});
  return Buffer.compare(spelled, message.type) === 0 ? plain : { ...plain, encodedType: Uint8Array.from(message.type) };
}

export function valueInfoMessage(value: ValueInfo): ValueInfoMessage {
  return {
    ...(value.name === '' ? {} : { name: value.name }),
    ...withType(value),
    ...(value.unknown === undefined ? {} : { $unknowns: value.unknown }),
  };
}

function withType(value: ValueInfo): { readonly type?: Uint8Array } {
  if (value.encodedType !== undefined) {
    const { dtype, shape } = plainType(typeCodec.decode(value.encodedType));
    if (dtype === value.dtype && sameShape(shape, value.shape)) return { type: value.encodedType };
  }
  const message = typeMessage(value);
  return message === undefined ? {} : { type: typeCodec.encode(message) };
}

function plainType(type: TypeMessage): Pick<ValueInfo, 'dtype' | 'shape'> {
  const tensor = type.tensorType;
  return {
    dtype: dtypeOf(tensor?.elemType ?? 0) ?? null,
    shape: tensor?.shape === undefined ? null : (tensor.shape.dim ?? []).map(readDim),
  };
}

function readDim(dim: DimensionMessage): Dim {
  if (dim.dimValue === undefined) return dim.dimParam ?? '';
  const value = fromInt64(dim.dimValue);
  // Older exporters spell an unknown dimension -1.
  return typeof value === 'bigint' || value < 0 ? '' : value;
}

function typeMessage({ dtype, shape }: Pick<ValueInfo, 'dtype' | 'shape'>): TypeMessage | undefined {
  if (dtype === null && shape === null) return undefined;
  return {
    tensorType: {
      ...(dtype === null ? {} : { elemType: onnxDataType(dtype) }),
      ...(shape === null ? {} : { shape: { dim: shape.map(dimensionMessage) } }),
    },
  };
}

function dimensionMessage(dim: Dim): DimensionMessage {
  if (typeof dim === 'number') return { dimValue: toInt64(dim) };
  return dim === '' ? {} : { dimParam: dim };
}

function sameShape(a: ValueInfo['shape'], b: ValueInfo['shape']): boolean {
  if (a === null || b === null) return a === b;
  return a.length === b.length && a.every((dim, axis) => dim === b[axis]);
}
