/** Small models as plain data. */
import { inlineInitializer } from '../../../formats/onnx/initializers.ts';
import type { Attribute, Dim, Graph, Initializer, Node, OnnxModel, ValueInfo } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';

export const node = (
  op: string,
  inputs: readonly string[],
  outputs: readonly string[],
  attributes: Record<string, Attribute> = {},
  domain = '',
): Node => ({
  name: `${op}_${outputs[0]}`,
  op,
  domain,
  inputs,
  outputs,
  attributes,
});

export const value = (name: string, shape: readonly Dim[] | null, dtype: DType = 'F32'): ValueInfo => ({ name, dtype, shape });

export const floats = (name: string, shape: readonly number[], values: ArrayLike<number>): Initializer =>
  inlineInitializer(name, 'F32', shape, new Uint8Array(Float32Array.from(values).buffer));

export function graph(
  nodes: Node[],
  inputs: ValueInfo[],
  outputs: ValueInfo[],
  initializers: readonly Initializer[] = [],
  name = 'g',
): Graph {
  return { name, nodes, inputs, outputs, valueInfo: [], initializers: new Map(initializers.map((each) => [each.name, each])) };
}

export function model(main: Graph, opset = 21, irVersion = 10): OnnxModel {
  return {
    irVersion,
    opsets: new Map([
      ['', opset],
      ['com.microsoft', 1],
    ]),
    producerName: 'pcomp',
    producerVersion: '0',
    graph: main,
    metadata: new Map(),
  };
}
