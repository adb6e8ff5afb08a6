/** Low-rank branches beside the linears of an ONNX model that pcomp wrote: as constants, or as inputs that a caller may give (adapters.md 9.4). */
import { fromFloat32 } from '../../../formats/dtype.ts';
import type { Graph, Initializer, Node, OnnxModel } from '../../../formats/onnx/model.ts';
import { FormatError, RecipeError } from '../../errors.ts';
import { int } from '../../graph/attributes.ts';
import { scopePath } from '../../graph/core.ts';
import { type ColumnFold, columnOrders, rowOrders, takeColumns, takeRows } from '../folds.ts';
import type { AdapterModule } from '../peft.ts';
import { asBytes } from '../tensor-bytes.ts';
import { transpose } from '../transpose.ts';
import { isHadamardProduct } from './hadamard-constant.ts';
import { branchConstantNames, branchNames } from './linear-initializers.ts';

/** `constants`: the factors are in the file. `inputs`: they are inputs of any rank, rank 0 adding nothing. */
export type AttachedAs = 'constants' | 'inputs';

/**
 * Adds `(x A^T) B^T` to the output of every layer of the adapter, x being what enters it before anything is done to it. Inputs have no defaults:
 * onnxruntime-node does not pass on feeds for inputs that have one. Throws RecipeError for a layer that has a branch already or another shape,
 * FormatError where the graph has no such quantized layer.
 */
export function attachAdapter(
  path: string,
  model: OnnxModel,
  modules: readonly AdapterModule[],
  as: AttachedAs,
  folds: readonly ColumnFold[] = [],
): OnnxModel {
  const { graph } = model;
  const layers = findLayers(
    path,
    graph,
    modules.map(({ name, rank, loraB }) => ({ name, outFeatures: loraB.length / rank })),
  );
  const initializers = new Map(graph.initializers);
  const inputs = [...graph.inputs];
  const after = new Map<Node, AdapterModule>();
  const columns = columnOrders(folds);
  const rows = rowOrders(folds);
  for (const module of modules) {
    const { name, rank, loraA, loraB } = module;
    const { down, up } = branchNames(name);
    const [inFeatures, outFeatures] = [loraA.length / rank, loraB.length / rank];
    if (branchConstantNames(name).some((constant) => initializers.has(constant)) || inputs.some((input) => input.name === down))
      throw new RecipeError(`${path}: "${name}" has a branch of its own ("${down}"), and takes no other`);
    after.set(layers.get(name)!.last, module);
    const orders = [columns.get(name), rows.get(name)] as const;
    if (as === 'constants') for (const constant of factorsOf(folded(module, orders))) initializers.set(constant.name, constant);
    else {
      for (const [i, order] of orders.entries()) if (order) initializers.set(...orderConstant([down, up][i], order));
      inputs.push({ name: down, dtype: 'F32', shape: [inFeatures, `rank_${name}`] });
      inputs.push({ name: up, dtype: 'F32', shape: [`rank_${name}`, outFeatures] });
    }
  }
  const nodes = graph.nodes.flatMap((node) => {
    const module = after.get(node);
    return module ? withBranch(node, module, layers.get(module.name)!.input, initializers) : [node];
  });
  return {
    ...model,
    graph: { ...graph, nodes, initializers, inputs },
    metadata: as === 'constants' ? withRanks(model.metadata, modules) : model.metadata,
  };
}

/** Where a layer is in a graph: the node whose output is its own, and the name of what enters it before anything is done to that. */
interface LayerPlace {
  readonly last: Node;
  readonly input: string;
}

/** The places of layers. Throws FormatError for one that the graph has not as a quantized layer, RecipeError for other outputs. */
export function findLayers(
  path: string,
  graph: Graph,
  layers: readonly { readonly name: string; readonly outFeatures: number }[],
): Map<string, LayerPlace> {
  const producers = new Map(graph.nodes.flatMap((node) => node.outputs.map((output) => [output, node] as const)));
  const scopes = new Set(graph.nodes.filter(({ op }) => op === 'MatMulNBits').map(({ name }) => scopeOf(name)));
  return new Map(
    layers.map(({ name, outFeatures }) => {
      const last = lastOf(path, graph, name, outFeatures);
      return [name, { last, input: inputOf(last, scopes, producers) }];
    }),
  );
}

/** The node whose output is the layer's. */
function lastOf(path: string, { nodes }: Graph, name: string, outFeatures: number): Node {
  const own = nodes.filter((node) => scopeOf(node.name) === `/${scopePath(name)}`);
  const product = own.find(({ op }) => op === 'MatMulNBits');
  if (!product) throw new FormatError(path, 'onnx-linear-missing', `its graph has no quantized layer "${name}"`);
  const size = product.attributes['N'];
  const found = size?.kind === 'int' ? Number(size.value) : 0;
  if (found !== outFeatures) throw new RecipeError(`${path}: "${name}" has ${found} outputs, and in the adapter ${outFeatures}`);
  return own[own.length - 1];
}

