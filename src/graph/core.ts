/** The graph under construction: names, scopes, constants, inputs and outputs. Operators are added on top of it (ops/). */
import type { Attribute, Dim, Initializer, Node, OnnxModel, ValueInfo } from '../../formats/onnx/model.ts';
import type { DType } from '../../formats/tensor.ts';
import { formatShape, GraphError, type Shape, sameShape } from './shape.ts';

/** One tensor in the graph being built. */
export interface Value {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly Dim[];
}

/** What a node yields in one of its output places. */
export interface OutputType {
  readonly dtype: DType;
  readonly shape: Shape;
}

export interface NodeOptions {
  /** Default: the ONNX domain. */
  readonly domain?: string;
  readonly attributes?: Readonly<Record<string, Attribute>>;
  /** Last part of the node's name; default: the operator's name. */
  readonly name?: string;
  /** One entry a place; `null` leaves an optional output out. */
  readonly outputs: readonly (OutputType | null)[];
}

/** Opset versions of what pcomp writes: IR 10, as onnxruntime-genai's own builder does. */
const IR_VERSION = 10;
const OPSETS: readonly (readonly [string, number])[] = [
  ['', 21],
  ['com.microsoft', 1],
];
/** `model.layers.0.mlp` -> `model/layers.0/mlp`, as it begins the names of nodes. */
export function scopePath(module: string): string {
  return module.replace(/\.(?!\d)/g, '/');
}

/** Constants up to this many elements carry their values in their name. */
const NAMED_ELEMENTS = 8;

/**
 * Collects nodes in the order they are made, so the result is in SSA form and topologically sorted by construction.
 */
export class GraphCore {
  readonly #name: string;
  readonly #nodes: Node[] = [];
  readonly #inputs: ValueInfo[] = [];
  readonly #outputs = new Map<string, Value>();
  readonly #initializers = new Map<string, Initializer>();
  readonly #values = new Map<string, Value>();
  readonly #constants = new Map<string, Value>();
  readonly #numbers = new Map<string, readonly number[]>();
  readonly #names = new Set<string>();
  readonly #scopes: string[] = [];

  /** @param name the graph's name, shown by viewers */
  constructor(name = 'graph') {
    this.#name = name;
  }

  /**
   * Names of nodes made inside `body` begin with `path`: inside `scope('model.layers.0', ...)` a MatMul is called
   * `/model/layers.0/MatMul`. Scopes nest.
   */
  scope<T>(path: string, body: () => T): T {
    this.#scopes.push(scopePath(path));
    try {
      return body();
    } finally {
      this.#scopes.pop();
    }
  }

  /** As `scope`, but from the root: for values that several scopes share. */
  rootScope<T>(path: string, body: () => T): T {
    const outer = this.#scopes.splice(0);
    try {
      return this.scope(path, body);
    } finally {
      this.#scopes.push(...outer);
    }
  }

  /** Declares a runtime input. */
  input(name: string, dtype: DType, shape: Shape): Value {
    const value = this.#define({ name, dtype, shape });
    this.#inputs.push({ name, dtype, shape });
    return value;
  }

