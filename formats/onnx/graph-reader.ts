/** GraphProto to plain data, initializers and subgraphs included. */
import { FormatError } from '../../src/errors.ts';
import { readAttribute } from './attribute-reader.ts';
import { checkName, decode, unknownOf } from './decoding.ts';
import { lazyInitializer } from './initializers.ts';
import type { Attribute, Graph, Initializer, Node } from './model.ts';
import { type GraphMessage, graphCodec, type NodeMessage, sparseTensorCodec, tensorCodec } from './schema.ts';
import { NESTED, readTensor, type TensorContext } from './tensor-reader.ts';
import { readValueInfo } from './value-types.ts';
import { type ByteSource, bytesField, concat, fieldsOf, MemorySource, WIRE } from './wire.ts';

/** A subgraph is three messages below its graph, and protobuf's own readers stop at 100 nested messages. */
const MAX_SUBGRAPH_DEPTH = 32;

const INITIALIZER = 5;
const SPARSE_INITIALIZER = 15;

/** A graph and the names of values that are defined by fields kept encoded. */
export interface ReadGraph {
  readonly graph: Graph;
  readonly carried: ReadonlyMap<Graph, readonly string[]>;
}

/** Reads the GraphProto at `[start, end)` of the source. Initializers are looked at one at a time, large ones are not read. */
export async function readGraph(source: ByteSource, start: number, end: number, context: TensorContext): Promise<ReadGraph> {
  const carried = new Map<Graph, readonly string[]>();
  const graph = await new GraphReader(context, carried).read(source, start, end, 0);
  return { graph, carried };
}

class GraphReader {
  readonly #context: TensorContext;
  readonly #carried: Map<Graph, readonly string[]>;

  constructor(context: TensorContext, carried: Map<Graph, readonly string[]>) {
    this.#context = context;
    this.#carried = carried;
  }

  async read(source: ByteSource, start: number, end: number, depth: number): Promise<Graph> {
    const { path } = this.#context;
    if (depth > MAX_SUBGRAPH_DEPTH) {
      throw new FormatError(
        path,
        'nesting-too-deep',
        `graphs are nested more than ${MAX_SUBGRAPH_DEPTH} deep, beyond what protobuf readers take`,
      );
    }
    const rest: Uint8Array[] = [];
    const carriedFields: Uint8Array[] = [];
    const carriedNames: string[] = [];
    const initializers = new Map<string, Initializer>();
    const defined = (name: string): void => {
      if (name === '') throw new FormatError(path, 'initializer-without-name', 'an initializer has no name');
      if (initializers.has(name) || carriedNames.includes(name))
        throw new FormatError(path, 'initializer-twice', `initializer "${name}" is there twice`);
    };
    for await (const field of fieldsOf(source, start, end, NESTED)) {
      if (field.number === INITIALIZER && field.wireType === WIRE.bytes) {
        const tensor = await readTensor(source, field.valueStart, field.end, this.#context);
        defined(tensor.name);
        if ('encoded' in tensor) {
          carriedFields.push(bytesField(INITIALIZER, tensor.encoded));
          carriedNames.push(tensor.name);
        } else {
          const { name, dtype, shape, unknown, fetch } = tensor;
          initializers.set(name, lazyInitializer({ name, dtype, shape, ...(unknown === undefined ? {} : { unknown }) }, fetch));
        }
        continue;
      }
      const record = Uint8Array.from(await source.read(field.start, field.end));
      if (field.number === SPARSE_INITIALIZER && field.wireType === WIRE.bytes) {
        const name = sparseName(record.subarray(field.valueStart - field.start), path);
        defined(name);
        carriedNames.push(name);
      }
      rest.push(record);
    }
    const message = decode(graphCodec, concat(rest), path, 'the graph');
    const graph = await this.#plain(message, initializers, carriedFields, depth);
    if (carriedNames.length > 0) this.#carried.set(graph, carriedNames);
    return graph;
  }

  async #plain(
    message: GraphMessage,
    initializers: Map<string, Initializer>,
    carried: readonly Uint8Array[],
    depth: number,
  ): Promise<Graph> {
    const { path } = this.#context;
    const nodes: Node[] = [];
    for (const node of message.node ?? []) nodes.push(await this.#node(node, depth));
    const allInputs = (message.input ?? []).map((value) => readValueInfo(value, path));
    // A subgraph's inputs are bound by position: taking one out would shift the others.
    const overridable = depth === 0 ? allInputs.filter((value) => initializers.has(value.name)) : [];
    return {
      name: message.name ?? '',
      nodes,
      inputs: allInputs.filter((value) => !overridable.includes(value)),
      outputs: (message.output ?? []).map((value) => readValueInfo(value, path)),
      valueInfo: (message.valueInfo ?? []).map((value) => readValueInfo(value, path)),
      initializers,
      ...(overridable.length === 0 ? {} : { overridableInputs: overridable }),
      ...unknownOf(message, carried),
    };
  }

  async #node(message: NodeMessage, depth: number): Promise<Node> {
    const { path } = this.#context;
    const op = checkName(message.opType ?? '', path, 'an operator');
    const name = checkName(message.name ?? '', path, 'a node');
    const outputs = [...(message.output ?? [])];
    const inputs = [...(message.input ?? [])];
    for (const value of [...inputs, ...outputs]) checkName(value, path, 'a value');
    const where = name === '' ? `the ${op} node of "${outputs.find((output) => output !== '') ?? ''}"` : `node "${name}"`;
    if (op === '') throw new FormatError(path, 'node-without-operator', `${where} names no operator`);
    const attributes = new Map<string, Attribute>();
    const carried: Uint8Array[] = [];
    const names = new Set<string>();
    for (const encoded of message.attribute ?? []) {
      const read = await readAttribute(encoded, where, this.#context, (graph) =>
        this.read(new MemorySource(path, graph), 0, graph.byteLength, depth + 1),
      );
      if (names.has(read.name)) throw new FormatError(path, 'attribute-twice', `${where} has attribute "${read.name}" twice`);
      names.add(read.name);
      if ('carried' in read) carried.push(read.carried);
      else attributes.set(read.name, read.attribute);
    }
    return {
      name,
      op,
      domain: domainOf(message.domain),
      inputs,
      outputs,
      // Unlike assignment, fromEntries takes a name like __proto__ for what it is.
      attributes: Object.fromEntries(attributes),
      ...unknownOf(message, carried),
    };
  }
}

/** `ai.onnx` is the long name of the default domain. */
export function domainOf(domain: string | undefined): string {
  return domain === undefined || domain === 'ai.onnx' ? '' : domain;
}

function sparseName(encoded: Uint8Array, path: string): string {
  const { values } = decode(sparseTensorCodec, encoded, path, 'a sparse initializer');
  return values === undefined ? '' : (decode(tensorCodec, values, path, 'the values of a sparse initializer').name ?? '');
}
