/** Routed experts beside the linears of an ONNX model that pcomp wrote, as constants of the file (adapters.md 9.4). */
import { fromFloat32 } from '../../../formats/dtype.ts';
import type { Initializer, Node, OnnxModel } from '../../../formats/onnx/model.ts';
import { RecipeError } from '../../errors.ts';
import { GraphBuilder, type Value } from '../../graph/builder.ts';
import { scopePath } from '../../graph/core.ts';
import { ROUTED_TENSORS, type RoutedShape, routedBranch, routedSizes } from '../../graph/routed-branch.ts';
import { type ColumnFold, columnOrders, rowOrders } from '../folds.ts';
import type { RoutedModule } from '../routed-adapter.ts';
import { EXPERTS_METADATA } from '../source-weights.ts';
import { findLayers } from './attach-adapter.ts';

/**
 * Adds to every layer's output what its experts make of what enters it. Their tensors stay in the order of the original: where the layer's columns or rows lie
 * in that of a fold, the activations are put in order. Throws as `attachAdapter`.
 */
export function attachRouted(
  path: string,
  model: OnnxModel,
  modules: readonly RoutedModule[],
  folds: readonly ColumnFold[] = [],
): OnnxModel {
  const { graph } = model;
  const layers = findLayers(path, graph, modules);
  const initializers = new Map(graph.initializers);
  const taken = modules.find(({ name }) => initializers.has(`${name}.${ROUTED_TENSORS[0]}`));
  if (taken) throw new RecipeError(`${path}: "${taken.name}" has experts of its own, and takes no others`);
  const branches = new Map<Node, Node[]>();
  const orders = { columns: columnOrders(folds), rows: rowOrders(folds) };
  for (const module of modules) {
    const { last, input } = layers.get(module.name)!;
    const { nodes, constants } = branchOf(module, last, input, {
      columns: orders.columns.get(module.name),
      rows: orders.rows.get(module.name),
    });
    branches.set(last, nodes);
    for (const constant of constants) initializers.set(constant.name, constant);
  }
  const shapes: Record<string, RoutedShape> = Object.fromEntries(modules.map(({ name, routed }) => [name, routed]));
  return {
    ...model,
    graph: { ...graph, nodes: graph.nodes.flatMap((node) => branches.get(node) ?? [node]), initializers },
    metadata: new Map(model.metadata).set(EXPERTS_METADATA, JSON.stringify(shapes)),
  };
}

/** The layer's last node with its output renamed, and the experts, whose sum with it has the name that the output had. */
function branchOf(
  module: RoutedModule,
  last: Node,
  input: string,
  { columns, rows }: { readonly columns: Uint32Array | undefined; readonly rows: Uint32Array | undefined },
): { readonly nodes: Node[]; readonly constants: Initializer[] } {
  const { name, routed, inFeatures, outFeatures } = module;
  const scope = `/${scopePath(name)}/experts`;
  const builder = new GraphBuilder('experts');
  const x = builder.input('x', 'F32', ['batch', 'sequence', inFeatures]);
  const y = builder.input('y', 'F32', ['batch', 'sequence', outFeatures]);
  const sizes = routedSizes(routed, module);
  const [router, expertsA, expertsB] = ROUTED_TENSORS.map((key) => {
    const bytes = fromFloat32('F32', module[key]);
    const read = async (start = 0, end = bytes.byteLength) => bytes.subarray(start, end);
    return builder.initializer({ name: `${name}.${key}`, dtype: 'F32', shape: sizes[key], byteLength: bytes.byteLength, read });
  });
  const ordered = (value: Value, order: Uint32Array | undefined): Value =>
    order ? builder.gather(value, builder.constant('I32', order, [order.length]), 2) : value;
  const sum = builder.rootScope(`${name}.experts`, () => {
    const natural = ordered(x, columns && inverse(columns));
    const { output } = routedBranch(builder, natural, routed, { router, expertsA, expertsB });
    return builder.add(y, ordered(output, rows));
  });
  builder.output('sum', sum);
  const { graph } = builder.build();
  const [output] = last.outputs;
  const base = `${scope}/base/output_0`;
  // Small constants of the branch are its own: another branch, or the graph, may have others by the same name.
  const named = (value: string): string =>
    ({ x: input, y: base, sum: output })[value] ?? (value.startsWith('/constants/') ? scope + value : value);
  const nodes = graph.nodes.map((node) => ({ ...node, inputs: node.inputs.map(named), outputs: node.outputs.map(named) }));
  const constants = [...graph.initializers.values()].map((constant) => ({ ...constant, name: named(constant.name) }));
  return { nodes: [{ ...last, outputs: [base, ...last.outputs.slice(1)] }, ...nodes], constants };
}

/** Where each place of an order stands in it. */
function inverse(order: Uint32Array): Uint32Array {
  const places = new Uint32Array(order.length);
  for (const [at, from] of order.entries()) places[from] = at;
  return places;
}
