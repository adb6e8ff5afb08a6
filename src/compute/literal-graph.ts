/** A small graph written out by hand: the engine's own probes and products, where the graph builder would be a detour. */
import type { Attribute, Initializer, Node, OnnxModel, ValueInfo } from '../../formats/onnx/model.ts';
import type { DType } from '../../formats/tensor.ts';

export interface LiteralNode {
  readonly op: string;
  readonly inputs: readonly string[];
  readonly output: string;
  /** Whole numbers become int attributes. */
  readonly attributes?: Readonly<Record<string, number>>;
}

/** Name -> element type and dimensions. */
export type LiteralValues = Readonly<Record<string, readonly [DType, ...(string | number)[]]>>;

/** A model of standard operators (opset 21). `axes` are int64 vectors of one element, as ReduceSum wants them. */
export function literalGraph(
  name: string,
  parts: {
    inputs: LiteralValues;
    outputs: LiteralValues;
    nodes: readonly LiteralNode[];
    axes?: Readonly<Record<string, number>>;
  },
): OnnxModel {
  const nodes = parts.nodes.map(({ op, inputs, output, attributes = {} }): Node => {
    const entries = Object.entries(attributes).map(([key, value]): [string, Attribute] => [key, attributeOf(key, value)]);
    return { name: output, op, domain: '', inputs, outputs: [output], attributes: Object.fromEntries(entries) };
  });
  const initializers = Object.entries(parts.axes ?? {}).map(([key, axis]): [string, Initializer] => [key, axisOf(key, axis)]);
  return {
    irVersion: 10,
    opsets: new Map([['', 21]]),
    producerName: 'pcomp',
    producerVersion: '',
    graph: {
      name,
      nodes,
      inputs: valuesOf(parts.inputs),
      outputs: valuesOf(parts.outputs),
      valueInfo: [],
      initializers: new Map(initializers),
    },
    metadata: new Map(),
  };
}

// Gemm's scalars are the only float attributes these graphs use.
function attributeOf(key: string, value: number): Attribute {
  return key === 'alpha' || key === 'beta' ? { kind: 'float', value } : { kind: 'int', value };
}

function axisOf(name: string, axis: number): Initializer {
  const data = new Uint8Array(BigInt64Array.of(BigInt(axis)).buffer);
  const read = async (start?: number, end?: number): Promise<Uint8Array> => data.subarray(start ?? 0, end ?? data.length);
  return { name, dtype: 'I64', shape: [1], byteLength: 8, read };
}

function valuesOf(values: LiteralValues): ValueInfo[] {
  return Object.entries(values).map(([name, [dtype, ...shape]]) => ({ name, dtype, shape }));
}
