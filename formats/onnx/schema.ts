/**
 * The messages of an ONNX file, by the field numbers of the ONNX IR specification (ONNX 1.20, IR version 13).
 *
 * Only the fields that `model.ts` has a place for are named here. Every other field (documentation, functions, training
 * information, device configurations, sparse initializers, annotations, metadata of nodes, and what later versions add) is
 * decoded into `$unknowns` and written back byte for byte. Children that are decoded one at a time, or that may be large, are
 * declared as `bytes`: on the wire a message and a byte string are the same.
 */
import protobuf from 'protobufjs';

const PROTO = `
edition = "2023";
option features.repeated_field_encoding = EXPANDED;

message Model {
  int64 ir_version = 1;
  string producer_name = 2;
  string producer_version = 3;
  // 4 domain, 5 model_version, 6 doc_string
  // 7 graph: walked field by field, so that large initializers stay on disk
  repeated OperatorSet opset_import = 8;
  repeated Entry metadata_props = 14;
  // 20 training_info, 25 functions, 26 configuration
}

message OperatorSet {
  string domain = 1;
  int64 version = 2;
}

message Entry {
  string key = 1;
  string value = 2;
}

message Graph {
  repeated Node node = 1;
  string name = 2;
  repeated bytes initializer = 5; // Tensor
  // 10 doc_string
  repeated ValueInfo input = 11;
  repeated ValueInfo output = 12;
  repeated ValueInfo value_info = 13;
  // 14 quantization_annotation, 15 sparse_initializer, 16 metadata_props
}

message Node {
  repeated string input = 1;
  repeated string output = 2;
  string name = 3;
  string op_type = 4;
  repeated bytes attribute = 5; // Attribute
  // 6 doc_string
  string domain = 7;
  // 8 overload, 9 metadata_props, 10 device_configurations
}

message Attribute {
  string name = 1;
  float f = 2;
  int64 i = 3;
  bytes s = 4;
  bytes t = 5; // Tensor
  bytes g = 6; // Graph
  repeated float floats = 7;
  repeated int64 ints = 8;
  repeated bytes strings = 9;
  // 10 tensors, 11 graphs, 13 doc_string, 14 tp, 15 type_protos
  int32 type = 20;
  string ref_attr_name = 21;
  // 22 sparse_tensor, 23 sparse_tensors
}

message Tensor {
  repeated int64 dims = 1;
  int32 data_type = 2;
  bytes segment = 3;
  // 4 float_data, 5 int32_data, 7 int64_data, 10 double_data, 11 uint64_data: read by tensor-reader.ts, never written
  // 6 string_data
  string name = 8;
  bytes raw_data = 9;
  // 12 doc_string
  repeated Entry external_data = 13;
  int32 data_location = 14;
  // 16 metadata_props
}

message SparseTensor {
  bytes values = 1; // Tensor
  // 2 indices, 3 dims
}

message ValueInfo {
  string name = 1;
  bytes type = 2; // Type
  // 3 doc_string, 4 metadata_props
}

message Type {
  TensorType tensor_type = 1;
  // 4 sequence_type, 5 map_type, 6 denotation, 7 opaque_type, 8 sparse_tensor_type, 9 optional_type
}

message TensorType {
  int32 elem_type = 1;
  Shape shape = 2;
}

message Shape {
  repeated Dimension dim = 1;
}

message Dimension {
  int64 dim_value = 1;
  string dim_param = 2;
  // 3 denotation
}
`;

/** A 64-bit integer as protobufjs hands it over and takes it: two 32-bit halves. */
export interface Int64 {
  readonly low: number;
  readonly high: number;
  readonly unsigned: boolean;
}

/** What every message may carry besides its own fields. */
export interface WithUnknowns {
  $unknowns?: readonly Uint8Array[];
}

export interface EntryMessage extends WithUnknowns {
  key?: string;
  value?: string;
}

export interface OperatorSetMessage extends WithUnknowns {
  domain?: string;
  version?: Int64;
}

