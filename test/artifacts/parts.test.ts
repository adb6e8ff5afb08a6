import { mkdtempSync, readdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { byteLengthOf } from '../../formats/dtype.ts';
import { openSafetensors } from '../../formats/safetensors/reader.ts';
import type { Tensor, TensorSource } from '../../formats/tensor.ts';
import { PartStore } from '../../src/artifacts/parts.ts';
import { encodePlanes, planesDeclarations, readPlanes, readPlanesGrid, shapeOfGrid } from '../../src/artifacts/planes.ts';
import { layoutOf, parseQuantMetadata, type QuantizedModule, quantMetadata } from '../../src/artifacts/quant-metadata.ts';
import { FormatError, RecipeError } from '../../src/errors.ts';
import { shapeOfTransform } from '../../src/methods/quantize/input-transform.ts';
import { dequantize, type QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import { randomLinear } from './random-linear.ts';

/** A source over tensors in memory. */
function memory(tensors: readonly Tensor[]): TensorSource {
  const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  return {
    path: 'memory',
    tensors: byName,
    metadata: new Map(),
    files: [],
    read: async (name) => byName.get(name)!,
    readRows: () => Promise.reject(new Error('not used')),
    close: async () => undefined,
    [Symbol.asyncDispose]: async () => undefined,
  };
}

const MIXED = randomLinear({ rows: 7, columns: 77, groupSize: 16, bits: [1, 2, 3, 8, 5], seed: 3 });
const ROTATED = randomLinear({
  rows: 5,
  columns: 40,
  groupSize: 16,
  bits: [3, 2],
  seed: 4,
  transform: { hadamard: 16 },
});

const CORRECTED: QuantizedLinear = { ...ROTATED, bias: Float32Array.of(1, 0.1, -3, 0, 2 ** -30) };

/** What the metadata would say of a module that stands for itself. */
function entryOf({ outFeatures, inFeatures, groupSize, transform, lowRank }: QuantizedLinear): QuantizedModule {
  const rank = lowRank && { rank: lowRank.rank };
  const entry = { outFeatures, inFeatures, groupSize, input: 'm', transposed: false, ...rank };
  return transform ? { ...entry, transform: shapeOfTransform(transform) } : entry;
}

describe('the planes layout', () => {
  it('brings back any mix of widths, odd sizes and short last groups, bit for bit', async () => {
    const shape = {
      rows: fc.integer({ min: 1, max: 9 }),
      columns: fc.integer({ min: 1, max: 90 }),
      groupSize: fc.constantFrom(16, 32, 48),
      bits: fc.array(fc.integer({ min: 0, max: 8 }), { minLength: 1, maxLength: 6 }),
      seed: fc.nat(),
      scaleDtype: fc.constantFrom('F16' as const, 'F32' as const),
      transform: fc.record({ hadamard: fc.constantFrom(0, 16, 48, 64), signed: fc.boolean(), seed: fc.nat() }),
      lowRank: fc.integer({ min: 1, max: 4 }),
      lowRankBits: fc.constantFrom(16 as const, 8 as const, 4 as const),
    };
    const options = fc.record(shape, { requiredKeys: ['rows', 'columns', 'groupSize', 'bits', 'seed', 'scaleDtype'] });
    await fc.assert(
      fc.asyncProperty(options, async (chosen) => {
        const q = randomLinear(chosen);
        const tensors = encodePlanes('m', q);
        expect(tensors.map(({ name, dtype, shape }) => ({ name, dtype, shape }))).toEqual(
          planesDeclarations('m', shapeOfGrid(q)),
        );
        for (const tensor of tensors) expect(tensor.data.byteLength).toBe(byteLengthOf(tensor.dtype, tensor.shape));
        const back = await readPlanes(memory(tensors), 'm', entryOf(q));
        expect(dequantize(back)).toEqual(dequantize(q));
        expect([back.bits, back.codes, back.zeroPoints]).toEqual([q.bits, q.codes, q.zeroPoints]);
        // Without any stored group there are no scales whose dtype could be told.
        if (q.bits.some((bits) => bits > 0)) expect(back).toEqual(q);
      }),
      { numRuns: 60 },
    );
  });

  it('has the sizes of the specification: 4096 x 4096 at uniform 2 bits', () => {
    const bits = new Uint8Array(32).fill(2);
    const declared = planesDeclarations('m', { outFeatures: 4096, inFeatures: 4096, groupSize: 128, bits, scaleDtype: 'F16' });
    const sizes = Object.fromEntries(declared.map(({ name, dtype, shape }) => [name, byteLengthOf(dtype, shape)]));
    expect(sizes).toEqual({ 'm.pq_bits': 32, 'm.pq_codes': 4194304, 'm.pq_scales': 262144, 'm.pq_zeros': 32768 });
  });

  it('reads everything but the codes without touching them', async () => {
    const tensors = encodePlanes('m', MIXED).filter(({ name }) => name !== 'm.pq_codes');
    const { codes: _, ...grid } = MIXED;
    expect(await readPlanesGrid(memory(tensors), 'm', entryOf(MIXED))).toEqual(grid);
  });

  it.each([
    ['a missing tensor', 'layout-tensor-missing', (all: Tensor[]) => all.filter(({ name }) => name !== 'm.pq_zeros')],
    [
      'codes of another length',
      'layout-tensor-shape',
      (all: Tensor[]) => all.map((t) => (t.name === 'm.pq_codes' ? { ...t, shape: [t.shape[0] - 1] } : t)),
    ],
    [
      'scales of another dtype',
      'layout-tensor-shape',
      (all: Tensor[]) => all.map((t) => (t.name === 'm.pq_scales' ? { ...t, dtype: 'BF16' as const } : t)),
    ],
    [
      'a width of 9 bits',
      'planes-width',
      (all: Tensor[]) => all.map((t) => (t.name === 'm.pq_bits' ? { ...t, data: Uint8Array.of(9, 2, 3, 8, 5) } : t)),
    ],
    [
      'too few groups',
      'layout-tensor-shape',
      (all: Tensor[]) => all.map((t) => (t.name === 'm.pq_bits' ? { ...t, shape: [4], data: t.data.slice(1) } : t)),
    ],
  ])('refuses %s', async (_, rule, damage) => {
    const damaged = memory(damage(encodePlanes('m', MIXED)));
    const error = await readPlanes(damaged, 'm', entryOf(MIXED)).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule });
  });
});

