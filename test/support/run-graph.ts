/** Runs a graph held in memory in onnxruntime, one thread, as it is: what a test needs of an engine and no more. */
import * as ort from 'onnxruntime-node';
import type { OnnxModel } from '../../formats/onnx/model.ts';
import { encodeOnnx } from '../../formats/onnx/writer.ts';
import type { NdArray } from '../../src/compute/engine.ts';

export interface OpenGraph {
  readonly inputNames: readonly string[];
  run(feeds: Readonly<Record<string, NdArray>>): Promise<Record<string, NdArray>>;
  release(): Promise<void>;
}

const TYPES = { F32: 'float32', F64: 'float64', I32: 'int32', I64: 'int64', BOOL: 'bool', U8: 'uint8' } as const;
const DTYPES = Object.fromEntries(Object.entries(TYPES).map(([dtype, type]) => [type, dtype])) as Record<
  string,
  keyof typeof TYPES
>;

export async function openGraph(model: OnnxModel): Promise<OpenGraph> {
  const session = await ort.InferenceSession.create(await encodeOnnx(model), { intraOpNumThreads: 1, logSeverityLevel: 3 });
  return {
    inputNames: session.inputNames,
    async run(feeds) {
      const tensors = Object.entries(feeds).map(([name, { dtype, data, shape }]) => {
        return [name, new ort.Tensor(TYPES[dtype as keyof typeof TYPES], data as Float32Array, [...shape])] as const;
      });
      const results = await session.run(Object.fromEntries(tensors));
      return Object.fromEntries(
        Object.entries(results).map(([name, { dims, type, data }]) => {
          return [name, { dtype: DTYPES[type], shape: dims, data: data as Float32Array }];
        }),
      );
    },
    release: () => session.release(),
  };
}

export function f32(shape: readonly number[], data: ArrayLike<number>): NdArray {
  return { dtype: 'F32', shape, data: Float32Array.from(data) };
}

export function i32(shape: readonly number[], data: readonly number[]): NdArray {
  return { dtype: 'I32', shape, data: Int32Array.from(data) };
}

export function i64(shape: readonly number[], data: readonly number[]): NdArray {
  return { dtype: 'I64', shape, data: BigInt64Array.from(data, BigInt) };
}
