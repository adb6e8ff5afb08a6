import { describe, expect, it } from 'vitest';
import { inlineInitializer } from '../../../formats/onnx/initializers.ts';
import { lintGraph } from '../../../formats/onnx/lint.ts';
import type { Attribute, Graph, Initializer } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import { graph, model, node, value } from './tiny-models.ts';

const int = (number: number): Attribute => ({ kind: 'int', value: number });
const zeros = (name: string, dtype: DType): Initializer =>
  inlineInitializer(name, dtype, [8], new Uint8Array(dtype === 'U8' ? 8 : 32));
const GOOD = { K: int(32), N: int(8), bits: int(2), block_size: int(32), accuracy_level: int(4) };

function matMul(attributes: Record<string, Attribute>, inputs: readonly string[] = ['x', 'B', 's']): Graph {
  return graph(
    [node('MatMulNBits', inputs, ['y'], attributes, 'com.microsoft')],
    [value('x', [1, 32])],
    [value('y', [1, 8])],
    [zeros('B', 'U8'), zeros('s', 'F32'), zeros('z', 'U8'), zeros('fz', 'F32')],
  );
}

const without = (key: string): Record<string, Attribute> =>
  Object.fromEntries(Object.entries(GOOD).filter(([name]) => name !== key));

describe('graph lint', () => {
  it('has nothing to say of nodes that run fast', () => {
    for (const bits of [2, 4, 8]) expect(lintGraph(model(matMul({ ...GOOD, bits: int(bits) })))).toEqual([]);
    expect(lintGraph(model(matMul(GOOD, ['x', 'B', 's', 'z', '', 'bias'])))).toEqual([]);
    expect(lintGraph(model(matMul(without('bits'))))).toEqual([]);
    expect(
      lintGraph(model(graph([node('MatMulNBits', ['x'], ['y'], {}, 'elsewhere')], [value('x', [])], [value('y', [])]))),
    ).toEqual([]);
  });

  it.each([
    ['no accuracy_level', matMul(without('accuracy_level')), /accuracy_level/],
    ['a group index', matMul(GOOD, ['x', 'B', 's', 'z', 'B']), /g_idx/],
    ['float zero points', matMul(GOOD, ['x', 'B', 's', 'fz']), /float zero points/],
    ['3 bits', matMul({ ...GOOD, bits: int(3) }), /3 bits/],
  ])('complains about %s', (_, main, complaint) => {
    expect(lintGraph(model(main))).toEqual([expect.stringMatching(complaint)]);
    expect(lintGraph(model(main))[0]).toContain('MatMulNBits_y');
  });

  it('sees through a Cast that makes zero points floats, and into subgraphs', () => {
    const inner = matMul(GOOD, ['x', 'B', 's', 'cast']);
    inner.nodes.unshift(node('Cast', ['z'], ['cast'], { to: int(10) }));
    const outer = graph(
      [node('If', ['c'], ['y'], { then_branch: { kind: 'graph', value: inner } })],
      [value('c', [], 'BOOL')],
      [value('y', [])],
    );
    expect(lintGraph(model(outer))).toEqual([expect.stringMatching(/float zero points/)]);
  });
});
