import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { inlineInitializer } from '../../../formats/onnx/initializers.ts';
import type { Graph, OnnxModel } from '../../../formats/onnx/model.ts';
import { decodeLinear, storedLinears } from '../../../src/artifacts/onnx/linear-decode.ts';
import { type AccuracyLevel, LinearRenderer } from '../../../src/artifacts/onnx/linear-graph.ts';
import { QuantizedInitializers } from '../../../src/artifacts/onnx/linear-initializers.ts';
import { layOutLinear, ONNX_CONTAINERS, type OnnxStorageOptions } from '../../../src/artifacts/onnx/linear-layout.ts';
import type { QuantizedSource } from '../../../src/artifacts/quantized-source.ts';
import { asBytes } from '../../../src/artifacts/tensor-bytes.ts';
import { FormatError, RecipeError } from '../../../src/errors.ts';
import { GraphBuilder } from '../../../src/graph/builder.ts';
import { dequantize, type QuantizedLinear } from '../../../src/methods/quantize/quantized-linear.ts';
import { f32, openGraph } from '../../support/run-graph.ts';
import { randomLinear, uniform } from '../random-linear.ts';

function sourceOf(linears: Readonly<Record<string, QuantizedLinear>>): QuantizedSource {
  return { has: (name) => name in linears, readGrid: async (name) => linears[name], read: async (name) => linears[name] };
}

/** A graph that applies every linear to one input. */
async function graphOf(
  linears: Readonly<Record<string, QuantizedLinear>>,
  level: AccuracyLevel,
  bias?: Float32Array,
  storage: OnnxStorageOptions = {},
): Promise<OnnxModel> {
  const initializers = await QuantizedInitializers.create(sourceOf(linears), Object.keys(linears), storage);
  const builder = new GraphBuilder();
  const [first] = Object.values(linears);
  const x = builder.input('x', 'F32', ['batch_size', 'sequence_length', first.inFeatures]);
  const renderer = new LinearRenderer(builder, level);
  for (const [name, layout] of initializers.layouts) {
    const biasValue = bias ? builder.initializer(inlineInitializer(`${name}.bias`, 'F32', [bias.length], asBytes(bias))) : null;
    builder.output(`y.${name}`, renderer.render(name, layout, initializers.of(name), x, biasValue));
  }
  return builder.build();
}

/** x W^T + b in float64. */
function multiply(x: Float32Array, weight: Float32Array, q: QuantizedLinear, bias?: Float32Array): Float64Array {
  const { inFeatures: k, outFeatures: n } = q;
  const rows = x.length / k;
  const y = new Float64Array(rows * n);
  for (let r = 0; r < rows; r++) {
    for (let o = 0; o < n; o++) {
      let sum = bias ? bias[o] : 0;
      for (let j = 0; j < k; j++) sum += x[r * k + j] * weight[o * k + j];
      y[r * n + o] = sum;
    }
  }
  return y;
}

function relativeError(actual: ArrayLike<number>, expected: Float64Array): number {
  let error = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    error += (actual[i] - expected[i]) ** 2;
    norm += expected[i] ** 2;
  }
  return Math.sqrt(error / norm);
}

function inputs(columns: number): Float32Array {
  const random = uniform(5);
  return Float32Array.from({ length: 2 * 3 * columns }, () => random() * 2 - 1);
}

