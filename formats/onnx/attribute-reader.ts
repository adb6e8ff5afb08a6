/** AttributeProto to plain data. */
import { FormatError, UnsupportedError } from '../../src/errors.ts';
import { checkName, decode, unknownOf } from './decoding.ts';
import type { AttributeValue, Graph, InlineTensor } from './model.ts';
import { type AttributeMessage, attributeCodec, fromInt64 } from './schema.ts';
import { readTensor, type TensorContext } from './tensor-reader.ts';
import { bytesField, MemorySource } from './wire.ts';

/** AttributeProto.AttributeType, for the kinds model.ts has a place for. */
export const ATTRIBUTE_TYPES = {
  float: 1,
  int: 2,
  string: 3,
  tensor: 4,
  graph: 5,
  floats: 6,
  ints: 7,
  strings: 8,
} as const satisfies Record<AttributeValue['kind'], number>;

/** TENSORS 9, GRAPHS 10, SPARSE_TENSOR 11, SPARSE_TENSORS 12, TYPE_PROTO 13, TYPE_PROTOS 14. */
const LAST_TYPE = 14;

/** The number of NodeProto.attribute. */
const NODE_ATTRIBUTE = 5;

const KINDS: ReadonlyMap<number, AttributeValue['kind']> = new Map(
  Object.entries(ATTRIBUTE_TYPES).map(([kind, type]): [number, AttributeValue['kind']] => [type, kind as AttributeValue['kind']]),
);

export type ReadAttribute =
  | { readonly name: string; readonly attribute: AttributeValue & { readonly unknown?: readonly Uint8Array[] } }
  /** A kind without a place in the model: the field of the node, as it was. */
  | { readonly name: string; readonly carried: Uint8Array };

/** @param readGraph reads an encoded GraphProto one level deeper */
export async function readAttribute(
  encoded: Uint8Array,
  where: string,
  context: TensorContext,
  readGraph: (encoded: Uint8Array) => Promise<Graph>,
): Promise<ReadAttribute> {
  const { path } = context;
  const message = decode(attributeCodec, encoded, path, `an attribute of ${where}`);
  const name = checkName(message.name ?? '', path, `an attribute of ${where}`);
  if (name === '') throw new FormatError(path, 'attribute-without-name', `${where} has an attribute without a name`);
  const what = `attribute "${name}" of ${where}`;
  const type = message.type || inferType(message);
  if (type > LAST_TYPE || type < 0)
    throw new FormatError(path, 'attribute-type-unknown', `${what} has type ${type}; ONNX 1.20 defines 1 to ${LAST_TYPE}`);
  const kind = KINDS.get(type);
  const carried = { name, carried: bytesField(NODE_ATTRIBUTE, encoded) };
  // A reference to an attribute of the enclosing function has no value of its own.
  if (kind === undefined || message.refAttrName !== undefined) return carried;
  const value = await readValue(kind, message, what, context, readGraph);
  return value === undefined ? carried : { name, attribute: { ...value, ...unknownOf(message) } };
}

/** IR version 1 had no type field; and type 0 with no value at all is kept as it is. */
function inferType(message: AttributeMessage): number {
  if (message.f !== undefined) return ATTRIBUTE_TYPES.float;
  if (message.i !== undefined) return ATTRIBUTE_TYPES.int;
  if (message.s !== undefined) return ATTRIBUTE_TYPES.string;
  if (message.t !== undefined) return ATTRIBUTE_TYPES.tensor;
  if (message.g !== undefined) return ATTRIBUTE_TYPES.graph;
  if (message.floats?.length) return ATTRIBUTE_TYPES.floats;
  if (message.ints?.length) return ATTRIBUTE_TYPES.ints;
  if (message.strings?.length) return ATTRIBUTE_TYPES.strings;
  return 0;
}

/** `undefined`: a value that plain data cannot hold without loss. */
async function readValue(
  kind: AttributeValue['kind'],
  message: AttributeMessage,
  what: string,
  context: TensorContext,
  readGraph: (encoded: Uint8Array) => Promise<Graph>,
): Promise<AttributeValue | undefined> {
  const missing = (): FormatError =>
    new FormatError(context.path, 'attribute-value-missing', `${what} says it is a ${kind} but holds none`);
  switch (kind) {
    // A writer of protobuf 3 leaves zeros and empty strings out.
    case 'float':
      return { kind, value: message.f ?? 0 };
    case 'int':
      return { kind, value: message.i === undefined ? 0 : fromInt64(message.i) };
    case 'string': {
      const value = text(message.s ?? new Uint8Array(0));
      return value === undefined ? undefined : { kind, value };
    }
    case 'floats':
      return { kind, value: [...(message.floats ?? [])] };
    case 'ints':
      return { kind, value: (message.ints ?? []).map(fromInt64) };
    case 'strings': {
      const values = (message.strings ?? []).map(text);
      return values.every((value) => value !== undefined) ? { kind, value: values } : undefined;
    }
    case 'tensor': {
      if (message.t === undefined) throw missing();
      const value = await readInlineTensor(message.t, what, context);
      return value === undefined ? undefined : { kind, value };
    }
    case 'graph':
      if (message.g === undefined) throw missing();
      return { kind, value: await readGraph(message.g) };
    default:
      throw kind satisfies never;
  }
}

async function readInlineTensor(encoded: Uint8Array, what: string, context: TensorContext): Promise<InlineTensor | undefined> {
  const source = new MemorySource(context.path, encoded);
  const tensor = await readTensor(source, 0, encoded.byteLength, context);
  if ('encoded' in tensor) return undefined;
  const { name, dtype, shape, byteLength, unknown } = tensor;
  // Attributes are held in memory; a larger constant is an initializer in every exporter.
  if (byteLength > MAX_ATTRIBUTE_BYTES)
    throw new UnsupportedError(
      `${context.path}: ${what} is a tensor of ${byteLength} bytes; pcomp holds attributes in memory, up to ${MAX_ATTRIBUTE_BYTES}`,
    );
  const data = Uint8Array.from(await tensor.fetch(0, byteLength));
  return { dtype, shape, data, ...(name === '' ? {} : { name }), ...(unknown === undefined ? {} : { unknown }) };
}

/** What one Buffer of Node 20 may be read into. */
const MAX_ATTRIBUTE_BYTES = 2 ** 31 - 1;

const UTF8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function text(bytes: Uint8Array): string | undefined {
  try {
    return UTF8.decode(bytes);
  } catch {
    return undefined;
  }
}
