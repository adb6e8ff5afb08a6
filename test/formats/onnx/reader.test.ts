import { mkdtemp, open, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readModel } from '../../../formats/onnx/model-reader.ts';
import { decodeOnnx, openOnnx } from '../../../formats/onnx/reader.ts';
import { type ByteSource, WindowedSource } from '../../../formats/onnx/wire.ts';
import { encodeOnnx } from '../../../formats/onnx/writer.ts';
import {
  ADDITION,
  bytesOf,
  external,
  type Field,
  f32,
  floatField,
  IR_VERSION,
  initializer,
  lengthField,
  model,
  node,
  OPSET,
  packedVarints,
  tensorType,
  valueInfo,
  varint,
  varintField,
} from './encode-by-hand.ts';

const bytes = (array: ArrayBufferView): Uint8Array => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
const attribute = (...fields: Field[]): Field => lengthField(5, fields);

/** A test double that counts the bytes read. */
class CountingSource implements ByteSource {
  readonly path = 'counted.onnx';
  readonly byteLength: number;
  readonly #bytes: Uint8Array;
  bytesRead = 0;

  constructor(content: Uint8Array) {
    this.#bytes = Uint8Array.from(content);
    this.byteLength = content.byteLength;
  }

  async read(start: number, end: number): Promise<Uint8Array> {
    this.bytesRead += end - start;
    return this.#bytes.slice(start, end);
  }
}

