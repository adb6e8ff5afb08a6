/** What a graph should not contain if it is to run fast, or at all, on the runtimes pcomp writes for. */
import { dtypeOf } from './data-types.ts';
import type { Graph, Node, OnnxModel } from './model.ts';
import { subgraphsOf } from './validate.ts';

/** Widths that onnxruntime has kernels for. */
const RUNNABLE_BITS: readonly unknown[] = [2, 4, 8];
/** The operator's own default. */
const DEFAULT_BITS = 4;

/** Inputs of MatMulNBits by position. */
const ZERO_POINTS = 3;
const GROUP_INDEX = 4;

/**
 * One sentence for each complaint about a MatMulNBits node, subgraphs included (bodies of functions are not looked into):
 * no accuracy_level (the default is hundreds of times slower at 2 and 8 bits), a group index, float zero points, widths without
 * a kernel.
 */
export function lintGraph(model: OnnxModel): string[] {
  return lint(model.graph, new Map());
}

type Floatness = ReadonlyMap<string, boolean>;

function lint(graph: Graph, outer: Floatness): string[] {
  const floats = new Map([...outer, ...floatnessOf(graph)]);
  return graph.nodes.flatMap((node) => [
    ...(node.op === 'MatMulNBits' && node.domain === 'com.microsoft' ? lintMatMulNBits(node, floats) : []),
    ...subgraphsOf(node).flatMap((subgraph) => lint(subgraph, floats)),
  ]);
}

function lintMatMulNBits(node: Node, floats: Floatness): string[] {
  const complaints: string[] = [];
  const zeroPoints = node.inputs[ZERO_POINTS] ?? '';
  const groupIndex = node.inputs[GROUP_INDEX] ?? '';
  const bits = node.attributes['bits']?.value ?? DEFAULT_BITS;
  if (node.attributes['accuracy_level'] === undefined)
    complaints.push('has no accuracy_level, and the default runs on the slow path');
  if (groupIndex !== '') complaints.push(`has a group index (g_idx "${groupIndex}"), which runs on the slow path`);
  if (floats.get(zeroPoints) === true) complaints.push(`has float zero points ("${zeroPoints}"), which run on the slow path`);
  if (!RUNNABLE_BITS.includes(bits)) complaints.push(`has ${String(bits)} bits, and runtimes take ${RUNNABLE_BITS.join(', ')}`);
  return complaints.map((complaint) => `MatMulNBits node "${node.name || node.outputs[0]}" ${complaint}`);
}

/** Whether each value whose type is known holds floats. */
function floatnessOf(graph: Graph): Map<string, boolean> {
  const floats = new Map<string, boolean>();
  for (const node of graph.nodes) {
    const to = node.op === 'Cast' ? node.attributes['to']?.value : undefined;
    if (typeof to === 'number') floats.set(node.outputs[0], isFloat(dtypeOf(to) ?? null));
    const constant = node.op === 'Constant' ? node.attributes['value'] : undefined;
    if (constant?.kind === 'tensor') floats.set(node.outputs[0], isFloat(constant.value.dtype));
  }
  for (const { name, dtype } of [...graph.inputs, ...graph.valueInfo, ...graph.initializers.values()]) {
    if (dtype !== null) floats.set(name, isFloat(dtype));
  }
  return floats;
}

function isFloat(dtype: string | null): boolean {
  return dtype !== null && /^(B?F16|F32|F64|F8_)/.test(dtype);
}
