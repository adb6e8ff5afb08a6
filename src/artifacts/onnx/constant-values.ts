/** Works out what a runtime folds when it loads a model: constants of a graph behind the few operations that pcomp puts on constants. */
import { elementCount, toFloat32 } from '../../../formats/dtype.ts';
import type { Graph, Node } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import { FormatError } from '../../errors.ts';

/** A folded constant. Integers of up to 32 bits are held as they are, floats as float32. */
export interface ConstantValue {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly values: Float32Array | Uint8Array | Int32Array | BigInt64Array;
}

/** Constants of one graph, folded when asked for. */
export class ConstantValues {
  readonly #path: string;
  readonly #graph: Graph;
  readonly #producers = new Map<string, Node>();

  constructor(path: string, graph: Graph) {
    this.#path = path;
    this.#graph = graph;
    for (const node of graph.nodes) for (const output of node.outputs) this.#producers.set(output, node);
  }

  /** The node behind a value; undefined for inputs and initializers. */
  producer(value: string): Node | undefined {
    return this.#producers.get(value);
  }

  /** Throws FormatError `onnx-linear-constant` when a value depends on anything but constants, or on an operation that is not one of ours. */
  async of(name: string): Promise<ConstantValue> {
    const initializer = this.#graph.initializers.get(name);
    if (initializer) {
      const { dtype, shape } = initializer;
      return { dtype, shape, values: typed(dtype, await initializer.read()) };
    }
    const node = this.#producers.get(name);
    const inputs: ConstantValue[] = [];
    for (const input of node?.inputs ?? []) inputs.push(await this.of(input));
    const value = node && fold(node, inputs);
    if (value) return value;
    throw new FormatError(this.#path, 'onnx-linear-constant', `"${name}" is not a constant that pcomp knows how to work out`);
  }
}

function typed(dtype: DType, bytes: Uint8Array): ConstantValue['values'] {
  if (dtype === 'U8') return bytes;
  const { buffer } = bytes.slice();
  if (dtype === 'I32') return new Int32Array(buffer);
  if (dtype === 'I64') return new BigInt64Array(buffer);
  return toFloat32(dtype, bytes);
}

/** Result of one operation; undefined when it is not one of ours. */
function fold(node: Node, [a, b]: readonly ConstantValue[]): ConstantValue | undefined {
  switch (node.op) {
    case 'Reshape': {
      const shape = Array.from(b.values, Number);
      return elementCount(shape) === elementCount(a.shape) ? { ...a, shape } : undefined;
    }
    case 'Mul':
      return a.values instanceof Float32Array && b.values instanceof Float32Array ? product(a, b) : undefined;
    default:
      return undefined;
  }
}

/** Elementwise product of two constants of one rank, whose axes of size 1 stretch. */
function product(a: ConstantValue, b: ConstantValue): ConstantValue {
  const shape = a.shape.map((size, axis) => Math.max(size, b.shape[axis]));
  const values = new Float32Array(elementCount(shape));
  for (let i = 0; i < values.length; i++)
    values[i] = Number(a.values[place(i, shape, a.shape)]) * Number(b.values[place(i, shape, b.shape)]);
  return { dtype: a.dtype, shape, values };
}

/** Where element `index` of `shape` lies in a tensor that is stretched to it. */
function place(index: number, shape: readonly number[], stretched: readonly number[]): number {
  let rest = index;
  let at = 0;
  let step = 1;
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    if (stretched[axis] > 1) at += (rest % shape[axis]) * step;
    step *= stretched[axis];
    rest = Math.floor(rest / shape[axis]);
  }
  return at;
}
