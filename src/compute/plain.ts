/** The Engine in plain loops, in fp64: the few operators of matrix products and divergences, for machines without onnxruntime. */
import type { Node, OnnxModel } from '../../formats/onnx/model.ts';
import { UnsupportedError } from '../errors.ts';
import type { Engine, NdArray, Program } from './engine.ts';

/** A value while it is computed: always in fp64, whatever the graph calls it. */
interface Wide {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

type PlainOperator = (node: Node, inputs: readonly Wide[]) => Wide;

/** One core, no device, nothing to release. */
export class PlainEngine implements Engine {
  readonly name = 'plain';
  readonly device = 'cpu';
  readonly threads = 1;
  readonly runtime = 'plain loops';

  async compile(model: OnnxModel): Promise<Program> {
    const missing = model.graph.nodes.find(({ op }) => !OPERATORS.has(op));
    if (missing) throw new UnsupportedError(`graph "${model.graph.name}": plain loops have no operator ${missing.op}`);
    return programOf(model, await constantsOf(model));
  }

  async open(path: string): Promise<Program> {
    throw new UnsupportedError(`${path}: plain loops run no model files; install onnxruntime-node`);
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}

/** Constants of these graphs are axes, I64 vectors. */
async function constantsOf({ graph }: OnnxModel): Promise<Map<string, Wide>> {
  const constants = new Map<string, Wide>();
  for (const { name, shape, read } of graph.initializers.values()) {
    const bytes = (await read()).slice();
    constants.set(name, { shape, data: Float64Array.from(new BigInt64Array(bytes.buffer), Number) });
  }
  return constants;
}

function programOf({ graph }: OnnxModel, constants: ReadonlyMap<string, Wide>): Program {
  const outputNames = graph.outputs.map(({ name }) => name);
  return {
    inputNames: graph.inputs.map(({ name }) => name),
    outputNames,
    async run(feeds, { outputs = outputNames, into = {} } = {}) {
      const values = new Map(constants);
      for (const { name } of graph.inputs) {
        const feed = feeds[name];
        if (feed === undefined) throw new Error(`graph "${graph.name}": input "${name}" is missing in the feeds`);
        values.set(name, { shape: feed.shape, data: Float64Array.from(feed.data as Float64Array) });
      }
      for (const node of graph.nodes) {
        const inputs = node.inputs.map((name) => values.get(name)!);
        values.set(node.outputs[0], OPERATORS.get(node.op)!(node, inputs));
      }
      const results: Record<string, NdArray> = {};
      for (const name of outputs) {
        const { shape, data } = values.get(name)!;
        const wide = graph.outputs.find((output) => output.name === name)?.dtype === 'F64';
        const made: NdArray = into[name] ?? {
          dtype: wide ? 'F64' : 'F32',
          shape,
          data: new (wide ? Float64Array : Float32Array)(data.length),
        };
        (made.data as Float64Array).set(data);
        results[name] = made;
      }
      return results;
    },
    [Symbol.asyncDispose]: async () => {},
  };
}

function number(node: Node, name: string, otherwise: number): number {
  const attribute = node.attributes[name];
  return attribute?.kind === 'int' || attribute?.kind === 'float' ? Number(attribute.value) : otherwise;
}

function gemm(node: Node, [a, b, c]: readonly Wide[]): Wide {
  const [transA, transB] = [number(node, 'transA', 0) === 1, number(node, 'transB', 0) === 1];
  const [alpha, beta] = [number(node, 'alpha', 1), number(node, 'beta', 1)];
  const [rows, inner] = transA ? [a.shape[1], a.shape[0]] : a.shape;
  const columns = transB ? b.shape[0] : b.shape[1];
  const data = new Float64Array(rows * columns);
  const row = new Float64Array(columns);
  for (let i = 0; i < rows; i++) {
    row.fill(0);
    for (let k = 0; k < inner; k++) {
      const factor = alpha * a.data[transA ? k * rows + i : i * inner + k];
      if (transB) for (let j = 0; j < columns; j++) row[j] += factor * b.data[j * inner + k];
      else for (let j = 0; j < columns; j++) row[j] += factor * b.data[k * columns + j];
    }
    for (let j = 0; j < columns; j++) {
      data[i * columns + j] = row[j] + (c === undefined || beta === 0 ? 0 : beta * c.data[i * columns + j]);
    }
  }
  return { shape: [rows, columns], data };
}

/** Of two values of one shape, or of a value and a scalar. */
const elementwise =
  (compute: (a: number, b: number) => number): PlainOperator =>
  (_, [a, b]) => {
    const step = b.data.length === 1 ? 0 : 1;
    return { shape: a.shape, data: a.data.map((value, i) => compute(value, b.data[i * step])) };
  };

function logSoftmax(_: Node, [x]: readonly Wide[]): Wide {
  const columns = x.shape[x.shape.length - 1];
  const data = new Float64Array(x.data.length);
  for (let start = 0; start < data.length; start += columns) {
    const row = x.data.subarray(start, start + columns);
    const largest = row.reduce((most, value) => Math.max(most, value), Number.NEGATIVE_INFINITY);
    const log = largest + Math.log(row.reduce((sum, value) => sum + Math.exp(value - largest), 0));
    for (let i = 0; i < columns; i++) data[start + i] = row[i] - log;
  }
  return { shape: x.shape, data };
}

/** Over the last axis, as the divergences ask for it. */
function reduceSum(_: Node, [x]: readonly Wide[]): Wide {
  const columns = x.shape[x.shape.length - 1];
  const data = new Float64Array(x.data.length / columns);
  for (let i = 0; i < x.data.length; i++) data[Math.floor(i / columns)] += x.data[i];
  return { shape: x.shape.slice(0, -1), data };
}

const OPERATORS: ReadonlyMap<string, PlainOperator> = new Map<string, PlainOperator>([
  ['Gemm', gemm],
  ['Add', elementwise((a, b) => a + b)],
  ['Sub', elementwise((a, b) => a - b)],
  ['Mul', elementwise((a, b) => a * b)],
  // Everything is in fp64 already.
  ['Cast', (_, [x]) => x],
  ['LogSoftmax', logSoftmax],
  ['Softmax', (node, inputs) => ({ shape: inputs[0].shape, data: logSoftmax(node, inputs).data.map(Math.exp) })],
  ['ReduceSum', reduceSum],
]);
