/** A TensorSource whose tensors live in memory, for tests that need no file. */
import { byteLengthOf, toFloat32 } from '../../formats/dtype.ts';
import type { DType, Tensor, TensorSource } from '../../formats/tensor.ts';

export class MemorySource implements TensorSource {
  readonly path = 'memory.safetensors';
  readonly tensors = new Map<string, Tensor>();
  readonly metadata: ReadonlyMap<string, string> = new Map();
  readonly files: TensorSource['files'] = [];

  /** Adds a tensor; `data` are its little-endian bytes. */
  add(name: string, dtype: DType, shape: readonly number[], data: Uint8Array): void {
    this.tensors.set(name, { name, dtype, shape, byteLength: byteLengthOf(dtype, shape), data });
  }

  async read(name: string): Promise<Tensor> {
    const tensor = this.tensors.get(name);
    if (!tensor) throw new Error(`no tensor ${name}`);
    return tensor;
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const { dtype, shape, data, byteLength } = await this.read(name);
    const rowBytes = byteLength / shape[0];
    const bytes = data.subarray(start * rowBytes, end * rowBytes);
    return { name, dtype, shape: [end - start, ...shape.slice(1)], byteLength: bytes.byteLength, data: bytes };
  }

  /** Values of a tensor as float32, or undefined. */
  values(name: string): Float32Array | undefined {
    const tensor = this.tensors.get(name);
    return tensor && toFloat32(tensor.dtype, tensor.data);
  }

  async close(): Promise<void> {}

  async [Symbol.asyncDispose](): Promise<void> {}
}