describe('the order of the columns in the planes layout', () => {
  const withOrder = (order: readonly number[], shape = [order.length]) => {
    const tensor = { name: 'm.pq_perm', dtype: 'I32' as const, shape, byteLength: 4 * order.length };
    const rest = encodePlanes('m', ROTATED).filter(({ name }) => name !== 'm.pq_perm');
    return memory([...rest, { ...tensor, data: new Uint8Array(Int32Array.from(order).buffer) }]);
  };
  const ascending = Array.from({ length: 40 }, (_, k) => k);

  it('takes 32 bits a column', () => {
    const [declared] = planesDeclarations('m', shapeOfGrid(ROTATED)).slice(-1);
    expect(declared).toEqual({ name: 'm.pq_perm', dtype: 'I32', shape: [40] });
  });

  it('may lie with another module, that reads the same input', async () => {
    const { transform: _, ...plain } = ROTATED;
    const [order] = encodePlanes('first', ROTATED).slice(-1);
    const source = memory([...encodePlanes('m', plain), order]);
    expect(await readPlanes(source, 'm', { ...entryOf(ROTATED), input: 'first' })).toEqual(ROTATED);
  });

  it.each([
    ['a column twice', 'columns-order', withOrder([...ascending.slice(0, 39), 0])],
    ['a column too high', 'columns-order', withOrder([...ascending.slice(0, 39), 40])],
    ['a negative column', 'columns-order', withOrder([-1, ...ascending.slice(1)])],
    ['too few columns', 'layout-tensor-shape', withOrder(ascending.slice(1))],
    ['no tensor', 'layout-tensor-missing', memory(encodePlanes('m', ROTATED).slice(0, -1))],
  ])('is refused when it has %s', async (_, rule, source) => {
    const error = await readPlanes(source, 'm', entryOf(ROTATED)).catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule });
  });
});

