/** Arrays kept in the memory of a WebGPU device between runs: of onnxruntime-node's providers only that one can be fed what it made. */
import type { InferenceSession, Tensor as OrtTensor } from 'onnxruntime-node';
import { encodeOnnx } from '../../formats/onnx/writer.ts';
import type { NdArray, ResidentArray } from './engine.ts';
import { literalGraph } from './literal-graph.ts';
import type { Ort } from './ort-runtime.ts';
import { toOrtTensor } from './ort-tensors.ts';

/** An F32 array with a copy on the device. */
export class OrtResidentArray implements ResidentArray {
  readonly dtype: NdArray['dtype'];
  readonly shape: NdArray['shape'];
  readonly data: NdArray['data'];
  /** Never to be read back: `getData` of a tensor on the device ends the process (onnxruntime-node 1.30). */
  readonly tensor: OrtTensor;

  constructor({ dtype, shape, data }: NdArray, tensor: OrtTensor) {
    this.dtype = dtype;
    this.shape = shape;
    this.data = data;
    this.tensor = tensor;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.tensor.dispose();
  }
}

/** Copies arrays to the device by an Identity whose output stays there. */
export class OrtUploader implements AsyncDisposable {
  readonly #ort: Ort;
  /** By rank. */
  readonly #sessions = new Map<number, Promise<InferenceSession>>();

  constructor(ort: Ort) {
    this.#ort = ort;
  }

  async upload(array: NdArray): Promise<ResidentArray> {
    if (array.dtype !== 'F32') throw new Error(`an array of ${array.dtype} cannot stay on the device: F32 can`);
    const rank = array.shape.length;
    let session = this.#sessions.get(rank);
    if (session === undefined) {
      session = this.#open(rank);
      this.#sessions.set(rank, session);
    }
    const { y } = await (await session).run({ x: toOrtTensor(this.#ort, array, 'an uploaded array') });
    return new OrtResidentArray(array, y);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const session of await Promise.allSettled(this.#sessions.values())) {
      if (session.status === 'fulfilled') await session.value.release();
    }
  }

  async #open(rank: number): Promise<InferenceSession> {
    const x = ['F32', ...Array.from({ length: rank }, (_, i) => `d${i}`)] as const;
    const nodes = [{ op: 'Identity', inputs: ['x'], output: 'y' }];
    const graph = literalGraph('upload', { inputs: { x }, outputs: { y: x }, nodes });
    const options: InferenceSession.SessionOptions = { executionProviders: ['webgpu'], preferredOutputLocation: 'gpu-buffer' };
    return this.#ort.InferenceSession.create(await encodeOnnx(graph), options);
  }
}