const CASES: readonly (readonly [string, Parameters<typeof randomLinear>[0]])[] = [
  ['uniform 2 bits', { rows: 24, columns: 256, groupSize: 64, bits: [2] }],
  ['uniform 3 bits', { rows: 24, columns: 256, groupSize: 64, bits: [3] }],
  ['uniform 4 bits, groups of 128', { rows: 24, columns: 256, groupSize: 128, bits: [4] }],
  ['uniform 8 bits, groups of 32', { rows: 24, columns: 96, groupSize: 32, bits: [8] }],
  ['uniform 1 bit', { rows: 24, columns: 128, groupSize: 32, bits: [1] }],
  ['1 to 4 bits', { rows: 17, columns: 256, groupSize: 32, bits: [1, 2, 3, 4] }],
  ['1 to 8 bits', { rows: 17, columns: 256, groupSize: 32, bits: [1, 2, 3, 4, 5, 6, 7, 8] }],
  ['widths that lie in order already', { rows: 17, columns: 128, groupSize: 32, bits: [4, 3, 2, 2] }],
  ['a ragged uniform layer', { rows: 9, columns: 172, groupSize: 32, bits: [2] }],
  ['a ragged mixed layer, the short group widest', { rows: 9, columns: 172, groupSize: 32, bits: [1, 2, 2, 3, 1, 3] }],
  ['a ragged mixed layer, the short group narrowest', { rows: 9, columns: 172, groupSize: 32, bits: [3, 2, 4, 3, 3, 1] }],
  ['a ragged mixed layer in order', { rows: 9, columns: 172, groupSize: 32, bits: [4, 3, 2, 2, 2, 2] }],
  ['a layer narrower than a group', { rows: 9, columns: 40, groupSize: 128, bits: [2] }],
  ['its input sorted', { rows: 9, columns: 256, groupSize: 64, bits: [4, 3, 2, 1], transform: { hadamard: 0 } }],
  ['its input rotated', { rows: 9, columns: 256, groupSize: 64, bits: [4, 3, 2, 1], transform: { hadamard: 64 } }],
  ['its input rotated, one width', { rows: 9, columns: 256, groupSize: 128, bits: [2], transform: { hadamard: 128 } }],
  ['a ragged input sorted', { rows: 9, columns: 172, groupSize: 32, bits: [4, 3, 3, 2, 2, 1], transform: { hadamard: 0 } }],
  ['a ragged input rotated', { rows: 9, columns: 172, groupSize: 32, bits: [4, 3, 3, 2, 2, 1], transform: { hadamard: 32 } }],
  ['a ragged input rotated, one width', { rows: 9, columns: 200, groupSize: 64, bits: [3], transform: { hadamard: 64 } }],
  [
    'a rotated input whose groups are out of order',
    { rows: 9, columns: 200, groupSize: 64, bits: [1, 4, 2, 3], transform: { hadamard: 64 } },
  ],
  ['a rotated input narrower than a group', { rows: 9, columns: 40, groupSize: 128, bits: [2], transform: { hadamard: 128 } }],
  [
    'its input rotated as a whole',
    { rows: 9, columns: 256, groupSize: 64, bits: [4, 1, 3, 2], transform: { hadamard: 256, signed: true } },
  ],
  [
    'a wide input rotated as a whole, which takes two products',
    { rows: 9, columns: 768, groupSize: 128, bits: [2], transform: { hadamard: 768, signed: true }, lowRank: 2 },
  ],
  [
    'a wide input rotated in wide runs',
    { rows: 5, columns: 1536, groupSize: 128, bits: [2], transform: { hadamard: 512, signed: true } },
  ],
  ['an input rotated by twelves', { rows: 9, columns: 96, groupSize: 32, bits: [2], transform: { hadamard: 12, signed: true } }],
  ['an odd input with signs alone', { rows: 9, columns: 45, groupSize: 32, bits: [2], transform: { hadamard: 0, signed: true } }],
  [
    'a ragged input rotated as a whole',
    { rows: 9, columns: 172, groupSize: 32, bits: [2], transform: { hadamard: 4, signed: true } },
  ],
  ['a low-rank branch', { rows: 9, columns: 96, groupSize: 32, bits: [2], lowRank: 3 }],
  [
    'a low-rank branch beside groups out of order on a rotated input',
    { rows: 9, columns: 200, groupSize: 64, bits: [1, 4, 2, 3], transform: { hadamard: 64 }, lowRank: 5 },
  ],
  ['a low-rank branch of 8 bits', { rows: 9, columns: 96, groupSize: 32, bits: [2], lowRank: 3, lowRankBits: 8 }],
  ['a low-rank branch of 4 bits', { rows: 10, columns: 96, groupSize: 32, bits: [2], lowRank: 3, lowRankBits: 4 }],
  [
    'a low-rank branch of 4 bits and odd sizes on a rotated input',
    { rows: 9, columns: 201, groupSize: 64, bits: [1, 4, 2, 3], transform: { hadamard: 64 }, lowRank: 5, lowRankBits: 4 },
  ],
  ['a group of no bits', { rows: 9, columns: 128, groupSize: 32, bits: [2, 0, 4, 2] }],
];

