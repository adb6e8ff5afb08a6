import { mkdtemp, open, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as ort from 'onnxruntime-node';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { inlineInitializer, lazyInitializer } from '../../../formats/onnx/initializers.ts';
import type { Graph, OnnxModel } from '../../../formats/onnx/model.ts';
import { openOnnx } from '../../../formats/onnx/reader.ts';
import { encodeOnnx, onnxByteLength, writeOnnx } from '../../../formats/onnx/writer.ts';
import { UnsupportedError } from '../../../src/errors.ts';
import * as byHand from './encode-by-hand.ts';
import { floats, graph, model, node, value } from './tiny-models.ts';

const SESSION = { intraOpNumThreads: 1, logSeverityLevel: 3 } as const;

async function run(session: ort.InferenceSession, feeds: Record<string, ort.Tensor>): Promise<number[]> {
  const results = await session.run(feeds);
  await session.release();
  return [...(results['y'].data as Float32Array)];
}

/** y = x W + b, with a bias below the bound for external data and a weight above. */
function linear(): { model: OnnxModel; x: ort.Tensor; y: number[] } {
  const weight = Float32Array.from({ length: 32 * 16 }, (_, i) => (i % 7) - 3);
  const bias = Float32Array.from({ length: 16 }, (_, i) => i / 4);
  const x = Float32Array.from({ length: 64 }, (_, i) => (i % 5) - 2);
  const y = Array.from({ length: 32 }, (_, at) => {
    let sum = bias[at % 16];
    for (let k = 0; k < 32; k++) sum += x[Math.floor(at / 16) * 32 + k] * weight[k * 16 + (at % 16)];
    return sum;
  });
  const main = graph(
    [node('MatMul', ['x', 'W'], ['t']), node('Add', ['t', 'b'], ['y'])],
    [value('x', ['m', 32])],
    [value('y', ['m', 16])],
    [floats('W', [32, 16], weight), floats('b', [16], bias)],
  );
  return { model: model(main), x: new ort.Tensor('float32', x, [2, 32]), y };
}

describe('writing ONNX', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pcomp-onnx-'));
  });
  afterEach(() => rm(folder, { recursive: true }));

  it('writes bytes that an encoder by hand writes too', async () => {
    const { node: n, valueInfo, initializer, lengthField, varintField, f32 } = byHand;
    const main = graph(
      [
        { ...node('Softmax', ['x'], ['s'], { axis: { kind: 'int', value: -1 } }, 'some.where'), name: 'first' },
        { ...node('Add', ['s', 'w'], ['y']), name: '' },
      ],
      [value('x', [2])],
      [value('y', [2])],
      [floats('w', [2], [10, 20])],
    );
    const plain = { ...model(main), producerVersion: '', metadata: new Map([['k', 'v']]) };
    const axis = lengthField(5, [lengthField(1, 'axis'), varintField(3, -1), varintField(20, 2)]);
    const first = lengthField(1, [
      lengthField(1, 'x'),
      lengthField(2, 's'),
      lengthField(3, 'first'),
      lengthField(4, 'Softmax'),
      axis,
      lengthField(7, 'some.where'),
    ]);
    expect(await encodeOnnx(plain)).toEqual(
      byHand.bytesOf(
        varintField(1, 10),
        lengthField(2, 'pcomp'),
        lengthField(7, [
          first,
          n('Add', ['s', 'w'], ['y']),
          lengthField(2, 'g'),
          initializer('w', 1, [2], lengthField(9, f32(10, 20))),
          valueInfo(11, 'x'),
          valueInfo(12, 'y'),
        ]),
        lengthField(8, [varintField(2, 21)]),
        lengthField(8, [lengthField(1, 'com.microsoft'), varintField(2, 1)]),
        lengthField(14, [lengthField(1, 'k'), lengthField(2, 'v')]),
      ),
    );
  });

  it('writes models that onnxruntime runs, in one piece and with external data', async () => {
    const { model: written, x, y } = linear();
    expect(await run(await ort.InferenceSession.create(await encodeOnnx(written), SESSION), { x })).toEqual(y);
    const files = await writeOnnx(written, folder, 'model_q2.onnx');
    expect(files.data.map(({ byteLength }) => byteLength)).toEqual([32 * 16 * 4]);
    expect((await readdir(folder)).sort()).toEqual(['model_q2.onnx', 'model_q2.onnx_data']);
    expect((await readFile(files.model.path)).byteLength).toBe(files.model.byteLength);
    expect(await run(await ort.InferenceSession.create(files.model.path, SESSION), { x })).toEqual(y);
  });

  it('runs on every IR version from 3 on', async () => {
    for (const irVersion of [3, 4, 8, 10, 13]) {
      const { model: written, x, y } = linear();
      const older = { ...written, irVersion, opsets: new Map([['', irVersion < 8 ? 8 : 17]]) };
      const session = await ort.InferenceSession.create(await encodeOnnx(older), SESSION);
      expect(await run(session, { x }), `IR ${irVersion}`).toEqual(y);
    }
  });

  it.each([
    ['U2', [0x93, 0x1b], [3, 0, 1, 2, 3, 2, 1, 0]],
    ['I2', [0x93, 0x1b], [-1, 0, 1, -2, -1, -2, 1, 0]],
    ['U4', [0x5a, 0xf0, 0x21, 0x43], [10, 5, 0, 15, 1, 2, 3, 4]],
    ['I4', [0x5a, 0xf0, 0x21, 0x43], [-6, 5, 0, -1, 1, 2, 3, 4]],
  ] as const)('packs %s as onnxruntime unpacks it, low bits first', async (dtype, packed, expected) => {
    const main = graph(
      [node('DequantizeLinear', ['q', 's'], ['t']), node('Mul', ['t', 'x'], ['y'])],
      [value('x', [])],
      [value('y', [8])],
      [inlineInitializer('q', dtype, [8], Uint8Array.from(packed)), floats('s', [], [1])],
    );
    const session = await ort.InferenceSession.create(await encodeOnnx(model(main, 25, 12)), SESSION);
    const x = new ort.Tensor('float32', Float32Array.of(1), []);
    expect(await run(session, { x })).toEqual(expected);
  });

  it('begins a new data file before one would reach the bound, with zeros between aligned tensors', async () => {
    const sizes = [300, 1000, 2000, 257, 256, 255];
    const tensors = sizes.map((size, i) => floats(`w${i}`, [size], new Float32Array(size).fill(i + 1)));
    const main = graph(
      [
        node(
          'Max',
          tensors.map(({ name }) => name),
          ['y'],
        ),
      ],
      [],
      [value('y', null)],
      tensors,
    );
    const files = await writeOnnx(model(main), folder, 'm.onnx', { maxShardBytes: 5000 });
    const name = (path: string): string => path.slice(folder.length + 1);
    expect(files.data.map(({ path, byteLength }) => [name(path), byteLength])).toEqual([
      ['m.onnx_data', 1200],
      ['m.onnx_data_1', 4000],
      // Alone in its file, because it reaches the bound by itself.
      ['m.onnx_data_2', 8000],
      ['m.onnx_data_3', 1088 + 1024],
    ]);
    const shard = await readFile(files.data[3].path);
    expect(shard.subarray(1028, 1088).every((byte) => byte === 0)).toBe(true);
    const written = [files.model, ...files.data].reduce((sum, { byteLength }) => sum + byteLength, 0);
    expect(await onnxByteLength(model(main), 'm.onnx', { maxShardBytes: 5000 })).toBe(written);
    await using file = await openOnnx(files.model.path);
    expect(file.files.length).toBe(5);
    for (const tensor of tensors)
      expect(await file.model.graph.initializers.get(tensor.name)?.read()).toEqual(await tensor.read());
  });

  it('begins a page with a tensor of a megabyte or more', async () => {
    const bytes = (name: string, size: number) =>
      lazyInitializer({ name, dtype: 'U8', shape: [size] }, async (start, end) => new Uint8Array(end - start).fill(7));
    const tensors = [bytes('small', 1100), bytes('large', 2 ** 20), bytes('last', 2000)];
    const main = graph([node('Identity', ['large'], ['y'])], [], [value('y', [2 ** 20], 'U8')], tensors);
    const { data } = await writeOnnx(model(main), folder, 'm.onnx');
    expect(data.map(({ byteLength }) => byteLength)).toEqual([4096 + 2 ** 20 + 2000]);
    const session = await ort.InferenceSession.create(join(folder, 'm.onnx'), SESSION);
    expect(new Set(await run(session, {}))).toEqual(new Set([7]));
  });

  it('asks for large initializers in pieces of bounded size', async () => {
    const asked: number[] = [];
    const byteLength = 20_000_001;
    const lazy = lazyInitializer({ name: 'w', dtype: 'U8', shape: [byteLength] }, async (start, end) => {
      asked.push(end - start);
      return new Uint8Array(end - start).fill(start & 0xff);
    });
    const files = await writeOnnx(
      model(graph([node('Identity', ['w'], ['y'])], [], [value('y', [byteLength], 'U8')], [lazy])),
      folder,
      'm.onnx',
    );
    expect(Math.max(...asked)).toBeLessThanOrEqual(8 * 1024 * 1024);
    expect(files.data[0].byteLength).toBe(byteLength);
  });

  it('gives the same model the same bytes', async () => {
    const first = await writeOnnx(linear().model, folder, 'a.onnx');
    const bytes = await readFile(first.model.path);
    const data = await readFile(first.data[0].path);
    await writeOnnx(linear().model, folder, 'a.onnx');
    expect(await readFile(first.model.path)).toEqual(bytes);
    expect(await readFile(first.data[0].path)).toEqual(data);
  });

  it('can replace the very files it reads from', async () => {
    const { model: written, x, y } = linear();
    const { model: first } = await writeOnnx(written, folder, 'm.onnx');
    await using file = await openOnnx(first.path);
    await writeOnnx(file.model, folder, 'm.onnx');
    expect(await run(await ort.InferenceSession.create(first.path, SESSION), { x })).toEqual(y);
  });

  it('leaves nothing behind when an initializer fails, gives too few bytes, or the message is too large', async () => {
    const main = (fetch: () => Promise<Uint8Array>): Graph =>
      graph(
        [node('Identity', ['w'], ['y'])],
        [],
        [value('y', [2000])],
        [floats('a', [500], new Float32Array(500)), lazyInitializer({ name: 'w', dtype: 'F32', shape: [2000] }, fetch)],
      );
    await expect(writeOnnx(model(main(() => Promise.reject(new Error('gone')))), folder, 'm.onnx')).rejects.toThrow('gone');
    await expect(writeOnnx(model(main(() => Promise.resolve(new Uint8Array(4)))), folder, 'm.onnx')).rejects.toThrow(
      'gave 4 bytes',
    );
    expect(await readdir(folder)).toEqual([]);
    const absurd = lazyInitializer({ name: 'w', dtype: 'F32', shape: [2 ** 29] }, () =>
      Promise.reject(new Error('must not be read')),
    );
    const whole = encodeOnnx(model(graph([node('Identity', ['w'], ['y'])], [], [value('y', [2 ** 29])], [absurd])));
    await expect(whole).rejects.toBeInstanceOf(UnsupportedError);
    await expect(whole).rejects.toThrow('external data');
  });

  it('says so when the disk is full, and removes what it wrote', async (context) => {
    const full = await open('/dev/full', 'w').catch(() => undefined);
    if (full === undefined) return context.skip('this system has no /dev/full');
    await full.close();
    for (const name of ['.m.onnx_data.partial', '.m.onnx.partial']) {
      await symlink('/dev/full', join(folder, name));
      const failed = writeOnnx(linear().model, folder, 'm.onnx');
      await expect(failed).rejects.toMatchObject({ code: 'DISK_FULL' });
      await expect(failed).rejects.toThrow(/disk is full/);
      expect(await readdir(folder)).toEqual([]);
    }
  });

  it('stores initializers of subgraphs externally too, where onnxruntime finds them', async () => {
    const branch = (name: string, fill: number): Graph =>
      graph(
        [node('Add', ['x', `w_${name}`], [`r_${name}`])],
        [],
        [value(`r_${name}`, [400])],
        [floats(`w_${name}`, [400], new Float32Array(400).fill(fill))],
        name,
      );
    const main = graph(
      [
        node('If', ['c'], ['y'], {
          then_branch: { kind: 'graph', value: branch('then', 1) },
          else_branch: { kind: 'graph', value: branch('else', 2) },
        }),
      ],
      [value('c', [], 'BOOL'), value('x', [400])],
      [value('y', [400])],
    );
    const files = await writeOnnx(model(main), folder, 'm.onnx');
    expect(files.data.map(({ byteLength }) => byteLength)).toEqual([1600 + 1600]);
    const feeds = { c: new ort.Tensor('bool', [false], []), x: new ort.Tensor('float32', new Float32Array(400).fill(10), [400]) };
    for (const source of [files.model.path, await encodeOnnx(model(main))]) {
      const session = await (typeof source === 'string'
        ? ort.InferenceSession.create(source, SESSION)
        : ort.InferenceSession.create(source, SESSION));
      expect((await run(session, feeds))[7]).toBe(12);
    }
    await using file = await openOnnx(files.model.path);
    const inner = file.model.graph.nodes[0].attributes['else_branch'];
    expect(inner.kind === 'graph' && (await inner.value.initializers.get('w_else')?.read(0, 4))).toEqual(byHand.f32(2));
  });

  it('writes more than 4 GB that onnxruntime loads by path without holding them', async (context) => {
    // A sparse data file: only the last row is really there.
    const rows = 1_100_000;
    const path = join(folder, 'm.onnx_data');
    const handle = await open(path, 'w');
    await handle.write(byHand.f32(...Array(1000).fill(5)), 0, 4000, (rows - 1) * 4000);
    const { blocks } = await handle.stat();
    await handle.close();
    if (blocks * 512 > 1_000_000) return context.skip('the file system of the temporary folder has no sparse files');
    const { lengthField, varintField, valueInfo, initializer, external, tensorType } = byHand;
    const axis = lengthField(5, [lengthField(1, 'axis'), varintField(3, 0), varintField(20, 2)]);
    await writeFile(
      join(folder, 'm.onnx'),
      byHand.model([
        byHand.node('Gather', ['table', 'x'], ['y'], axis),
        lengthField(2, 'g'),
        initializer('table', 1, [rows, 1000], ...external({ location: 'm.onnx_data', offset: '0', length: String(rows * 4000) })),
        valueInfo(11, 'x', tensorType(7, [1])),
        valueInfo(12, 'y', tensorType(1, [1, 1000])),
      ]),
    );
    const before = process.memoryUsage().rss;
    await using file = await openOnnx(join(folder, 'm.onnx'));
    expect((await file.model.graph.initializers.get('table')?.read((rows - 1) * 4000))?.subarray(0, 4)).toEqual(byHand.f32(5));
    const session = await ort.InferenceSession.create(file.path, { ...SESSION, extra: { session: { disable_prepacking: '1' } } });
    const result = await run(session, { x: new ort.Tensor('int64', BigInt64Array.of(BigInt(rows - 1)), [1]) });
    expect(result.every((each) => each === 5)).toBe(true);
    expect(process.memoryUsage().rss - before).toBeLessThan(500e6);
  });
});