describe('the metadata of an artifact', () => {
  const entry = { outFeatures: 4, inFeatures: 64, groupSize: 32, input: 'a', transposed: false };

  it('comes back as it was, and is the JSON that the format page prescribes', () => {
    const modules = new Map<string, QuantizedModule>([
      ['a', entry],
      ['b', { ...entry, groupSize: 16, transposed: true, bits: [1, 2, 3, 4] }],
      ['c', { ...entry, input: 'c', transform: { permuted: true, signed: false, hadamard: 0 } }],
      ['d', { ...entry, input: 'd', transform: { permuted: true, signed: false, hadamard: 16 } }],
      ['e', { ...entry, rank: 3 }],
    ]);
    const metadata = quantMetadata('planes', 32, modules);
    expect(layoutOf('f', metadata)).toBe('planes');
    expect(layoutOf('f', new Map())).toBeUndefined();
    expect(JSON.parse(metadata.get('pcomp.quant')!)).toEqual({
      group_size: 32,
      modules: {
        a: { shape: [4, 64], input: 'a' },
        b: { shape: [4, 64], input: 'a', group_size: 16, transposed: true, bits: [1, 2, 3, 4] },
        c: { shape: [4, 64], input: 'c' },
        d: { shape: [4, 64], input: 'd' },
        e: { shape: [4, 64], input: 'a', rank: 3 },
      },
      inputs: {
        a: { transform: 'none', block: 32, folded: false },
        c: { transform: 'perm', block: 32, folded: false },
        d: { transform: 'perm-had', block: 16, folded: false },
      },
    });
    expect(parseQuantMetadata('f', metadata)).toEqual(modules);
  });

  const withModule = (module: string) => ({ 'pcomp.quant': `{"inputs":{},"group_size":32,"modules":{"a":${module}}}` });
  it.each([
    ['another version', 'quant-version', { 'pcomp.layout_version': '2' }],
    ['text that is no JSON', 'quant-metadata', { 'pcomp.quant': '{' }],
    ['no modules', 'quant-metadata', { 'pcomp.quant': '{"inputs":{}}' }],
    ['a module that is no object', 'quant-metadata', withModule('7')],
    ['a shape of one number', 'quant-metadata', withModule('{"shape":[4],"input":"a"}')],
    ['a group size of 0', 'quant-metadata', withModule('{"shape":[4,4],"input":"a","group_size":0}')],
    ['no input', 'quant-metadata', withModule('{"shape":[4,4]}')],
    ['too few widths', 'quant-metadata', withModule('{"shape":[4,64],"input":"a","bits":[2]}')],
    ['a rank above its size', 'quant-metadata', withModule('{"shape":[4,64],"input":"a","rank":5}')],
    ['a width of 9', 'quant-metadata', withModule('{"shape":[4,4],"input":"a","bits":[9]}')],
    [
      'a transform it cannot undo',
      'quant-transform',
      { 'pcomp.quant': '{"inputs":{"a":{"transform":"had"}},"group_size":32,"modules":{}}' },
    ],
    [
      'a rotation of blocks that are no power of two',
      'quant-transform',
      { 'pcomp.quant': '{"inputs":{"a":{"transform":"perm-had","block":48}},"group_size":32,"modules":{}}' },
    ],
    ['an input that is not described', 'quant-metadata', withModule('{"shape":[4,64],"input":"a"}')],
  ])('is refused for %s', (_, rule, change) => {
    const metadata = quantMetadata('planes', 32, new Map([['a', entry]]));
    for (const [key, value] of Object.entries(change)) metadata.set(key, value);
    expect(() => parseQuantMetadata('f', metadata)).toThrow(expect.objectContaining({ rule }));
  });

  it('is refused for a layout of another version of pcomp', () => {
    expect(() => layoutOf('f', new Map([['pcomp.layout', 'waves']]))).toThrow(/planes, gptq, onnx/);
  });
});

describe('the parts of a run', () => {
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'pcomp-parts-'));
  });
  afterEach(() => rmSync(folder, { recursive: true }));

  it('are found again by a later run of the same recipe, with their details, and yield equal bytes', async () => {
    const other = randomLinear({ rows: 3, columns: 40, groupSize: 32, bits: [4], seed: 9 });
    const first = await PartStore.open(folder, 'r1');
    await first.addBlock(
      7,
      new Map<string, QuantizedLinear>([
        ['x.q', MIXED],
        ['x.k', other],
        ['x.v', CORRECTED],
      ]),
      { error: 0.5 },
    );
    await first.addEmbeddings(new Map([['emb', other]]));
    const again = await PartStore.open(folder, 'r1');
    expect([again.hasBlock(7), again.hasBlock(8), again.hasEmbeddings, again.names]).toEqual([
      true,
      false,
      true,
      ['x.q', 'x.k', 'x.v', 'emb'],
    ]);
    expect(await again.read('x.q')).toEqual(MIXED);
    expect(await again.read('emb')).toEqual(other);
    const { codes: _, ...grid } = CORRECTED;
    expect([await again.read('x.v'), await again.readGrid('x.v')]).toEqual([CORRECTED, grid]);
    expect(again.blockDetails(7)).toEqual({ error: 0.5 });
    expect(readdirSync(folder)).toEqual(['block-00007.safetensors', 'embeddings.safetensors']);
  });

  it('of another recipe are refused', async () => {
    await (await PartStore.open(folder, 'r1')).addBlock(0, new Map([['q', MIXED]]));
    await expect(PartStore.open(folder, 'r2')).rejects.toThrow(RecipeError);
  });

  it('that a killed run was writing are dropped, finished ones kept', async () => {
    await (await PartStore.open(folder, 'r1')).addBlock(0, new Map([['q', MIXED]]));
    writeFileSync(join(folder, 'block-00001.safetensors.partial'), 'torn');
    const store = await PartStore.open(folder, 'r1');
    expect([store.hasBlock(0), store.hasBlock(1)]).toEqual([true, false]);
    expect(readdirSync(folder)).toEqual(['block-00000.safetensors']);
  });

  it('that were damaged are named', async () => {
    await (await PartStore.open(folder, 'r1')).addBlock(0, new Map([['q', MIXED]]));
    truncateSync(join(folder, 'block-00000.safetensors'), 100);
    await expect(PartStore.open(folder, 'r1')).rejects.toThrow(/block-00000/);
  });

  it('are files that any safetensors reader opens', async () => {
    await (await PartStore.open(folder, 'r1')).addBlock(0, new Map([['q', MIXED]]));
    await using source = await openSafetensors(join(folder, 'block-00000.safetensors'));
    expect([...source.tensors.keys()].sort()).toEqual(['q.pq_bits', 'q.pq_codes', 'q.pq_offsets', 'q.pq_scales', 'q.pq_zeros']);
  });
});
