/** The part of a graph that some of its outputs need: a runtime computes every node it is given, asked for or not. */
import type { Graph, Node, OnnxModel } from '../../formats/onnx/model.ts';

/**
 * The same model with the named outputs only, and without nodes, inputs and constants that none of them depends on.
 * @param given other outputs of the graph, which are fed instead of computed
 */
export function pruneModel(model: OnnxModel, outputs: readonly string[], given: readonly string[] = []): OnnxModel {
  return { ...model, graph: pruneGraph(model.graph, new Set(outputs), new Set(given)) };
}

function pruneGraph(graph: Graph, outputs: ReadonlySet<string>, given: ReadonlySet<string>): Graph {
  const kept = graph.outputs.filter(({ name }) => outputs.has(name));
  if (kept.length !== outputs.size) {
    const missing = [...outputs].find((name) => !kept.some((output) => output.name === name));
    throw new Error(`graph "${graph.name}" has no output "${missing}"`);
  }
  const fed = [...outputs].find((name) => given.has(name));
  if (fed !== undefined) throw new Error(`graph "${graph.name}": "${fed}" is given, it cannot be asked for`);
  const needed = new Set<string>(outputs);
  const nodes: Node[] = [];
  // Nodes are in topological order, so one pass from the back sees every use before the node that makes it.
  for (const node of graph.nodes.toReversed()) {
    if (!node.outputs.some((output) => output !== '' && needed.has(output) && !given.has(output))) continue;
    nodes.push(node);
    for (const name of [...node.inputs, ...outerNames(node)]) if (name !== '') needed.add(name);
  }
  return {
    ...graph,
    nodes: nodes.reverse(),
    outputs: kept,
    inputs: [...graph.inputs, ...graph.outputs.filter(({ name }) => given.has(name))].filter(({ name }) => needed.has(name)),
    initializers: new Map([...graph.initializers].filter(([name]) => needed.has(name))),
  };
}

/** Values that the bodies of a node (If, Loop) read from around it; names of their own do no harm. */
function outerNames(node: Node): string[] {
  return Object.values(node.attributes).flatMap((attribute) =>
    attribute.kind === 'graph' ? attribute.value.nodes.flatMap((inner) => [...inner.inputs, ...outerNames(inner)]) : [],
  );
}