  /** Makes `value` a graph output of that name; `shape` may give its dimensions better names. */
  output(name: string, value: Value, shape: Shape = value.shape): void {
    this.#check('output', value);
    if (this.#names.has(name)) throw new GraphError(`output "${name}": the name is taken`);
    this.#names.add(name);
    this.#outputs.set(name, { ...value, shape });
  }

  /** The same value under a shape that says more than the builder could infer; ranks and known numbers must agree. */
  assume(value: Value, shape: Shape): Value {
    const agrees = (a: Dim, b: Dim): boolean => typeof a === 'string' || typeof b === 'string' || a === b;
    if (shape.length !== value.shape.length || !shape.every((dim, i) => agrees(dim, value.shape[i]))) {
      throw new GraphError(`"${value.name}" is ${formatShape(value.shape)}, it cannot be ${formatShape(shape)}`);
    }
    return { ...value, shape };
  }

  /** A constant whose bytes are read when the model is written or compiled. The same one may be asked for again. */
  initializer(initializer: Initializer): Value {
    const { name, dtype, shape } = initializer;
    const known = this.#initializers.get(name);
    if (known) {
      if (known.dtype === dtype && sameShape(known.shape, shape)) return this.#values.get(name)!;
      throw new GraphError(
        `initializer "${name}" is ${known.dtype} ${formatShape(known.shape)}, not ${dtype} ${formatShape(shape)}`,
      );
    }
    const value = this.#define({ name, dtype, shape });
    this.#initializers.set(name, initializer);
    return value;
  }

  /** A small constant; equal ones are stored once. `data` is row-major; I64 values are given as numbers. */
  constant(dtype: 'F32' | 'F64' | 'I32' | 'I64' | 'BOOL' | 'U8', values: ArrayLike<number>, shape: readonly number[]): Value {
    const bytes = encodeConstant(dtype, values);
    const key = `${dtype} ${shape.join()} ${Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('base64')}`;
    let value = this.#constants.get(key);
    if (!value) {
      const label = values.length <= NAMED_ELEMENTS ? Array.from(values).join(',') : shape.join('x');
      const name = this.#free(`/constants/${dtype}/${shape.length === 0 ? label : `[${label}]`}`);
      const read = async (start = 0, end = bytes.byteLength) => bytes.subarray(start, end);
      value = this.initializer({ name, dtype, shape, byteLength: bytes.byteLength, read });
      this.#constants.set(key, value);
      this.#numbers.set(name, Array.from(values));
    }
    return value;
  }

  /** A constant of rank 0. */
  scalar(dtype: 'F32' | 'F64' | 'I32' | 'I64', value: number): Value {
    return this.constant(dtype, [value], []);
  }

  /** A constant of rank 1 and dtype I64, as shapes, axes and permutations are. */
  vector(values: readonly number[]): Value {
    return this.constant('I64', values, [values.length]);
  }

  /** Adds any node. `null` among the inputs or outputs leaves an optional place empty; the result has a value per output that is not. */
  node(op: string, inputs: readonly (Value | null)[], options: NodeOptions): Value[] {
    for (const input of inputs) if (input) this.#check(op, input);
    const name = this.#free(`${this.#scopes.map((scope) => `/${scope}`).join('')}/${options.name ?? op}`);
    this.#names.add(name);
    const values: Value[] = [];
    const outputs = options.outputs.map((type, i) => {
      if (!type) return '';
      const value = this.#define({ name: `${name}/output_${i}`, dtype: type.dtype, shape: type.shape });
      values.push(value);
      return value.name;
    });
    this.#nodes.push({
      name,
      op,
      domain: options.domain ?? '',
      inputs: withoutTrailingEmpty(inputs.map((input) => input?.name ?? '')),
      outputs: withoutTrailingEmpty(outputs),
      attributes: options.attributes ?? {},
    });
    return values;
  }

  /** As `node`, for operators with one output. */
  node1(
    op: string,
    inputs: readonly (Value | null)[],
    output: OutputType,
    attributes: Readonly<Record<string, Attribute>> = {},
    domain = '',
  ): Value {
    return this.node(op, inputs, { domain, attributes, outputs: [output] })[0];
  }

  /** Every node made so far, in order; the list goes on with the graph. */
  get nodes(): readonly Node[] {
    return this.#nodes;
  }

  /** A value by its name. */
  valueNamed(name: string): Value {
    const value = this.#values.get(name);
    if (value === undefined) throw new GraphError(`"${name}" is not a value of this graph`);
    return value;
  }

  /** What a `constant` holds; undefined for any other value. */
  numbersOf({ name }: Value): readonly number[] | undefined {
    return this.#numbers.get(name);
  }

  /** The finished model. The builder may go on and build again. */
  build(): OnnxModel {
    const nodes = [...this.#nodes];
    const produced = new Map<string, number>();
    this.#nodes.forEach((node, index) => {
      for (const output of node.outputs) produced.set(output, index);
    });
    // An output takes over the name of the value behind it, unless that name must stay: then a copy carries the output's name.
    const renamed = new Map<string, string>();
    const copies: Node[] = [];
    for (const [name, value] of this.#outputs) {
      if (produced.has(value.name) && !renamed.has(value.name)) renamed.set(value.name, name);
      else
        copies.push({
          name: `/${name}/Identity`,
          op: 'Identity',
          domain: '',
          inputs: [value.name],
          outputs: [name],
          attributes: {},
        });
    }
    const rename = (name: string): string => renamed.get(name) ?? name;
    const finished = [...nodes, ...copies].map((node) => ({
      ...node,
      inputs: node.inputs.map(rename),
      outputs: node.outputs.map(rename),
    }));
    return {
      irVersion: IR_VERSION,
      opsets: new Map(OPSETS),
      producerName: 'pcomp',
      producerVersion: '',
      graph: {
        name: this.#name,
        nodes: finished,
        inputs: [...this.#inputs],
        outputs: [...this.#outputs].map(([name, { dtype, shape }]) => ({ name, dtype, shape })),
        valueInfo: [],
        initializers: new Map(this.#initializers),
      },
      metadata: new Map(),
    };
  }

  #define(value: Value): Value {
    if (this.#names.has(value.name)) throw new GraphError(`"${value.name}" is defined twice`);
    this.#names.add(value.name);
    this.#values.set(value.name, value);
    return value;
  }

  #check(op: string, value: Value): void {
    const known = this.#values.get(value.name);
    if (!known) throw new GraphError(`${op}: "${value.name}" is not a value of this graph`);
  }

  #free(name: string): string {
    let candidate = name;
    for (let i = 1; this.#names.has(candidate); i++) candidate = `${name}_${i}`;
    return candidate;
  }
}

function withoutTrailingEmpty(names: readonly string[]): string[] {
  let length = names.length;
  while (length > 0 && names[length - 1] === '') length--;
  return names.slice(0, length);
}

function encodeConstant(dtype: DType, values: ArrayLike<number>): Uint8Array {
  const typed = typedValues(dtype, values);
  return new Uint8Array(typed.buffer, typed.byteOffset, typed.byteLength);
}

function typedValues(dtype: DType, values: ArrayLike<number>): ArrayBufferView<ArrayBuffer> {
  switch (dtype) {
    case 'F32':
      return Float32Array.from(values);
    case 'F64':
      return Float64Array.from(values);
    case 'I32':
      return Int32Array.from(values);
    case 'I64':
      return BigInt64Array.from(Array.from(values, BigInt));
    case 'BOOL':
    case 'U8':
      return Uint8Array.from(values);
    default:
      throw new GraphError(`constants of dtype ${dtype} are not supported: use an initializer`);
  }
}