describe('reading ONNX', () => {
  it('finds what hand-made bytes say', async () => {
    const read = await decodeOnnx(
      bytesOf(
        IR_VERSION,
        lengthField(2, 'someone'),
        lengthField(3, '1.2'),
        lengthField(7, ADDITION),
        OPSET,
        lengthField(8, [lengthField(1, 'com.microsoft'), varintField(2, 1)]),
        lengthField(14, [lengthField(1, 'key'), lengthField(2, 'value')]),
      ),
    );
    expect(read).toMatchObject({ irVersion: 10, producerName: 'someone', producerVersion: '1.2' });
    expect([...read.opsets]).toEqual([
      ['', 21],
      ['com.microsoft', 1],
    ]);
    expect([...read.metadata]).toEqual([['key', 'value']]);
    expect(read.graph.nodes).toEqual([{ name: '', op: 'Add', domain: '', inputs: ['x', 'w'], outputs: ['y'], attributes: {} }]);
    expect(read.graph.inputs).toEqual([{ name: 'x', dtype: 'F32', shape: [2] }]);
    expect(read.graph.outputs).toEqual([{ name: 'y', dtype: 'F32', shape: [2] }]);
    const w = read.graph.initializers.get('w');
    expect(w).toMatchObject({ name: 'w', dtype: 'F32', shape: [2], byteLength: 8 });
    expect(await w?.read()).toEqual(f32(10, 20));
    expect(await w?.read(4)).toEqual(f32(20));
    await expect(w?.read(4, 9)).rejects.toThrow(RangeError);
  });

  it.each<[string, number, number[], Field[], ArrayBufferView]>([
    ['packed float_data', 1, [2], [lengthField(4, f32(1.5, -2))], Float32Array.of(1.5, -2)],
    ['float_data one by one', 1, [2], [floatField(4, 1.5), floatField(4, -2)], Float32Array.of(1.5, -2)],
    ['double_data', 11, [2], [lengthField(10, bytes(Float64Array.of(0.1, -3)))], Float64Array.of(0.1, -3)],
    [
      'int64_data',
      7,
      [3],
      [packedVarints(7, [-1, 2n ** 63n - 1n, -(2n ** 63n)])],
      BigInt64Array.of(-1n, 2n ** 63n - 1n, -(2n ** 63n)),
    ],
    ['int64_data one by one', 7, [2], [varintField(7, 5), varintField(7, -300)], BigInt64Array.of(5n, -300n)],
    ['uint64_data', 13, [2], [packedVarints(11, [2n ** 64n - 1n, 7])], BigUint64Array.of(2n ** 64n - 1n, 7n)],
    ['uint64_data of uint32', 12, [1], [packedVarints(11, [2 ** 32 - 1])], Uint32Array.of(2 ** 32 - 1)],
    ['int32_data', 6, [3], [packedVarints(5, [-(2 ** 31), 2 ** 31 - 1, 70_000])], Int32Array.of(-(2 ** 31), 2 ** 31 - 1, 70_000)],
    ['int32_data of int16', 5, [2], [packedVarints(5, [-32768, 32767])], Int16Array.of(-32768, 32767)],
    ['int32_data of int8', 3, [2], [packedVarints(5, [-128, 127])], Int8Array.of(-128, 127)],
    ['int32_data of uint8', 2, [2], [packedVarints(5, [0, 255])], Uint8Array.of(0, 255)],
    ['int32_data of bool', 9, [2], [packedVarints(5, [1, 0])], Uint8Array.of(1, 0)],
    ['int32_data of float16 bits', 10, [2], [packedVarints(5, [0x3c00, 0xfc00])], Uint16Array.of(0x3c00, 0xfc00)],
    ['int32_data of bfloat16 bits', 16, [1], [packedVarints(5, [0xbf80])], Uint16Array.of(0xbf80)],
    ['int32_data of packed uint4', 21, [3], [packedVarints(5, [0x5a, 0x0c])], Uint8Array.of(0x5a, 0x0c)],
    ['raw uint4', 21, [3], [lengthField(9, Uint8Array.of(0x5a, 0x0c))], Uint8Array.of(0x5a, 0x0c)],
    ['raw uint2', 25, [5], [lengthField(9, Uint8Array.of(0x93, 0x01))], Uint8Array.of(0x93, 0x01)],
    ['raw int2', 26, [4], [lengthField(9, Uint8Array.of(0x93))], Uint8Array.of(0x93)],
    ['raw float8', 17, [2], [lengthField(9, Uint8Array.of(0x38, 0xb8))], Uint8Array.of(0x38, 0xb8)],
    ['nothing, for no elements', 1, [0, 7], [], new Uint8Array(0)],
    ['typed data beside an empty raw_data', 1, [1], [lengthField(9, ''), lengthField(4, f32(3))], Float32Array.of(3)],
  ])('reads %s', async (_, type, shape, data, expected) => {
    const read = await decodeOnnx(
      model([node('Identity', ['w'], ['y']), initializer('w', type, shape, ...data), valueInfo(12, 'y')]),
    );
    const w = read.graph.initializers.get('w');
    expect(w?.shape).toEqual(shape);
    expect(await w?.read()).toEqual(bytes(expected));
    // The same from its rewritten form, which is raw_data.
    const again = await decodeOnnx(await encodeOnnx(read));
    expect(await again.graph.initializers.get('w')?.read()).toEqual(bytes(expected));
  });

  it.each([
    ['raw_data', 9],
    ['float_data', 4],
  ])('looks at nothing of a large initializer in %s until it is read, and then only at what is asked for', async (_, field) => {
    const values = Float32Array.from({ length: 1_000_000 }, (_v, i) => i);
    const head = [varintField(1, values.length), varintField(2, 1), lengthField(8, 'w')].flat();
    const data = [...varint((field << 3) | 2), ...varint(values.byteLength)];
    const tensor = [...varint((5 << 3) | 2), ...varint(head.length + data.length + values.byteLength)];
    const before = [...node('Identity', ['w'], ['y']), ...tensor, ...head, ...data];
    const after = valueInfo(12, 'y');
    const graphHead = [...varint((7 << 3) | 2), ...varint(before.length + values.byteLength + after.length)];
    const source = new CountingSource(
      Buffer.concat([bytesOf(IR_VERSION, graphHead, before), bytes(values), bytesOf(after, OPSET)]),
    );
    const read = await readModel(new WindowedSource(source), { path: source.path, external: undefined });
    expect(source.bytesRead).toBeLessThan(200_000);
    const already = source.bytesRead;
    const w = read.graph.initializers.get('w');
    const part = (await w?.read(2_000_000, 2_400_000)) ?? new Uint8Array();
    // Compared as buffers: element by element takes vitest half a minute.
    expect(Buffer.compare(part, bytes(values.slice(500_000, 600_000)))).toBe(0);
    expect(source.bytesRead - already).toBe(400_000);
    expect(Buffer.compare((await w?.read()) ?? part, bytes(values))).toBe(0);
  });

  it('hands out bytes that callers may change and view as any type', async () => {
    const read = await decodeOnnx(model(ADDITION));
    const w = read.graph.initializers.get('w');
    const first = (await w?.read()) ?? new Uint8Array();
    expect(new Float32Array(first.buffer)).toEqual(Float32Array.of(10, 20));
    first.fill(0);
    expect(await w?.read()).toEqual(f32(10, 20));
  });

  it('reads attributes of every kind, exactly', async () => {
    const tensor = [varintField(1, 2), varintField(2, 6), lengthField(8, 't'), packedVarints(5, [-1, 1])];
    const read = await decodeOnnx(
      model([
        node(
          'Anything',
          [],
          ['y'],
          attribute(lengthField(1, 'f'), floatField(2, 0.5), varintField(20, 1)),
          attribute(lengthField(1, 'i'), varintField(3, -7), varintField(20, 2)),
          attribute(lengthField(1, 'huge'), varintField(3, 2n ** 63n - 1n), varintField(20, 2)),
          attribute(lengthField(1, 'zero'), varintField(20, 2)),
          attribute(lengthField(1, 's'), lengthField(4, 'µ'), varintField(20, 3)),
          attribute(lengthField(1, 't'), lengthField(5, tensor), varintField(20, 4)),
          attribute(lengthField(1, 'floats'), floatField(7, 1), floatField(7, 2), varintField(20, 6)),
          attribute(lengthField(1, 'ints'), varintField(8, 1), packedVarints(8, [-2, 3]), varintField(20, 7)),
          attribute(lengthField(1, 'none'), varintField(20, 7)),
          attribute(lengthField(1, 'strings'), lengthField(9, 'a'), lengthField(9, ''), varintField(20, 8)),
          attribute(lengthField(1, 'untyped'), varintField(8, 4), lengthField(13, 'documented')),
          attribute(lengthField(1, '__proto__'), varintField(3, 1), varintField(20, 2)),
        ),
        valueInfo(12, 'y'),
      ]),
    );
    const attributes = read.graph.nodes[0].attributes;
    expect(Object.entries(attributes)).toEqual([
      ['f', { kind: 'float', value: 0.5 }],
      ['i', { kind: 'int', value: -7 }],
      ['huge', { kind: 'int', value: 2n ** 63n - 1n }],
      ['zero', { kind: 'int', value: 0 }],
      ['s', { kind: 'string', value: 'µ' }],
      ['t', { kind: 'tensor', value: { dtype: 'I32', shape: [2], data: bytes(Int32Array.of(-1, 1)), name: 't' } }],
      ['floats', { kind: 'floats', value: [1, 2] }],
      ['ints', { kind: 'ints', value: [1, -2, 3] }],
      ['none', { kind: 'ints', value: [] }],
      ['strings', { kind: 'strings', value: ['a', ''] }],
      ['untyped', { kind: 'ints', value: [4], unknown: [bytesOf(lengthField(13, 'documented'))] }],
      ['__proto__', { kind: 'int', value: 1 }],
    ]);
  });

  it('tells dimensions that are numbers, names, and unknown, and shapes that are unknown', async () => {
    const dims = [[varintField(1, 3)], [lengthField(2, 'batch_size')], [], [varintField(1, -1)], [varintField(1, 0)]];
    const read = await decodeOnnx(
      model([
        ...ADDITION,
        valueInfo(13, 'a', [
          lengthField(1, [
            varintField(1, 7),
            lengthField(
              2,
              dims.map((dim) => lengthField(1, dim)),
            ),
          ]),
        ]),
        valueInfo(13, 'b', [lengthField(1, [varintField(1, 10)])]),
        valueInfo(13, 'c', tensorType(1, [])),
        valueInfo(13, 'd', tensorType(8, [1])),
        valueInfo(13, 'e', [lengthField(4, [lengthField(1, tensorType(1, []))])]),
        lengthField(13, [lengthField(1, 'f')]),
      ]),
    );
    expect(read.graph.valueInfo.map(({ name, dtype, shape }) => [name, dtype, shape])).toEqual([
      ['a', 'I64', [3, 'batch_size', '', '', 0]],
      ['b', 'F16', null],
      ['c', 'F32', []],
      ['d', null, [1]],
      ['e', null, null],
      ['f', null, null],
    ]);
  });

  it('does not list an initializer among the inputs, yet keeps that it may be overridden', async () => {
    const read = await decodeOnnx(model([...ADDITION, valueInfo(11, 'w')]));
    expect(read.graph.inputs.map(({ name }) => name)).toEqual(['x']);
    expect(read.graph.overridableInputs).toEqual([{ name: 'w', dtype: 'F32', shape: [2] }]);
    const again = await decodeOnnx(await encodeOnnx(read));
    expect(again.graph.overridableInputs).toEqual(read.graph.overridableInputs);
    read.graph.initializers.delete('w');
    read.graph.nodes = [{ name: '', op: 'Neg', domain: '', inputs: ['x'], outputs: ['y'], attributes: {} }];
    expect((await decodeOnnx(await encodeOnnx(read))).graph.inputs.map(({ name }) => name)).toEqual(['x']);
  });

  it('accepts subgraphs that read values around them, reuse names of them, and are bound by position', async () => {
    const branch = (name: string, op: string): Field =>
      attribute(
        lengthField(1, name),
        lengthField(6, [node(op, ['x', 'w'], ['t']), node('Neg', ['t'], ['r']), lengthField(2, name), valueInfo(12, 'r')]),
        varintField(20, 5),
      );
    const body = [
      node('Add', ['carried', 't'], ['carried_out']),
      node('Identity', ['again'], ['again_out']),
      valueInfo(11, 'i'),
      valueInfo(11, 'again'),
      valueInfo(11, 'carried'),
      valueInfo(12, 'again_out'),
      valueInfo(12, 'carried_out'),
    ];
    const read = await decodeOnnx(
      model([
        node('Neg', ['x'], ['t']),
        node('If', ['condition'], ['r'], branch('then_branch', 'Add'), branch('else_branch', 'Sub')),
        node('Loop', ['', 'condition', 'r'], ['y'], attribute(lengthField(1, 'body'), lengthField(6, body), varintField(20, 5))),
        initializer('w', 1, [2], lengthField(9, f32(1, 2))),
        valueInfo(11, 'x'),
        valueInfo(11, 'condition', tensorType(9, [])),
        valueInfo(12, 'y'),
      ]),
    );
    const loop = read.graph.nodes[2].attributes['body'];
    expect(loop.kind === 'graph' && loop.value.inputs.map(({ name }) => name)).toEqual(['i', 'again', 'carried']);
  });

  it('counts initializers of strings and sparse ones as values, and keeps them', async () => {
    const strings = initializer('s', 8, [1], lengthField(6, 'text'));
    const sparse = lengthField(15, [
      lengthField(1, [varintField(1, 0), varintField(2, 1), lengthField(8, 'sparse')]),
      varintField(3, 4),
    ]);
    const read = await decodeOnnx(model([node('Anything', ['s', 'sparse'], ['y']), strings, valueInfo(12, 'y'), sparse]));
    expect(read.graph.initializers.size).toBe(0);
    expect(read.graph.unknown).toEqual([bytesOf(strings), bytesOf(sparse)]);
    expect((await decodeOnnx(await encodeOnnx(read))).graph).toEqual(read.graph);
  });
});

