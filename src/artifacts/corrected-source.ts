/** A checkpoint's tensors with the biases that a run corrected, or whose layer has its rows in another order: what writers copy unquantized tensors from. */
import { fromFloat32 } from '../../formats/dtype.ts';
import type { Tensor, TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { takeRows } from './folds.ts';
import type { QuantizedSource } from './quantized-source.ts';

export class CorrectedSource implements TensorSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: TensorSource['files'];
  readonly #source: TensorSource;
  /** Bytes by tensor name. */
  readonly #biases: ReadonlyMap<string, Uint8Array>;

  private constructor(source: TensorSource, biases: ReadonlyMap<string, Uint8Array>) {
    this.path = source.path;
    this.tensors = source.tensors;
    this.metadata = source.metadata;
    this.files = source.files;
    this.#source = source;
    this.#biases = biases;
  }

  /**
   * Takes the biases of the modules named, in the dtype the checkpoint has them in. A module without a bias there may not bring one: a plain Error.
   * @param orders of rows, by module: those of `quantized`
   */
  static async create(
    source: TensorSource,
    quantized: QuantizedSource,
    names: Iterable<string>,
    orders: ReadonlyMap<string, Uint32Array> = new Map(),
  ): Promise<CorrectedSource> {
    const biases = new Map<string, Uint8Array>();
    for (const module of names) {
      if (!quantized.has(module)) continue;
      const { bias, outFeatures } = await quantized.readGrid(module);
      const name = `${module}.bias`;
      const info = source.tensors.get(name);
      const order = orders.get(module);
      if (!bias && order && info)
        biases.set(name, takeRows((await source.read(name)).data, order, info.byteLength / order.length));
      if (!bias) continue;
      const dtype = info?.dtype;
      if ((dtype !== 'F32' && dtype !== 'F16' && dtype !== 'BF16') || bias.length !== outFeatures) {
        throw new Error(
          `${source.path}: a bias of ${bias.length} values was made for "${name}", which is ${dtype ?? 'not there'}. This is a bug in pcomp.`,
        );
      }
      biases.set(name, fromFloat32(dtype, bias));
    }
    return new CorrectedSource(source, biases);
  }

  async read(name: string): Promise<Tensor> {
    const bytes = this.#biases.get(name);
    return bytes ? { ...this.tensors.get(name)!, data: bytes } : this.#source.read(name);
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const bytes = this.#biases.get(name);
    if (!bytes) return this.#source.readRows(name, start, end);
    const info = this.tensors.get(name)!;
    const elementBytes = info.byteLength / info.shape[0];
    const data = bytes.subarray(start * elementBytes, end * elementBytes);
    return { ...info, shape: [end - start], byteLength: data.byteLength, data };
  }

  async close(): Promise<void> {
    await this.#source.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
