import { describe, expect, test } from 'vitest';
import { float, int } from '../../src/graph/attributes.ts';
import { GraphBuilder, GraphError } from '../../src/graph/builder.ts';
import { f32, i64, openGraph } from '../support/run-graph.ts';

const shapes = (build: (builder: GraphBuilder) => void): GraphBuilder => {
  const builder = new GraphBuilder();
  build(builder);
  return builder;
};

describe('names', () => {
  test('follow the scopes, with the dots of module names as slashes and layer numbers kept', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', [2]);
    builder.scope('model.layers.0', () => builder.scope('mlp.down_proj', () => builder.add(x, x)));
    builder.add(x, x);
    expect(builder.build().graph.nodes.map((node) => node.name)).toEqual(['/model/layers.0/mlp/down_proj/Add', '/Add']);
  });

  test('stay unique when one scope makes the same node twice', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', [2]);
    builder.add(builder.add(x, x), x);
    const { nodes } = builder.build().graph;
    expect(nodes.map((node) => node.name)).toEqual(['/Add', '/Add_1']);
    expect(new Set(nodes.flatMap((node) => node.outputs)).size).toBe(2);
  });

  test('of shared values come from the root, whatever scope asks', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', [2]);
    const inner = builder.scope('a', () => {
      builder.rootScope('shared', () => builder.add(x, x));
      return builder.mul(x, x);
    });
    expect(builder.build().graph.nodes.map((node) => node.name)).toEqual(['/shared/Add', '/a/Mul']);
    expect(inner.name).toBe('/a/Mul/output_0');
  });

  test('of inputs, initializers and outputs are taken once', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', [2]);
    builder.output('y', builder.neg(x));
    expect(() => builder.input('x', 'F32', [2])).toThrow('"x" is defined twice');
    expect(() => builder.output('y', x)).toThrow('output "y": the name is taken');
  });
});

describe('constants', () => {
  test('of equal dtype, shape and values are stored once', () => {
    const builder = new GraphBuilder();
    const a = builder.vector([1, -1]);
    expect(builder.vector([1, -1])).toBe(a);
    expect(builder.constant('I32', [1, -1], [2])).not.toBe(a);
    expect(builder.constant('I64', [1, -1], [2, 1])).not.toBe(a);
    expect(builder.build().graph.initializers.size).toBe(3);
  });

  test('hold their values little-endian', async () => {
    const builder = new GraphBuilder();
    builder.vector([1, -1]);
    builder.scalar('F32', 0.5);
    const [vector, scalar] = [...builder.build().graph.initializers.values()];
    expect([...(await vector.read())]).toEqual([1, 0, 0, 0, 0, 0, 0, 0, ...new Array(8).fill(255)]);
    expect([...(await vector.read(8, 10))]).toEqual([255, 255]);
    expect([...(await scalar.read())]).toEqual([0, 0, 0, 63]);
    expect(scalar.shape).toEqual([]);
  });

  test('an initializer asked for twice is the same value, unless it changed', () => {
    const builder = new GraphBuilder();
    const weight = { name: 'w', dtype: 'F32' as const, shape: [2], byteLength: 8, read: async () => new Uint8Array(8) };
    expect(builder.initializer(weight)).toBe(builder.initializer({ ...weight }));
    expect(() => builder.initializer({ ...weight, shape: [1, 2] })).toThrow('initializer "w" is F32 [2], not F32 [1, 2]');
  });
});

describe('the built model', () => {
  test('has IR 10, opset 21 and the operators of onnxruntime', () => {
    const model = new GraphBuilder().build();
    expect(model.irVersion).toBe(10);
    expect([...model.opsets]).toEqual([
      ['', 21],
      ['com.microsoft', 1],
    ]);
  });

  test('lets an output take over its value, also where others read it, and copies what must keep its name', async () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', ['n']);
    const y = builder.neg(x);
    builder.output('negative', y);
    builder.output('twice', builder.add(y, y));
    builder.output('again', y);
    builder.output('same', x);
    const model = builder.build();
    expect(model.graph.nodes.map((node) => node.op)).toEqual(['Neg', 'Add', 'Identity', 'Identity']);
    const graph = await openGraph(model);
    const results = await graph.run({ x: f32([2], [1, 2]) });
    await graph.release();
    const values = Object.fromEntries(Object.entries(results).map(([name, { data }]) => [name, Array.from(data, Number)]));
    expect(values).toEqual({ negative: [-1, -2], twice: [-2, -4], again: [-1, -2], same: [1, 2] });
  });

  test('leaves absent places of inputs and outputs empty, and drops them at the end', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', ['b', 4]);
    const scale = builder.constant('F32', [1, 1, 1, 1], [4]);
    builder.skipSimplifiedLayerNorm(x, x, scale, 1e-5);
    builder.gemm(x, builder.constant('F32', new Float32Array(8), [4, 2]));
    const [norm, gemm] = builder.build().graph.nodes;
    expect(norm.outputs.map((name) => name === '')).toEqual([false, true, true, false]);
    expect(gemm.inputs.length).toBe(2);
  });

  test('takes any operator of any domain through node()', () => {
    const builder = new GraphBuilder();
    const x = builder.input('x', 'F32', ['b', 4]);
    const [y] = builder.node('QuickGelu', [x], {
      domain: 'com.microsoft',
      attributes: { alpha: float(1.702) },
      outputs: [{ dtype: 'F32', shape: ['b', 4] }],
    });
    expect(y.shape).toEqual(['b', 4]);
    expect(builder.build().graph.nodes[0]).toMatchObject({ op: 'QuickGelu', domain: 'com.microsoft', inputs: ['x'] });
  });
});