describe('a quantized linear in ONNX', () => {
  it.each(CASES)('with %s runs as its decoded weights do, and decodes to the same float32', async (_, options) => {
    const q = randomLinear(options);
    const x = inputs(q.inFeatures);
    const bias = Float32Array.from({ length: q.outFeatures }, (_, i) => i / 10 - 1);
    const expected = multiply(x, dequantize(q), q, bias);
    for (const [level, tolerance, storage] of [
      [1, 1e-5, {}],
      [4, 8e-3, {}],
      [1, 1e-5, { container: '2' }],
      [1, 1e-5, { container: '4' }],
      [1, 1e-5, { compact: false }],
      [1, 1e-5, { compact: false, container: '4' }],
    ] as const) {
      const model = await graphOf({ m: q }, level, bias, storage);
      expectLint(model.graph, level);
      const session = await openGraph(model);
      const { 'y.m': y } = await session.run({ x: f32([2, 3, q.inFeatures], x) });
      await session.release();
      expect(y.shape).toEqual([2, 3, q.outFeatures]);
      expect(relativeError(y.data as Float32Array, expected)).toBeLessThan(tolerance);
      const stored = (await storedLinears('m.onnx', model.graph)).get('m')!;
      expect(await decodeLinear('m.onnx', stored, q.inFeatures)).toEqual(dequantize(q));
    }
  });

  it('decodes bit for bit whatever its widths, sizes and levels', async () => {
    const shape = {
      rows: fc.integer({ min: 1, max: 6 }),
      columns: fc.integer({ min: 1, max: 150 }),
      groupSize: fc.constantFrom(16, 32, 64),
      bits: fc.array(fc.integer({ min: 0, max: 8 }), { minLength: 1, maxLength: 8 }),
      seed: fc.nat(),
      scaleDtype: fc.constantFrom('F16' as const, 'F32' as const),
      transform: fc.record({ hadamard: fc.constantFrom(0, 16, 64), signed: fc.boolean(), seed: fc.nat() }),
      lowRank: fc.integer({ min: 1, max: 4 }),
      lowRankBits: fc.constantFrom(16 as const, 8 as const, 4 as const),
    };
    const options = fc.record(shape, { requiredKeys: ['rows', 'columns', 'groupSize', 'bits', 'seed', 'scaleDtype'] });
    await fc.assert(
      fc.asyncProperty(options, async (chosen) => {
        const q = randomLinear(chosen);
        for (const container of ONNX_CONTAINERS)
          for (const compact of [true, false]) {
            const { graph } = await graphOf({ m: q }, 4, undefined, { compact, container });
            const stored = (await storedLinears('m.onnx', graph)).get('m')!;
            expect(await decodeLinear('m.onnx', stored, q.inFeatures)).toEqual(dequantize(q));
          }
      }),
      { numRuns: 60 },
    );
  });

  it('keeps the levels of a 1-bit group whose mean float32 cannot hold', async () => {
    const q = {
      ...randomLinear({ rows: 1, columns: 32, groupSize: 32, bits: [1] }),
      scales: Float32Array.of(2),
      offsets: Float32Array.of(2 ** -24),
    };
    const { graph } = await graphOf({ m: q }, 1);
    const stored = (await storedLinears('m.onnx', graph)).get('m')!;
    const decoded = await decodeLinear('m.onnx', stored, 32);
    expect(new Set(decoded)).toEqual(new Set([2 ** -24, 2]));
    expect(decoded).toEqual(dequantize(q));
  });

  it('shares gather, split and group sums with its neighbours when they agree on the order, and not otherwise', async () => {
    const q = randomLinear({ rows: 8, columns: 128, groupSize: 32, bits: [1, 4, 2, 4], seed: 1 });
    const k = randomLinear({ rows: 6, columns: 128, groupSize: 32, bits: [1, 3, 2, 3], seed: 2 });
    const v = randomLinear({ rows: 6, columns: 128, groupSize: 32, bits: [2, 4, 4, 2], seed: 3 });
    const model = await graphOf({ q, k, v }, 1, undefined, { container: '2' });
    const count = (op: string) => model.graph.nodes.filter((node) => node.op === op).length;
    expect({ splits: count('Split'), sums: count('ReduceSum'), products: count('MatMulNBits') }).toEqual({
      splits: 2,
      sums: 1,
      products: 6,
    });
    expect([...model.graph.initializers.keys()].filter((name) => name.endsWith('.group_order'))).toEqual([
      'q.group_order',
      'v.group_order',
    ]);
    const x = inputs(128);
    const session = await openGraph(model);
    const outputs = await session.run({ x: f32([2, 3, 128], x) });
    await session.release();
    for (const [name, linear] of Object.entries({ q, k, v })) {
      expect(relativeError(outputs[`y.${name}`].data as Float32Array, multiply(x, dequantize(linear), linear))).toBeLessThan(
        1e-5,
      );
    }
    const stored = await storedLinears('m.onnx', model.graph);
    for (const [name, linear] of Object.entries({ q, k, v }))
      expect(await decodeLinear('m.onnx', stored.get(name)!, 128)).toEqual(dequantize(linear));
  });

  it('sorts and rotates an input once, whoever reads it, and each input for itself', async () => {
    const shape = { columns: 128, groupSize: 32, bits: [4, 3, 2, 2] };
    const linears = {
      q: randomLinear({ ...shape, rows: 8, seed: 1, transform: { hadamard: 32 } }),
      k: randomLinear({ ...shape, rows: 6, seed: 2, transform: { hadamard: 32 } }),
    };
    const { graph } = await graphOf(linears, 1);
    const count = (op: string) => graph.nodes.filter((node) => node.op === op).length;
    // One Mul makes the matrix; the products are its own and one MatMulNBits of each linear.
    expect([count('Gather'), count('MatMul'), count('Mul'), count('Split'), count('MatMulNBits')]).toEqual([1, 1, 1, 0, 2]);
    expect([...graph.initializers.keys()].filter((name) => !name.includes('MatMulNBits') && !name.startsWith('/'))).toEqual([
      'q.input_order',
      'hadamard_32.left',
      'hadamard_32.right',
    ]);
    const stored = await storedLinears('m.onnx', graph);
    for (const [name, linear] of Object.entries(linears)) {
      expect(await decodeLinear('m.onnx', stored.get(name)!, 128)).toEqual(dequantize(linear));
    }
  });

  it('gathers nothing for an input that is rotated as it lies', async () => {
    const q = randomLinear({ rows: 8, columns: 128, groupSize: 32, bits: [2], transform: { hadamard: 32 } });
    const inOrder = { ...q, transform: { order: Uint32Array.from({ length: 128 }, (_, k) => k), hadamard: 32 } };
    const { graph } = await graphOf({ q: inOrder }, 1);
    const work = graph.nodes.map((node) => node.op).filter((op) => op !== 'Cast');
    expect(work).toEqual(['Mul', 'Reshape', 'Reshape', 'MatMul', 'Reshape', 'MatMulNBits']);
    const stored = (await storedLinears('m.onnx', graph)).get('q')!;
    expect(await decodeLinear('m.onnx', stored, 128)).toEqual(dequantize(inOrder));
  });

  it('is one product of its input as it comes, whatever the order of its widths, with the narrowest operand that holds them', async () => {
    const bitsOf = async (bits: readonly number[], storage: OnnxStorageOptions = {}) => {
      const { graph } = await graphOf({ q: randomLinear({ rows: 8, columns: 128, groupSize: 32, bits }) }, 4, undefined, storage);
      const products = graph.nodes.filter(({ op }) => op === 'MatMulNBits');
      expect(graph.initializers.has('q.group_order')).toBe(products.length > 1);
      expect(products.some(({ inputs }) => inputs[0] === 'x')).toBe(products.length === 1);
      return products.map(({ attributes }) => Number(attributes.bits.value));
    };
    expect(await bitsOf([2, 4, 3, 2])).toEqual([4]);
    expect(await bitsOf([2, 2, 2, 2])).toEqual([2]);
    expect(await bitsOf([2, 2, 2, 2], { container: '4' })).toEqual([4]);
    expect(await bitsOf([2, 4, 3, 2], { container: '2' })).toEqual([4, 2]);
    expect(await bitsOf([2, 8, 3, 2])).toEqual([8, 4]);
  });

  it('needs no gather when its parts lie in order, and nothing to unfold in a plain file', async () => {
    const q = randomLinear({ rows: 8, columns: 128, groupSize: 32, bits: [4, 3, 2, 2] });
    const { graph } = await graphOf({ q }, 4, undefined, { compact: false });
    expect(graph.nodes.map((node) => node.op)).toEqual(['Split', 'MatMulNBits', 'MatMulNBits', 'Add']);
  });

  it('names its constants as onnxruntime-genai does', async () => {
    const uniform = await graphOf(
      { 'model.layers.0.self_attn.q_proj': randomLinear({ rows: 4, columns: 64, groupSize: 32, bits: [4] }) },
      4,
    );
    expect([...uniform.graph.initializers.keys()]).toEqual(
      ['qweight', 'scales', 'qzeros'].map((part) => `model.layers.0.self_attn.q_proj.MatMulNBits.${part}`),
    );
    const mixed = randomLinear({ rows: 4, columns: 64, groupSize: 32, bits: [4, 2] });
    const named = async (storage: OnnxStorageOptions) => {
      const { graph } = await graphOf({ q: mixed }, 4, undefined, storage);
      return [...graph.initializers.keys()].filter((name) => name.startsWith('q.'));
    };
    expect(await named({ container: '2' })).toEqual(
      ['4', '2'].flatMap((bits) => ['qweight', 'scales', 'qzeros'].map((part) => `q.MatMulNBits.${part}_${bits}`)),
    );
    expect(await named({ container: '4' })).toEqual(
      ['qweight_4', 'qweight_2', 'scales', 'qzeros'].map((part) => `q.MatMulNBits.${part}`),
    );
  });

  it('refuses group sizes that MatMulNBits does not take', () => {
    for (const groupSize of [8, 48]) {
      expect(() => layOutLinear(randomLinear({ rows: 2, columns: 96, groupSize, bits: [2] }))).toThrow(RecipeError);
    }
  });
});

