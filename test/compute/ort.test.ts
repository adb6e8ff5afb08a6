import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, type TestContext } from 'vitest';
import { encodeOnnx } from '../../formats/onnx/writer.ts';
import type { DType } from '../../formats/tensor.ts';
import type { Device, Engine, NdArray, TypedArray } from '../../src/compute/engine.ts';
import { type LiteralNode, literalGraph } from '../../src/compute/literal-graph.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { EnvironmentError, FormatError, UnsupportedError } from '../../src/errors.ts';

const array = (dtype: DType, shape: readonly number[], data: TypedArray): NdArray => ({ dtype, shape, data });
const f32 = (shape: readonly number[], ...data: number[]): NdArray => array('F32', shape, Float32Array.from(data));

const MATMUL = literalGraph('product', {
  inputs: { a: ['F32', 'm', 'k'], b: ['F32', 'k', 'n'] },
  outputs: { y: ['F32', 'm', 'n'] },
  nodes: [{ op: 'MatMul', inputs: ['a', 'b'], output: 'y' }],
});
const ADD_AND_DOUBLE = literalGraph('sum and double', {
  inputs: { a: ['F32', 'n'], b: ['F32', 'n'] },
  outputs: { sum: ['F32', 'n'], double: ['F32', 'n'] },
  nodes: [
    { op: 'Add', inputs: ['a', 'b'], output: 'sum' },
    { op: 'Add', inputs: ['a', 'a'], output: 'double' },
  ],
});

const oneNode = (dtype: DType, node: Omit<LiteralNode, 'output'>) =>
  literalGraph(`one ${node.op}`, {
    inputs: { x: [dtype, 'n'] },
    outputs: { y: [dtype, 'n'] },
    nodes: [{ ...node, output: 'y' }],
  });

let engine: Engine;
let folder: string;
beforeAll(async () => {
  engine = await createEngine({ threads: 2 });
  folder = await mkdtemp(join(tmpdir(), 'pcomp-ort-'));
});
afterAll(async () => {
  await engine[Symbol.asyncDispose]();
  await rm(folder, { recursive: true });
});

