/**
 * Reverse mode: appends the backward pass to the graph it is of (gradients.md). The nodes are the tape; every operator's derivative is nodes
 * again, so any engine runs it, and it can be differentiated once more.
 */
import type { GraphBuilder, Value } from '../builder.ts';
import { GraphError, sameShape } from '../shape.ts';
import { ARITHMETIC } from './arithmetic.ts';
import { LAYOUT } from './layout.ts';
import { NETWORK } from './network.ts';
import { type CustomRules, customRules } from './straight-through.ts';
import { type Vjp, zerosLike } from './vjp.ts';

/** Every operator with a derivative. */
const VJPS: ReadonlyMap<string, Vjp> = new Map(Object.entries({ ...ARITHMETIC, ...LAYOUT, ...NETWORK }));

/**
 * Cotangents of `wrt`: the sum over `outputs` of `<cotangent, output>`, differentiated. Only nodes on a path from `wrt` to `outputs` are gone
 * through; a `wrt` that nothing depends on gets zeros. Throws GraphError for an operator without a derivative on such a path, naming the
 * node, and for cotangents of another shape than their outputs.
 */
export function gradient(
  builder: GraphBuilder,
  outputs: readonly Value[],
  cotangents: readonly Value[],
  wrt: readonly Value[],
): Value[] {
  const nodes = [...builder.nodes];
  const custom: CustomRules = customRules(builder);
  const moving = new Set(wrt.map(({ name }) => name));
  for (const node of nodes) {
    const inputs = custom.get(node.outputs[0])?.inputs ?? node.inputs;
    // A size is the same whatever the values are.
    if (node.op === 'Shape' || !inputs.some((name) => moving.has(name))) continue;
    for (const name of node.outputs) if (name !== '') moving.add(name);
  }
  const contributions = new Map<string, Value>();
  const contribute = (name: string, value: Value): void => {
    const known = contributions.get(name);
    contributions.set(name, known ? builder.add(known, value) : value);
  };
  outputs.forEach((output, i) => {
    const cotangent = cotangents[i];
    if (!sameShape(output.shape, cotangent.shape) || output.dtype !== cotangent.dtype) {
      throw new GraphError(
        `the cotangent of "${output.name}" is ${cotangent.dtype} [${cotangent.shape.join(', ')}], not ${output.dtype} [${output.shape.join(', ')}]`,
      );
    }
    if (moving.has(output.name)) contribute(output.name, cotangent);
  });
  const own = new Set(wrt.map(({ name }) => name));
  for (const node of nodes.reverse()) {
    if (!node.outputs.some((name) => name !== '' && moving.has(name) && contributions.has(name))) continue;
    const rule = custom.get(node.outputs[0]);
    const names = rule?.inputs ?? node.inputs;
    const wanted = names.map((name) => moving.has(name));
    if (!wanted.some(Boolean)) continue;
    const vjp = rule?.vjp ?? VJPS.get(node.op);
    if (vjp === undefined) throw new GraphError(`${node.name}: ${node.op} has no derivative`);
    const value = (name: string) => (name === '' ? undefined : builder.valueNamed(name));
    const results = builder.rootScope(`gradient${node.name.replaceAll('/', '.')}`, () =>
      vjp({
        builder,
        node,
        inputs: names.map(value),
        outputs: node.outputs.map(value),
        cotangents: node.outputs.map((name) => contributions.get(name)),
        wanted,
      }),
    );
    results.forEach((result, i) => {
      if (!wanted[i] || result === undefined) return;
      const input = builder.valueNamed(names[i]);
      if (!sameShape(result.shape, input.shape)) {
        throw new GraphError(
          `${node.name}: the cotangent of "${input.name}" is [${result.shape.join(', ')}], not [${input.shape.join(', ')}]`,
        );
      }
      contribute(names[i], result);
    });
    // What is behind the node is done with; `wrt` may be the output of a node.
    for (const name of node.outputs) if (!own.has(name)) contributions.delete(name);
  }
  return wrt.map((value) => contributions.get(value.name) ?? zerosLike(builder, value));
}