describe('shapes', () => {
  test('follow the operators, symbols included', () => {
    const b = new GraphBuilder();
    const x = b.input('x', 'F32', ['batch', 'sequence', 12]);
    const past = b.input('past', 'F32', ['batch', 'past', 12]);
    const ids = b.input('ids', 'I64', ['batch', 'sequence']);
    expect(b.reshape(x, ['batch', 'sequence', 3, 4]).shape).toEqual(['batch', 'sequence', 3, 4]);
    expect(b.reshape(x, ['tokens', 12]).shape).toEqual(['tokens', 12]);
    expect(b.transpose(x, [1, 2, 0]).shape).toEqual(['sequence', 12, 'batch']);
    expect(b.concat([past, x], 1).shape).toEqual(['batch', 'past+sequence', 12]);
    expect(b.split(x, [8, 4], -1).map((part) => part.shape[2])).toEqual([8, 4]);
    expect(b.gather(b.constant('F32', new Float32Array(10), [5, 2]), ids).shape).toEqual(['batch', 'sequence', 2]);
    expect(b.gather(x, b.vector([0, 2]), 2).shape).toEqual(['batch', 'sequence', 2]);
    expect(b.unsqueeze(x, [0, 2]).shape).toEqual([1, 'batch', 1, 'sequence', 12]);
    expect(b.squeeze(b.reduceSum(x, [1]), [1]).shape).toEqual(['batch', 12]);
    expect(b.reduceMean(x, [-1], false).shape).toEqual(['batch', 'sequence']);
    expect(b.matmul(x, b.constant('F32', new Float32Array(36), [12, 3])).shape).toEqual(['batch', 'sequence', 3]);
    expect(b.add(x, b.scalar('F32', 1)).shape).toEqual(['batch', 'sequence', 12]);
    expect(b.less(x, x).dtype).toBe('BOOL');
    expect(b.cast(x, 'F16')).toMatchObject({ dtype: 'F16', shape: x.shape });
    expect(b.shapeOf(x, 0, 2).shape).toEqual([2]);
    expect(b.range(b.dimOf(x, 1), 'sequence').shape).toEqual(['sequence']);
    expect(b.softmax(x).shape).toEqual(x.shape);
  });

  test('that onnxruntime computes are the ones that were inferred', async () => {
    const b = new GraphBuilder();
    const x = b.input('x', 'F32', ['n', 6]);
    const at = b.input('at', 'I64', ['k']);
    const inferred = {
      reshape: b.reshape(x, ['n', 2, 3]),
      unsqueeze: b.unsqueeze(x, [1]),
      concat: b.concat([x, x], -1),
      split: b.split(x, [2, 4], 1)[1],
      gather: b.gather(x, at, 1),
      transpose: b.transpose(x, [1, 0]),
      slice: b.slice(x, b.vector([1]), b.vector([5]), 1, 4),
      expand: b.expand(b.reduceSum(x, [1]), b.shapeOf(x), x.shape),
      reshapeTo: b.reshapeTo(x, b.concat([b.shapeOf(x, 1, 2), b.shapeOf(x, 0, 1)], 0), [6, 'n']),
      gemm: b.gemm(x, x, null, { transposeA: true, alpha: 2 }),
      outer: b.gemm(x, x, b.scalar('F32', 1), { transposeB: true }),
      cumSum: b.cumSum(x, 1),
      where: b.where(b.lessOrEqual(x, b.scalar('F32', 0)), b.div(x, b.scalar('F32', 2)), b.tanh(b.relu(x))),
      gelu: b.gelu(b.sub(x, b.scalar('F32', 1)), 'tanh'),
      silu: b.silu(b.max(x, b.scalar('F32', 0))),
    };
    for (const [name, value] of Object.entries(inferred)) b.output(name, value);
    const graph = await openGraph(b.build());
    const results = await graph.run({
      x: f32(
        [3, 6],
        Array.from({ length: 18 }, (_, i) => i - 9),
      ),
      at: i64([2], [5, 0]),
    });
    await graph.release();
    const sizes: Record<string, number> = { n: 3, k: 2 };
    for (const [name, value] of Object.entries(inferred)) {
      const expected = value.shape.map((dim) => (typeof dim === 'number' ? dim : sizes[dim]));
      expect([name, results[name].shape]).toEqual([name, expected]);
    }
  });
});