/** What enters a layer: back over what is done to it in its own scope, or in that of a layer that reads the same. */
function inputOf(last: Node, scopes: ReadonlySet<string>, producers: ReadonlyMap<string, Node>): string {
  // The sum of products, down to the first of them.
  let node = last;
  while (node.op === 'Add') node = producers.get(node.inputs[0])!;
  let [value] = node.inputs;
  for (;;) {
    const before = producers.get(value);
    if (!before || !TRANSFORMS.includes(before.op) || !scopes.has(scopeOf(before.name))) return value;
    const [first, second] = before.inputs;
    value = isHadamardProduct(first) ? second : first;
  }
}

/** Sorting, turning of signs, rotating, splitting and padding of columns. */
const TRANSFORMS: readonly string[] = ['Gather', 'Transpose', 'Mul', 'Reshape', 'MatMul', 'Split', 'Concat', 'Pad'];

/** `/model/layers.0/mlp/up_proj` of `/model/layers.0/mlp/up_proj/MatMulNBits`. */
function scopeOf(node: string): string {
  return node.slice(0, Math.max(0, node.lastIndexOf('/')));
}

/** The node with its output renamed, and the branch, whose sum with it has the name that the node's output had. */
function withBranch(node: Node, { name }: AdapterModule, input: string, constants: ReadonlyMap<string, unknown>): Node[] {
  const scope = `/${scopePath(name)}/adapter`;
  const { down, up } = branchNames(name);
  const [output] = node.outputs;
  const made = (
    op: string,
    part: string,
    inputs: readonly string[],
    result = `${scope}/${part}/output_0`,
    attributes: Node['attributes'] = {},
  ): Node => ({
    name: `${scope}/${part}`,
    op,
    domain: '',
    inputs,
    outputs: [result],
    attributes,
  });
  // A caller's factors have the columns and rows of the original, the layer has them in the order of a fold.
  const gathers: Node[] = [];
  const ordered = (factor: string, part: string, axis: number): string => {
    const order = orderName(factor);
    if (!constants.has(order)) return factor;
    gathers.push(made('Gather', part, [factor, order], undefined, { axis: int(axis) }));
    return `${scope}/${part}/output_0`;
  };
  const [a, b] = [ordered(down, 'Gather', 0), ordered(up, 'Gather_1', 1)];
  const base = `${scope}/base/output_0`;
  return [
    { ...node, outputs: [base, ...node.outputs.slice(1)] },
    ...gathers,
    made('MatMul', 'MatMul', [input, a]),
    made('MatMul', 'MatMul_1', [`${scope}/MatMul/output_0`, b]),
    made('Add', 'Add', [base, `${scope}/MatMul_1/output_0`], output),
  ];
}

/** The factors of a layer that has its columns and rows in the order of a fold. */
function folded(
  module: AdapterModule,
  [columns, rows]: readonly [Uint32Array | undefined, Uint32Array | undefined],
): AdapterModule {
  const { rank, loraA, loraB } = module;
  return {
    ...module,
    ...(columns && { loraA: takeColumns(loraA, columns, columns.length) }),
    ...(rows && { loraB: takeRows(loraB, rows, rank) }),
  };
}

function orderName(factor: string): string {
  return `${factor}.order`;
}

function orderConstant(factor: string, order: Uint32Array): [string, Initializer] {
  const data = asBytes(Int32Array.from(order));
  const read = async (start = 0, end = data.byteLength) => data.subarray(start, end);
  const name = orderName(factor);
  return [name, { name, dtype: 'I32', shape: [order.length], byteLength: data.byteLength, read }];
}

/** The factors as constants. */
function factorsOf(module: AdapterModule): Initializer[] {
  return feedsOf([module]).map(({ name, shape, data }) => {
    const bytes = fromFloat32('F32', data);
    return { name, dtype: 'F32', shape, byteLength: bytes.byteLength, read: async (start, end) => bytes.subarray(start, end) };
  });
}

/** The metadata, saying of each module what rank its branch has. */
function withRanks(metadata: ReadonlyMap<string, string>, modules: readonly AdapterModule[]): Map<string, string> {
  const quant = JSON.parse(metadata.get('pcomp.quant')!) as { modules: Record<string, { rank?: number }> };
  for (const { name, rank } of modules) quant.modules[name].rank = rank;
  return new Map(metadata).set('pcomp.quant', JSON.stringify(quant));
}

/** What an artifact with adapter inputs is fed for an adapter: a factor, by the input's name. */
export interface AdapterFeed {
  readonly name: string;
  readonly shape: readonly [number, number];
  readonly data: Float32Array;
}

/** A^T (inFeatures, rank) and B^T (rank, outFeatures) of every layer. */
export function feedsOf(modules: readonly AdapterModule[]): AdapterFeed[] {
  return modules.flatMap(({ name, rank, loraA, loraB }) => {
    const [inFeatures, outFeatures] = [loraA.length / rank, loraB.length / rank];
    const { down, up } = branchNames(name);
    return [
      { name: down, shape: [inFeatures, rank], data: transpose(loraA, rank, inFeatures) },
      { name: up, shape: [rank, outFeatures], data: transpose(loraB, outFeatures, rank) },
    ];
  });
}
