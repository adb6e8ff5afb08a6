/** Plain data to ONNX messages. Initializers stay apart, so that a model is laid out without their bytes being at hand. */
import { ATTRIBUTE_TYPES } from './attribute-reader.ts';
import { onnxDataType } from './data-types.ts';
import type { Attribute, Graph, Initializer, InlineTensor, Node, OnnxModel } from './model.ts';
import {
  type AttributeMessage,
  attributeCodec,
  graphCodec,
  modelCodec,
  type NodeMessage,
  type TensorMessage,
  tensorCodec,
  toInt64,
} from './schema.ts';
import { valueInfoMessage } from './value-types.ts';
import { bytesField, bytesFieldHead, concat } from './wire.ts';

/** Where an initializer is stored when not inside the message. */
export interface ExternalPlace {
  readonly location: string;
  readonly offset: number;
}

export type Placement = ReadonlyMap<Initializer, ExternalPlace>;

/** A message as the pieces it is written from: bytes, and initializers whose bytes belong there. */
export interface Layout {
  readonly pieces: readonly (Uint8Array | Initializer)[];
  readonly byteLength: number;
}

/** Before this version every initializer had to be an input as well. */
const IR_VERSION_WITH_PURE_INITIALIZERS = 4;

/** Field numbers. */
const MODEL_GRAPH = 7;
const GRAPH_INITIALIZER = 5;
const TENSOR_RAW_DATA = 9;
const EXTERNAL = 1;

/** Lays a model out, fields in the order of their numbers. Initializers that `placement` knows are referred to, all others inside. */
export async function layoutModel(model: OnnxModel, placement: Placement = new Map()): Promise<Layout> {
  const graph = await layoutGraph(withLegacyInputs(model), placement);
  return layout([
    modelCodec.encode({
      irVersion: toInt64(model.irVersion),
      ...named('producerName', model.producerName),
      ...named('producerVersion', model.producerVersion),
    }),
    bytesFieldHead(MODEL_GRAPH, graph.byteLength),
    ...graph.pieces,
    modelCodec.encode({
      opsetImport: [...model.opsets].map(([domain, version]) => ({ ...named('domain', domain), version: toInt64(version) })),
      metadataProps: [...model.metadata].map(([key, value]) => ({ key, value })),
    }),
    ...(model.unknown ?? []),
  ]);
}

/** Every initializer of a graph and its subgraphs, in the order they are written. */
export function initializersOf(graph: Graph): Initializer[] {
  const inner = graph.nodes.flatMap((node) =>
    Object.values(node.attributes).flatMap((attribute) => (attribute.kind === 'graph' ? initializersOf(attribute.value) : [])),
  );
  return [...inner, ...graph.initializers.values()];
}

function withLegacyInputs({ irVersion, graph }: OnnxModel): Graph {
  // An input whose initializer is gone would be an input that has to be fed.
  const overridable = (graph.overridableInputs ?? []).filter(({ name }) => graph.initializers.has(name));
  if (irVersion < IR_VERSION_WITH_PURE_INITIALIZERS) {
    const known = new Set([...graph.inputs, ...overridable].map(({ name }) => name));
    for (const { name, dtype, shape } of graph.initializers.values())
      if (!known.has(name)) overridable.push({ name, dtype, shape });
  }
  return { ...graph, overridableInputs: overridable };
}

async function layoutGraph(graph: Graph, placement: Placement): Promise<Layout> {
  const nodes: NodeMessage[] = [];
  for (const node of graph.nodes) nodes.push(await nodeMessage(node, placement));
  const pieces: (Uint8Array | Initializer)[] = [graphCodec.encode({ node: nodes, ...named('name', graph.name) })];
  for (const [name, initializer] of graph.initializers) {
    if (name !== initializer.name) throw new RangeError(`initializer "${initializer.name}" is listed under the name "${name}"`);
    pieces.push(...initializerPieces(initializer, placement.get(initializer)));
  }
  pieces.push(
    graphCodec.encode({
      input: [...graph.inputs, ...(graph.overridableInputs ?? [])].map(valueInfoMessage),
      output: graph.outputs.map(valueInfoMessage),
      valueInfo: graph.valueInfo.map(valueInfoMessage),
    }),
    ...(graph.unknown ?? []),
  );
  return layout(pieces);
}