describe('an engine on the CPU', () => {
  it('tells its device, threads and runtime', () => {
    expect(engine).toMatchObject({ name: 'ort', device: 'cpu', threads: 2 });
    expect(engine.runtime).toMatch(/^onnxruntime-node \d+\.\d+\.\d+/);
  });

  it('runs a graph with symbolic dimensions on inputs of several sizes', async () => {
    await using program = await engine.compile(MATMUL);
    expect(program.inputNames).toEqual(['a', 'b']);
    expect(program.outputNames).toEqual(['y']);
    const once = await program.run({ a: f32([1, 2], 2, 3), b: f32([2, 1], 5, 7) });
    expect(once['y']).toEqual(f32([1, 1], 31));
    const twice = await program.run({ a: f32([2, 1], 2, 3), b: f32([1, 2], 5, 7) });
    expect(twice['y']).toEqual(f32([2, 2], 10, 14, 15, 21));
  });

  it('reads views in place and sees what was changed between runs', async () => {
    await using program = await engine.compile(MATMUL);
    const memory = Float32Array.of(9, 9, 2, 3, 9);
    const a = array('F32', [1, 2], memory.subarray(2, 4));
    expect((await program.run({ a, b: f32([2, 1], 5, 7) }))['y'].data[0]).toBe(31);
    memory[2] = 4;
    expect((await program.run({ a, b: f32([2, 1], 5, 7) }))['y'].data[0]).toBe(41);
  });

  it('writes an output into a view and leaves its neighbours alone', async () => {
    await using program = await engine.compile(MATMUL);
    const memory = new Float32Array(5).fill(-1);
    const y = array('F32', [1, 2], memory.subarray(2, 4));
    const results = await program.run({ a: f32([1, 1], 3), b: f32([1, 2], 5, 7) }, { into: { y } });
    expect(results['y']).toBe(y);
    expect(memory).toEqual(Float32Array.of(-1, -1, 15, 21, -1));
  });

  it('accumulates when an output is the memory of an addend', async () => {
    await using program = await engine.compile(ADD_AND_DOUBLE);
    const sum = f32([2], 1, 2);
    for (let i = 0; i < 3; i++) {
      const results = await program.run({ a: f32([2], 10, 20), b: sum }, { outputs: ['sum'], into: { sum } });
      expect(Object.keys(results)).toEqual(['sum']);
    }
    expect(sum.data).toEqual(Float32Array.of(31, 62));
  });

  it('mixes outputs into given memory with allocated ones', async () => {
    await using program = await engine.compile(ADD_AND_DOUBLE);
    const sum = f32([1], 0);
    const results = await program.run({ a: f32([1], 1), b: f32([1], 2) }, { into: { sum } });
    expect(sum.data[0]).toBe(3);
    expect(results['double'].data[0]).toBe(2);
  });

  it.each([
    ['F64', new Float64Array([0.1, -2])],
    ['F16', new Uint16Array([0x3c00, 0xc000])],
    ['I64', new BigInt64Array([2n ** 60n, -1n])],
    ['I32', new Int32Array([7, -7])],
    ['I8', new Int8Array([7, -7])],
    ['U8', new Uint8Array([7, 250])],
    ['U16', new Uint16Array([7, 65000])],
    ['BOOL', new Uint8Array([1, 0])],
  ] as const)('takes and gives %s bit for bit', async (dtype, data) => {
    await using program = await engine.compile(oneNode(dtype, { op: 'Identity', inputs: ['x'] }));
    const { y } = await program.run({ x: array(dtype, [2], data) });
    expect(y.dtype).toBe(dtype);
    expect(y.data).toEqual(data);
  });

  it('computes with the bits of half floats', async () => {
    await using program = await engine.compile(oneNode('F16', { op: 'Neg', inputs: ['x'] }));
    const { y } = await program.run({ x: array('F16', [2], Uint16Array.of(0x3c00, 0xc000)) });
    expect(y.data).toEqual(Uint16Array.of(0xbc00, 0x4000));
  });

  it('takes and gives empty tensors', async () => {
    await using program = await engine.compile(oneNode('F32', { op: 'Neg', inputs: ['x'] }));
    expect((await program.run({ x: f32([0]) }))['y']).toEqual(f32([0]));
  });

  it('names the graph and the value in errors about feeds', async () => {
    await using program = await engine.compile(MATMUL);
    const a = f32([1, 1], 1);
    await expect(program.run({ a })).rejects.toThrow('graph "product": input "b" is missing');
    await expect(program.run({ a, b: array('F32', [2, 1], Float32Array.of(1)) })).rejects.toThrow(
      'shape (2, 1), 2 elements, but holds 1',
    );
    await expect(program.run({ a, b: array('F64', [1, 1], Float64Array.of(1)) })).rejects.toThrow(
      'graph "product": Unexpected input data',
    );
    const shared = new Float32Array(new SharedArrayBuffer(4));
    await expect(program.run({ a, b: array('F32', [1, 1], shared) })).rejects.toThrow('input "b" is in shared memory');
    await expect(program.run({ a, b: array('BF16', [1, 1], Uint16Array.of(1)) })).rejects.toBeInstanceOf(UnsupportedError);
  });

  it('refuses preallocated memory of the wrong shape and what it does not know', async () => {
    await using program = await engine.compile(MATMUL);
    const y = f32([1, 2], 0, 0);
    const run = program.run({ a: f32([1, 1], 1), b: f32([1, 1], 1) }, { into: { y } });
    await expect(run).rejects.toThrow(/graph "product": .*shape/);
    await expect(engine.compile(oneNode('F32', { op: 'Foo', inputs: ['x'] }))).rejects.toBeInstanceOf(UnsupportedError);
    await expect(engine.compile(oneNode('BF16', { op: 'Identity', inputs: ['x'] }))).rejects.toBeInstanceOf(UnsupportedError);
  });

  it('refuses newer opsets and IR versions than the runtime knows', async () => {
    await expect(engine.compile({ ...MATMUL, opsets: new Map([['', 99]]) })).rejects.toBeInstanceOf(UnsupportedError);
    await expect(engine.compile({ ...MATMUL, irVersion: 99 })).rejects.toBeInstanceOf(UnsupportedError);
  });

  it('opens a model by its path', async () => {
    const path = join(folder, 'product.onnx');
    await writeFile(path, await encodeOnnx(MATMUL));
    await using program = await engine.open(path, { memoryArena: false, optimization: 'disabled' });
    expect((await program.run({ a: f32([1, 1], 3), b: f32([1, 1], 4) }))['y'].data[0]).toBe(12);
  });

  it('tells a missing model from a malformed one', async () => {
    await expect(engine.open(join(folder, 'absent.onnx'))).rejects.toMatchObject({ code: 'FILE_UNREADABLE' });
    const garbage = join(folder, 'garbage.onnx');
    await writeFile(garbage, 'this is no protobuf at all');
    await expect(engine.open(garbage)).rejects.toBeInstanceOf(FormatError);
  });

  it('stands still while a program runs: progress is shown between runs, not during one', async () => {
    await using program = await engine.compile(MATMUL);
    const size = 1400;
    const a = array('F32', [size, size], new Float32Array(size * size).fill(1));
    await program.run({ a, b: a });
    let ticks = 0;
    const timer = setInterval(() => ticks++, 1);
    await program.run({ a, b: a });
    clearInterval(timer);
    // Tens of milliseconds of arithmetic inside one setImmediate callback: a timer fires before it and after it at most.
    expect(ticks).toBeLessThanOrEqual(2);
  });
});

