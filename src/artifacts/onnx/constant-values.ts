/** Works out what a runtime folds when it loads a model: constants of a graph behind the few operations that pcomp puts on constants. */
import { elementCount, toFloat32 } from '../../../formats/dtype.ts';
import type { Graph, Initializer, Node } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import { FormatError } from '../../errors.ts';
import { transpose } from '../transpose.ts';

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

  /** The initializer that a value is made of, or the first of them. */
  root(value: string): Initializer | undefined {
    const initializer = this.#graph.initializers.get(value);
    const node = initializer ? undefined : this.#producers.get(value);
    return initializer ?? (node && this.root(node.inputs[0] ?? ''));
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
function fold(node: Node, inputs: readonly ConstantValue[]): ConstantValue | undefined {
  const [a, b, c] = inputs;
  switch (node.op) {
    case 'Cast':
      if (a.values instanceof Uint8Array && node.attributes.to?.value === BOOLEAN) return { ...a, dtype: 'BOOL' };
      // What is float is held as float32 already.
      if (node.attributes.to?.value !== FLOAT32) return undefined;
      if (a.values instanceof Uint8Array) return { ...a, dtype: 'F32', values: Float32Array.from(a.values) };
      return a.values instanceof Float32Array ? { ...a, dtype: 'F32' } : undefined;
    case 'Where':
      return a.dtype === 'BOOL' ? chosen(a, b, c) : undefined;
    case 'BitwiseAnd':
      return bytewise(a, b, (x, y) => x & y);
    case 'BitwiseXor':
      return bytewise(a, b, (x, y) => x ^ y);
    case 'BitShift':
      return node.attributes.direction?.value === 'RIGHT' ? bytewise(a, b, (x, y) => x >> y) : undefined;
    case 'Concat':
      return joined(inputs, Number(node.attributes.axis?.value));
    case 'Gather':
      return Number(node.attributes.axis?.value) === 1 ? picked(a, Array.from(b.values, Number)) : undefined;
    case 'Reshape': {
      const shape = Array.from(b.values, Number);
      return elementCount(shape) === elementCount(a.shape) ? { ...a, shape } : undefined;
    }
    case 'Mul':
      return elementwise(a, b, (x, y) => x * y);
    case 'Sub':
      return elementwise(a, b, (x, y) => x - y);
    case 'Transpose':
      return a.values instanceof Float32Array && a.shape.length === 2 ? turned(a, a.values) : undefined;
    case 'Slice':
      return cut(a, inputs.slice(1));
    default:
      return undefined;
  }
}

/** TensorProto.DataType. */
const FLOAT32 = 1;
const BOOLEAN = 9;

/** One of two scalars for each element. */
function chosen(condition: ConstantValue, yes: ConstantValue, no: ConstantValue): ConstantValue | undefined {
  if (yes.values.length !== 1 || no.values.length !== 1) return undefined;
  const [a, b] = [Number(yes.values[0]), Number(no.values[0])];
  return {
    ...yes,
    shape: condition.shape,
    values: Float32Array.from(condition.values, Number).map((value) => (value !== 0 ? a : b)),
  };
}

/** Of bytes and as many bytes, or one; or of one byte a row and one row of bytes. */
function bytewise(a: ConstantValue, b: ConstantValue, operation: (x: number, y: number) => number): ConstantValue | undefined {
  const { values: x } = a;
  const { values: y } = b;
  if (!(x instanceof Uint8Array && y instanceof Uint8Array)) return undefined;
  if (a.shape.length === 2 && a.shape[1] === 1 && b.shape[0] === 1 && y.length > 1) {
    const values = Uint8Array.from({ length: x.length * y.length }, (_, i) =>
      operation(x[Math.floor(i / y.length)], y[i % y.length]),
    );
    return { ...a, shape: [x.length, y.length], values };
  }
  if (y.length !== x.length && y.length !== 1) return undefined;
  const step = y.length === 1 ? 0 : 1;
  return { ...a, values: x.map((value, i) => operation(value, y[i * step])) };
}

/** Bytes side by side along an axis. */
function joined(parts: readonly ConstantValue[], axis: number): ConstantValue | undefined {
  const [{ dtype, shape }] = parts;
  if (!(axis >= 0 && axis < shape.length) || parts.some(({ values }) => !(values instanceof Uint8Array))) return undefined;
  const length = parts.reduce((sum, part) => sum + part.shape[axis], 0);
  const inner = elementCount(shape.slice(axis + 1));
  const rows = elementCount(shape.slice(0, axis));
  const values = new Uint8Array(rows * length * inner);
  let first = 0;
  for (const part of parts) {
    const source = part.values as Uint8Array;
    const width = part.shape[axis] * inner;
    for (let row = 0; row < rows; row++)
      values.set(source.subarray(row * width, (row + 1) * width), row * length * inner + first);
    first += width;
  }
  return { dtype, shape: [...shape.slice(0, axis), length, ...shape.slice(axis + 1)], values };
}

/** Entries of the second axis of bytes. */
function picked({ dtype, shape, values }: ConstantValue, places: readonly number[]): ConstantValue | undefined {
  const [rows, count] = shape;
  if (!(values instanceof Uint8Array) || places.some((place) => !(place >= 0 && place < count))) return undefined;
  const inner = elementCount(shape.slice(2));
  const result = new Uint8Array(rows * places.length * inner);
  for (let row = 0, target = 0; row < rows; row++) {
    for (const place of places) {
      const from = (row * count + place) * inner;
      result.set(values.subarray(from, from + inner), target);
      target += inner;
    }
  }
  return { dtype, shape: [rows, places.length, ...shape.slice(2)], values: result };
}

function turned({ dtype, shape: [rows, columns] }: ConstantValue, values: Float32Array): ConstantValue {
  return { dtype, shape: [columns, rows], values: transpose(values, rows, columns) };
}

/** The first columns of bytes. */
function cut({ dtype, shape, values }: ConstantValue, [starts, ends, axes]: readonly ConstantValue[]): ConstantValue | undefined {
  const [start, end, axis] = [starts, ends, axes].map((bound) => Number(bound?.values[0]));
  if (start !== 0 || axis !== 1 || shape.length !== 2 || !(end <= shape[1]) || !(values instanceof Uint8Array)) return undefined;
  const [rows, columns] = shape;
  const kept = new Uint8Array(rows * end);
  for (let row = 0; row < rows; row++) kept.set(values.subarray(row * columns, row * columns + end), row * end);
  return { dtype, shape: [rows, end], values: kept };
}

/** Of two float constants of one rank, whose axes of size 1 stretch. */
function elementwise(a: ConstantValue, b: ConstantValue, operation: (x: number, y: number) => number): ConstantValue | undefined {
  if (!(a.values instanceof Float32Array && b.values instanceof Float32Array)) return undefined;
  const shape = a.shape.map((size, axis) => Math.max(size, b.shape[axis]));
  const values = new Float32Array(elementCount(shape));
  for (let i = 0; i < values.length; i++)
    values[i] = operation(a.values[place(i, shape, a.shape)], b.values[place(i, shape, b.shape)]);
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