describe('reading ONNX files', () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pcomp-onnx-'));
  });
  afterAll(() => rm(folder, { recursive: true }));

  it('reads external data by range, from below the folder, and lists the files it stands on', async () => {
    const values = Float32Array.from({ length: 1000 }, (_, i) => i / 8);
    await writeFile(join(folder, 'weights.bin'), Buffer.concat([new Uint8Array(64), bytes(values)]));
    await writeFile(
      join(folder, 'external.onnx'),
      model([
        node('Identity', ['w'], ['y']),
        initializer('w', 1, [1000], ...external({ location: 'weights.bin', offset: '64', length: '4000' })),
        valueInfo(12, 'y'),
      ]),
    );
    const file = await openOnnx(join(folder, 'external.onnx'));
    const w = file.model.graph.initializers.get('w');
    expect(await w?.read(400, 404)).toEqual(f32(12.5));
    expect(await w?.read()).toEqual(bytes(values));
    expect(file.files.map(({ path, byteLength }) => [path.slice(folder.length + 1), byteLength])).toEqual([
      ['external.onnx', expect.any(Number)],
      ['weights.bin', 4064],
    ]);
    await file.close();
    await expect(w?.read()).rejects.toThrow('closed');
  });

  it('refuses to read on in a file that was replaced', async () => {
    await writeFile(join(folder, 'replaced.bin'), new Uint8Array(4000));
    await writeFile(
      join(folder, 'replaced.onnx'),
      model([
        node('Identity', ['w'], ['y']),
        initializer('w', 1, [1000], ...external({ location: 'replaced.bin' })),
        valueInfo(12, 'y'),
      ]),
    );
    await using file = await openOnnx(join(folder, 'replaced.onnx'));
    await truncate(join(folder, 'replaced.bin'), 3000);
    await expect(file.model.graph.initializers.get('w')?.read()).rejects.toMatchObject({ rule: 'file-changed' });
  });

  it('finds tensors beyond 4 GiB of external data, and refuses a message beyond 2 GiB', async () => {
    const path = join(folder, 'sparse.bin');
    const handle = await open(path, 'w');
    await handle.write(f32(...Array(300).fill(7)), 0, 1200, 5_000_000_000);
    const { blocks } = await handle.stat();
    await handle.close();
    if (blocks * 512 > 1_000_000) {
      console.log('skipped: the file system of the temporary folder has no sparse files');
      return;
    }
    await writeFile(
      join(folder, 'sparse.onnx'),
      model([
        node('Identity', ['w'], ['y']),
        initializer('w', 1, [300], ...external({ location: 'sparse.bin', offset: '5000000000' })),
        valueInfo(12, 'y'),
      ]),
    );
    await using file = await openOnnx(join(folder, 'sparse.onnx'));
    expect(await file.model.graph.initializers.get('w')?.read(1196)).toEqual(f32(7));
    await truncate(join(folder, 'huge.onnx'), 0).catch(() => writeFile(join(folder, 'huge.onnx'), ''));
    await truncate(join(folder, 'huge.onnx'), 2 ** 31);
    await expect(openOnnx(join(folder, 'huge.onnx'))).rejects.toMatchObject({ rule: 'file-too-large' });
  });
});