describe('programs and their release', () => {
  it('shares a program by its key, across sizes, and keeps it when one user is through', async () => {
    await using own = await createEngine({ threads: 1 });
    const first = await own.compile(MATMUL, { key: 'product' });
    expect(await own.compile(MATMUL, { key: 'product' })).toBe(first);
    expect(await own.compile(MATMUL, { key: 'product', optimization: 'disabled' })).not.toBe(first);
    expect(await own.compile(MATMUL)).not.toBe(first);
    await first[Symbol.asyncDispose]();
    expect((await first.run({ a: f32([1, 1], 3), b: f32([1, 1], 4) }))['y'].data[0]).toBe(12);
  });

  it('forgets a graph that did not compile, so that the next attempt is a new one', async () => {
    await using own = await createEngine({ threads: 1 });
    await expect(own.compile(oneNode('F32', { op: 'Foo', inputs: ['x'] }), { key: 'k' })).rejects.toThrow();
    await expect(own.compile(MATMUL, { key: 'k' })).resolves.toBeDefined();
  });

  it('releases a program of its own when it is disposed, twice without harm', async () => {
    const program = await engine.compile(MATMUL);
    await program[Symbol.asyncDispose]();
    await program[Symbol.asyncDispose]();
    await expect(program.run({ a: f32([1, 1], 1), b: f32([1, 1], 1) })).rejects.toThrow(
      'graph "product": the program was released',
    );
  });

  it('releases everything with the engine, and compiles nothing afterwards', async () => {
    const own = await createEngine({ threads: 1 });
    const programs = [await own.compile(MATMUL), await own.compile(MATMUL, { key: 'k' })];
    await own[Symbol.asyncDispose]();
    for (const program of programs) {
      await expect(program.run({ a: f32([1, 1], 1), b: f32([1, 1], 1) })).rejects.toThrow('released');
    }
    await expect(own.compile(MATMUL)).rejects.toThrow('the engine was disposed');
  });
});

/** An engine on a device this machine may lack: then the test is skipped, and the reason printed. */
async function engineOn(device: Device, context: TestContext, strictDevice = false): Promise<Engine> {
  try {
    return await createEngine({ device, strictDevice });
  } catch (error) {
    if (!(error instanceof EnvironmentError) || error.code !== 'DEVICE_UNAVAILABLE') throw error;
    console.warn(`skipped: ${error.message}`);
    return context.skip(error.message);
  }
}

describe('other devices', () => {
  it('a device that exists on no such platform is DEVICE_UNAVAILABLE, with what to do', async () => {
    const absent = process.platform === 'win32' ? 'coreml' : 'dml';
    const notes: string[] = [];
    await expect(createEngine({ device: absent })).rejects.toMatchObject({
      code: 'DEVICE_UNAVAILABLE',
      message: expect.stringMatching(new RegExp(`^${absent} is not available: .*backend not found.*--device cpu`)),
    });
    await using fallen = await createEngine({ device: absent, allowFallback: true, onNote: (note) => notes.push(note) });
    expect(fallen.device).toBe('cpu');
    expect(notes).toHaveLength(1);
  });

  it('cuda either computes or is DEVICE_UNAVAILABLE, naming the provider; the process stays usable', async () => {
    const result = await createEngine({ device: 'cuda' }).catch((error: unknown) => error);
    if (result instanceof Error) {
      expect(result).toMatchObject({ code: 'DEVICE_UNAVAILABLE' });
      expect(result.message).toMatch(/^cuda is not available: [^\n]+$/);
    } else {
      await (result as Engine)[Symbol.asyncDispose]();
    }
    await using program = await engine.compile(MATMUL);
    expect((await program.run({ a: f32([1, 1], 3), b: f32([1, 1], 4) }))['y'].data[0]).toBe(12);
  });

  it('auto ends on a device that computes', async () => {
    const notes: string[] = [];
    await using own = await createEngine({ device: 'auto', threads: 1, onNote: (note) => notes.push(note) });
    if (own.device !== 'cuda') expect(notes.join('\n')).toContain('cuda is not available');
    await using program = await own.compile(MATMUL);
    expect((await program.run({ a: f32([1, 1], 3), b: f32([1, 1], 4) }))['y'].data[0]).toBe(12);
  });

  it('webgpu multiplies, and in strict mode leaves nothing to the CPU', async (context) => {
    await using own = await engineOn('webgpu', context, true);
    await using program = await own.compile(MATMUL);
    const y = f32([2, 2], 0, 0, 0, 0);
    await program.run({ a: f32([2, 1], 2, 3), b: f32([1, 2], 5, 7) }, { into: { y } });
    expect(y.data).toEqual(Float32Array.of(10, 14, 15, 21));
    await expect(own.compile(oneNode('F32', { op: 'Round', inputs: ['x'] }))).rejects.toMatchObject({
      code: 'DEVICE_UNAVAILABLE',
    });
    expect((await own.doublePrecision?.())?.device).toBe('cpu');
  });
});
