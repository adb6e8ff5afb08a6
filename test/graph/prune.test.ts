import { expect, it } from 'vitest';
import { GraphBuilder } from '../../src/graph/builder.ts';
import { pruneModel } from '../../src/graph/prune.ts';

function twoOutputs() {
  const builder = new GraphBuilder('two');
  const [x, w, v] = ['x', 'w', 'v'].map((name) => builder.input(name, 'F32', [2, 2]));
  const product = builder.matmul(x, w);
  builder.output('first', product);
  builder.output('second', builder.matmul(product, v));
  return builder.build();
}

it('keeps what an output depends on and nothing else', () => {
  const model = twoOutputs();
  const { graph } = pruneModel(model, ['first']);
  expect(graph.outputs.map(({ name }) => name)).toEqual(['first']);
  expect(graph.inputs.map(({ name }) => name)).toEqual(['x', 'w']);
  expect(graph.nodes.length).toBeLessThan(model.graph.nodes.length);
  expect(pruneModel(model, ['first', 'second']).graph.nodes).toEqual(model.graph.nodes);
});

it('says which output a graph does not have', () => {
  expect(() => pruneModel(twoOutputs(), ['third'])).toThrow('graph "two" has no output "third"');
});
