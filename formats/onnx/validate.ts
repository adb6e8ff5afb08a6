/** Whether a graph is one: every value is defined once, and before it is read. */
import { FormatError } from '../../src/errors.ts';
import type { Graph, Node } from './model.ts';

/** Names defined by fields that are kept encoded (initializers of strings, sparse initializers), by graph. */
export type CarriedNames = ReadonlyMap<Graph, readonly string[]>;

/** A graph being looked at, and the node in it that has been reached. */
interface Frame {
  readonly graph: Graph;
  readonly defined: Set<string>;
  node?: Node;
}

/**
 * Throws FormatError when a value is defined twice in one graph (`value-twice`), read but never defined (`value-undefined`), or
 * read before it is defined (`nodes-not-sorted`, `graph-cycle`). Subgraphs see the values that are defined before their node,
 * and may reuse names of the graphs around them: runtimes allow it, and exporters do it.
 */
export function validateGraph(graph: Graph, path: string, carried: CarriedNames = new Map()): void {
  validateFrame(graph, [], path, carried);
}

function validateFrame(graph: Graph, outer: readonly Frame[], path: string, carried: CarriedNames): void {
  const frame: Frame = { graph, defined: new Set() };
  const frames = [...outer, frame];
  const isDefined = (name: string): boolean => frames.some(({ defined }) => defined.has(name));
  const define = (name: string, by: string): void => {
    if (frame.defined.has(name))
      throw new FormatError(path, 'value-twice', `${by} defines value "${name}", which graph "${graph.name}" defines already`);
    frame.defined.add(name);
  };
  for (const { name } of [...graph.inputs, ...(graph.overridableInputs ?? [])]) {
    if (name === '') throw new FormatError(path, 'input-without-name', `graph "${graph.name}" has an input without a name`);
    define(name, 'an input');
  }
  // An initializer may share its name with an input, whose default it is then.
  for (const name of [...graph.initializers.keys(), ...(carried.get(graph) ?? [])]) frame.defined.add(name);
  for (const node of graph.nodes) {
    frame.node = node;
    for (const input of node.inputs) {
      if (input !== '' && !isDefined(input)) throw undefinedValue(input, frames, path);
    }
    for (const subgraph of subgraphsOf(node)) validateFrame(subgraph, frames, path, carried);
    for (const output of node.outputs) if (output !== '') define(output, describe(node));
  }
  for (const { name } of graph.outputs) {
    if (!isDefined(name))
      throw new FormatError(path, 'output-undefined', `graph "${graph.name}" has output "${name}", which nothing defines`);
  }
}

/** Why the innermost node cannot read `name`. */
function undefinedValue(name: string, frames: readonly Frame[], path: string): FormatError {
  const reader = describe(frames[frames.length - 1].node);
  for (const { graph, node } of frames) {
    const producer = graph.nodes.find(({ outputs }) => outputs.includes(name));
    if (producer === undefined || node === undefined) continue;
    return dependsOn(producer, node, graph)
      ? new FormatError(path, 'graph-cycle', `${reader} reads value "${name}", which depends on that node`)
      : new FormatError(path, 'nodes-not-sorted', `${reader} reads value "${name}", which ${describe(producer)} defines later`);
  }
  return new FormatError(path, 'value-undefined', `${reader} reads value "${name}", which nothing defines`);
}

/** Whether `from` needs, directly or not, what `target` computes. */
function dependsOn(from: Node, target: Node, graph: Graph): boolean {
  const producers = new Map(graph.nodes.flatMap((node) => node.outputs.map((output): [string, Node] => [output, node])));
  const seen = new Set<Node>();
  const pending = [from];
  for (let node = pending.pop(); node !== undefined; node = pending.pop()) {
    if (node === target) return true;
    if (seen.has(node)) continue;
    seen.add(node);
    for (const name of readsOf(node)) {
      const producer = name === '' ? undefined : producers.get(name);
      if (producer !== undefined) pending.push(producer);
    }
  }
  return false;
}

function readsOf(node: Node): readonly string[] {
  return [
    ...node.inputs,
    ...subgraphsOf(node).flatMap((graph) => [...graph.nodes.flatMap(readsOf), ...graph.outputs.map(({ name }) => name)]),
  ];
}

/** The graphs in a node's attributes: the branches of If, the body of Loop and Scan. */
export function subgraphsOf(node: Node): Graph[] {
  return Object.values(node.attributes).flatMap((attribute) => (attribute.kind === 'graph' ? [attribute.value] : []));
}

function describe(node: Node | undefined): string {
  if (node === undefined) return 'a node';
  return node.name === ''
    ? `the ${node.op} node of "${node.outputs.find((output) => output !== '') ?? ''}"`
    : `node "${node.name}"`;
}