/** onnx-runtime page, check 5. */
function expectLint(graph: Graph, level: number): void {
  for (const node of graph.nodes.filter(({ op }) => op === 'MatMulNBits')) {
    expect(node.attributes.accuracy_level).toEqual({ kind: 'int', value: level });
    expect([2, 4, 8]).toContain(Number(node.attributes.bits.value));
    expect(node.inputs[4] ?? '').toBe('');
    expect(graph.initializers.get(node.inputs[3])?.dtype).toBe('U8');
  }
}

describe('an ONNX graph that is not as pcomp writes it', () => {
  const q = randomLinear({ rows: 4, columns: 128, groupSize: 32, bits: [2, 4, 1, 4], transform: { hadamard: 32 } });
  const damaged: readonly (readonly [string, string, (graph: Graph) => void])[] = [
    ['a missing constant', 'onnx-linear-constant', (graph) => graph.initializers.delete('m.MatMulNBits.scales_4')],
    [
      'a constant of the wrong size',
      'onnx-linear-size',
      (graph) =>
        graph.initializers.set(
          'm.MatMulNBits.qzeros_2',
          inlineInitializer('m.MatMulNBits.qzeros_2', 'U8', [8], new Uint8Array(8)),
        ),
    ],
    [
      'a group order with a group twice',
      'onnx-linear-order',
      (graph) =>
        graph.initializers.set(
          'm.group_order',
          inlineInitializer('m.group_order', 'I64', [4], asBytes(BigInt64Array.of(0n, 0n, 1n, 2n))),
        ),
    ],
    [
      'a rotation by another matrix',
      'onnx-linear-rotation',
      (graph) =>
        graph.initializers.set(
          'hadamard_32.left',
          inlineInitializer('hadamard_32.left', 'F32', [4, 1, 4, 1], asBytes(new Float32Array(16).fill(1))),
        ),
    ],
    ['an input sorted by what is no constant', 'onnx-linear-constant', (graph) => graph.initializers.delete('m.input_order')],
    ['3-bit operands', 'onnx-linear-bits', (graph) => setAttribute(graph, 'bits', 3)],
    ['no block size', 'onnx-linear-attribute', (graph) => setAttribute(graph, 'block_size', 0)],
  ];

  it.each(damaged)('is refused for %s', async (_, rule, damage) => {
    const { graph } = await graphOf({ m: q }, 4, undefined, { container: '2' });
    damage(graph);
    const decode = async () => decodeLinear('m.onnx', (await storedLinears('m.onnx', graph)).get('m')!, 128);
    const error = await decode().catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule });
  });

  it('is refused when its groups do not make the layer', async () => {
    const { graph } = await graphOf({ m: q }, 4, undefined, { container: '2' });
    const stored = (await storedLinears('m.onnx', graph)).get('m')!;
    await expect(decodeLinear('m.onnx', stored, 64)).rejects.toMatchObject({ rule: 'onnx-linear-shape' });
  });

  it.each([
    ['a column twice', [0, 0, ...Array.from({ length: 126 }, (_, k) => k + 2)]],
    ['a column that is not there', [128, ...Array.from({ length: 127 }, (_, k) => k + 1)]],
    ['a negative column', [-1, ...Array.from({ length: 127 }, (_, k) => k + 1)]],
    ['too few columns', Array.from({ length: 127 }, (_, k) => k)],
  ])('is refused when the order of its columns has %s', async (_, order) => {
    const { graph } = await graphOf({ m: q }, 4, undefined, { container: '2' });
    const bytes = asBytes(Int32Array.from(order));
    graph.initializers.set('m.input_order', inlineInitializer('m.input_order', 'I32', [order.length], bytes));
    const stored = (await storedLinears('m.onnx', graph)).get('m')!;
    await expect(decodeLinear('m.onnx', stored, 128)).rejects.toMatchObject({ rule: 'columns-order' });
  });
});

function setAttribute(graph: Graph, name: string, value: number): void {
  const index = graph.nodes.findIndex(({ op }) => op === 'MatMulNBits');
  const node = graph.nodes[index];
  graph.nodes[index] = { ...node, attributes: { ...node.attributes, [name]: { kind: 'int', value } } };
}