function initializerPieces(initializer: Initializer, place: ExternalPlace | undefined): (Uint8Array | Initializer)[] {
  const { byteLength, unknown = [] } = initializer;
  if (place !== undefined) {
    const entries = { location: place.location, offset: String(place.offset), length: String(byteLength) };
    const message: TensorMessage = {
      ...tensorHeader(initializer),
      externalData: Object.entries(entries).map(([key, value]) => ({ key, value })),
      dataLocation: EXTERNAL,
    };
    return [bytesField(GRAPH_INITIALIZER, concat([tensorCodec.encode(message), ...unknown]))];
  }
  const header = tensorCodec.encode(tensorHeader(initializer));
  const data = layout([header, bytesFieldHead(TENSOR_RAW_DATA, byteLength), initializer, ...unknown]);
  return [bytesFieldHead(GRAPH_INITIALIZER, data.byteLength), ...data.pieces];
}

async function nodeMessage(node: Node, placement: Placement): Promise<NodeMessage> {
  const attribute: Uint8Array[] = [];
  for (const [name, value] of Object.entries(node.attributes))
    attribute.push(attributeCodec.encode(await attributeMessage(name, value, placement)));
  return {
    input: node.inputs,
    output: node.outputs,
    ...named('name', node.name),
    opType: node.op,
    attribute,
    ...named('domain', node.domain),
    ...unknowns(node),
  };
}

async function attributeMessage(name: string, attribute: Attribute, placement: Placement): Promise<AttributeMessage> {
  const common = { name, type: ATTRIBUTE_TYPES[attribute.kind], ...unknowns(attribute) };
  switch (attribute.kind) {
    case 'float':
      return { ...common, f: attribute.value };
    case 'int':
      return { ...common, i: toInt64(attribute.value) };
    case 'string':
      return { ...common, s: Buffer.from(attribute.value, 'utf8') };
    case 'tensor':
      return {
        ...common,
        t: tensorCodec.encode({ ...tensorHeader(attribute.value), rawData: attribute.value.data, ...unknowns(attribute.value) }),
      };
    case 'floats':
      return { ...common, floats: attribute.value };
    case 'ints':
      return { ...common, ints: attribute.value.map(toInt64) };
    case 'strings':
      return { ...common, strings: attribute.value.map((text) => Buffer.from(text, 'utf8')) };
    case 'graph':
      return { ...common, g: await assemble(await layoutGraph(attribute.value, placement)) };
    default:
      throw attribute satisfies never;
  }
}

function tensorHeader({ name, dtype, shape }: InlineTensor | Initializer): TensorMessage {
  return { dims: shape.map(toInt64), dataType: onnxDataType(dtype), ...named('name', name) };
}

/** The bytes of a layout, in one array. */
export async function assemble({ pieces, byteLength }: Layout): Promise<Uint8Array> {
  const whole = new Uint8Array(byteLength);
  let offset = 0;
  for (const piece of pieces) {
    whole.set(piece instanceof Uint8Array ? piece : await readExactly(piece, 0, piece.byteLength), offset);
    offset += piece.byteLength;
  }
  return whole;
}

/** Bytes `[start, end)` of an initializer, refusing any other number of them: everything behind would be displaced. */
export async function readExactly(initializer: Initializer, start: number, end: number): Promise<Uint8Array> {
  const bytes = await initializer.read(start, end);
  if (bytes.byteLength !== end - start) {
    throw new RangeError(
      `initializer "${initializer.name}" gave ${bytes.byteLength} bytes for [${start}, ${end}) of ${initializer.byteLength}`,
    );
  }
  return bytes;
}

function layout(pieces: readonly (Uint8Array | Initializer)[]): Layout {
  return { pieces, byteLength: pieces.reduce((sum, piece) => sum + piece.byteLength, 0) };
}

/** Empty strings are left out, as protobuf 3 does. */
function named<K extends string>(key: K, value: string | undefined): { [P in K]?: string } {
  return value === undefined || value === '' ? {} : ({ [key]: value } as { [P in K]: string });
}

function unknowns({ unknown }: { readonly unknown?: readonly Uint8Array[] }): { $unknowns?: readonly Uint8Array[] } {
  return unknown === undefined ? {} : { $unknowns: unknown };
}