export interface ModelMessage extends WithUnknowns {
  irVersion?: Int64;
  producerName?: string;
  producerVersion?: string;
  opsetImport?: OperatorSetMessage[];
  metadataProps?: EntryMessage[];
}

export interface GraphMessage extends WithUnknowns {
  node?: NodeMessage[];
  name?: string;
  initializer?: Uint8Array[];
  input?: ValueInfoMessage[];
  output?: ValueInfoMessage[];
  valueInfo?: ValueInfoMessage[];
}

export interface NodeMessage extends WithUnknowns {
  input?: readonly string[];
  output?: readonly string[];
  name?: string;
  opType?: string;
  attribute?: Uint8Array[];
  domain?: string;
}

export interface AttributeMessage extends WithUnknowns {
  name?: string;
  f?: number;
  i?: Int64;
  s?: Uint8Array;
  t?: Uint8Array;
  g?: Uint8Array;
  floats?: readonly number[];
  ints?: Int64[];
  strings?: Uint8Array[];
  type?: number;
  refAttrName?: string;
}

export interface TensorMessage extends WithUnknowns {
  dims?: Int64[];
  dataType?: number;
  segment?: Uint8Array;
  name?: string;
  rawData?: Uint8Array;
  externalData?: EntryMessage[];
  dataLocation?: number;
}

export interface SparseTensorMessage extends WithUnknowns {
  values?: Uint8Array;
}

export interface ValueInfoMessage extends WithUnknowns {
  name?: string;
  type?: Uint8Array;
}

export interface DimensionMessage extends WithUnknowns {
  dimValue?: Int64;
  dimParam?: string;
}

export interface TypeMessage extends WithUnknowns {
  tensorType?: WithUnknowns & { elemType?: number; shape?: WithUnknowns & { dim?: DimensionMessage[] } };
}

export interface Codec<T> {
  /** Throws what protobufjs throws; the reader turns that into a FormatError. */
  decode(bytes: Uint8Array): T;
  /** Fields in the order of their numbers, then `$unknowns` in theirs. */
  encode(message: T): Uint8Array;
}

const root = protobuf.parse(PROTO, new protobuf.Root()).root.resolveAll();

// protobufjs puts default values on the prototypes; here an absent field has to read as absent.
for (const type of root.nestedArray) {
  if (type instanceof protobuf.Type) for (const { name } of type.fieldsArray) Reflect.deleteProperty(type.ctor.prototype, name);
}

function codec<T extends WithUnknowns>(name: string): Codec<T> {
  const type = root.lookupType(name);
  return {
    decode(bytes) {
      const reader = protobuf.Reader.create(bytes);
      reader.discardUnknown = false;
      return type.decode(reader) as unknown as T;
    },
    encode: (message) => type.encode(message).finish(),
  };
}

export const modelCodec = codec<ModelMessage>('Model');
export const graphCodec = codec<GraphMessage>('Graph');
export const attributeCodec = codec<AttributeMessage>('Attribute');
export const tensorCodec = codec<TensorMessage>('Tensor');
export const sparseTensorCodec = codec<SparseTensorMessage>('SparseTensor');
export const typeCodec = codec<TypeMessage>('Type');
export const entryCodec = codec<EntryMessage>('Entry');

/** Exact: a number in the safe range, a bigint beyond it. */
export function fromInt64({ low, high }: Int64): number | bigint {
  const number = high * 2 ** 32 + (low >>> 0);
  return Number.isSafeInteger(number) ? number : (BigInt(high) << 32n) | BigInt(low >>> 0);
}

/** Throws RangeError when `value` is not an integer of 64 bits. */
export function toInt64(value: number | bigint): Int64 {
  const exact = BigInt(value);
  if (BigInt.asIntN(64, exact) !== exact) throw new RangeError(`${value} does not fit in 64 bits`);
  return { low: Number(BigInt.asIntN(32, exact)), high: Number(exact >> 32n), unsigned: false };
}