describe('a misfit is refused when the node is made, naming operator, shapes and dtypes', () => {
  const x = (b: GraphBuilder) => b.input('x', 'F32', ['batch', 4]);
  const y = (b: GraphBuilder) => b.input('y', 'F32', ['batch', 3]);
  const n = (b: GraphBuilder) => b.input('n', 'I64', ['batch', 4]);
  test.each<[string, (b: GraphBuilder) => void, string]>([
    ['Add of two widths', (b) => b.add(x(b), y(b)), 'Add: F32 [batch, 4] "x" does not fit F32 [batch, 3] "y"'],
    ['Add of two dtypes', (b) => b.add(x(b), n(b)), 'Add: F32 [batch, 4] "x" does not fit I64 [batch, 4] "n"'],
    [
      'two symbols',
      (b) => b.mul(x(b), b.input('z', 'F32', ['rows', 4])),
      'Mul: F32 [batch, 4] "x" does not fit F32 [rows, 4] "z"',
    ],
    ['MatMul', (b) => b.matmul(x(b), y(b)), 'MatMul: F32 [batch, 4] "x" does not multiply F32 [batch, 3] "y"'],
    ['Gemm of a vector', (b) => b.gemm(b.scalar('F32', 1), y(b)), 'is not a matrix'],
    ['Reshape', (b) => b.reshape(b.vector([1, 2, 3]), [2, 2]), 'Reshape: [3] has 3 elements, [2, 2] has 4'],
    ['two open dimensions', (b) => b.reshape(x(b), ['a', 'b']), 'leaves 2 dimensions open'],
    ['Transpose', (b) => b.transpose(x(b), [0, 0]), 'Transpose: [0,0] is no permutation of the axes of [batch, 4]'],
    ['Split', (b) => b.split(x(b), [2, 3], 1), 'Split: parts of 2 + 3 = 5, but axis 1 of [batch, 4]'],
    ['Concat', (b) => b.concat([x(b), n(b)], 0), 'Concat: I64 [batch, 4] "n" does not join F32 [batch, 4] "x" along axis 0'],
    ['Gather by floats', (b) => b.gather(x(b), y(b)), 'Gather: indices are F32, not I64 or I32'],
    ['an axis', (b) => b.softmax(x(b), 2), 'Softmax: axis 2 is outside a tensor of rank 2'],
    ['Squeeze', (b) => b.squeeze(x(b), [1]), 'Squeeze: axes 1 of [batch, 4] are not all 1'],
    [
      'Where',
      (b) => b.where(x(b), b.scalar('F32', 0), b.scalar('F32', 1)),
      'Where: the condition is F32 [batch, 4] "x", not BOOL',
    ],
    ['a norm', (b) => b.simplifiedLayerNorm(x(b), b.constant('F32', [1], [1]), 1e-5), 'does not scale the last axis'],
    ['an assumed shape', (b) => b.assume(x(b), ['rows', 5]), '"x" is [batch, 4], it cannot be [rows, 5]'],
    ['Expand', (b) => b.expand(x(b), b.vector([2, 5]), [2, 5]), 'Expand: [batch, 4] does not stretch to [2, 5]'],
    ['a stranger', (b) => b.neg({ name: 'stranger', dtype: 'F32', shape: [] }), 'Neg: "stranger" is not a value of this graph'],
    [
      'heads of 12',
      (b) => {
        const q = b.input('q', 'F32', ['b', 's', 24]);
        const last = b.input('last', 'I32', ['b']);
        const totalLength = b.scalar('I32', 1);
        b.groupQueryAttention(q, q, q, { headCount: 2, kvHeadCount: 2, lastIndex: last, totalLength, totalName: 't' });
      },
      'GroupQueryAttention: head size 12 is not a multiple of 8',
    ],
  ])('%s', (_, build, message) => {
    expect(() => shapes(build)).toThrow(GraphError);
    expect(() => shapes(build)).toThrow(message);
  });

  test('an attribute keeps its kind', () => {
    expect([int(2), float(2)].map((attribute) => attribute.kind)).toEqual(['int', 'float']);
  });
});
