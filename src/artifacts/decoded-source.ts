/** An artifact's tensors as the original checkpoint had them: quantized modules appear as float32 `<module>.weight`, decoded when read; folds are undone. */
import type { Tensor, TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { type ColumnFold, inverseOf, rowOrders, takeRows, unfolded } from './folds.ts';
import type { StoredModules } from './stored-modules.ts';
import { asBytes } from './tensor-bytes.ts';
import { transpose } from './transpose.ts';

export class DecodedSource implements TensorSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: TensorSource['files'];
  readonly #stored: TensorSource;
  readonly #modules: StoredModules;
  /** Biases whose values lie in another order, by tensor name. */
  readonly #biasOrders: ReadonlyMap<string, Uint32Array>;
  /** Rows of an embedding are read a few at a time: the last decoded weight is kept. */
  #last: { readonly name: string; readonly data: Promise<Float32Array> } | undefined;

  constructor(stored: TensorSource, modules: StoredModules, folds: readonly ColumnFold[] = []) {
    this.path = stored.path;
    this.metadata = stored.metadata;
    this.files = stored.files;
    this.#stored = stored;
    this.#modules = unfolded(modules, folds);
    this.#biasOrders = new Map([...rowOrders(folds)].map(([name, order]) => [`${name}.bias`, inverseOf(order)]));
    const tensors = new Map([...stored.tensors].filter(([name]) => !modules.owns(name)));
    for (const [module, { outFeatures, inFeatures, transposed }] of modules.modules) {
      const shape = transposed ? [inFeatures, outFeatures] : [outFeatures, inFeatures];
      const name = `${module}.weight`;
      tensors.set(name, { name, dtype: 'F32', shape, byteLength: outFeatures * inFeatures * 4 });
    }
    this.tensors = tensors;
  }

  /** The module whose weight a tensor name stands for, if that is quantized. */
  moduleOf(tensor: string): string | undefined {
    const module = tensor.endsWith('.weight') ? tensor.slice(0, -'.weight'.length) : '';
    return this.#modules.modules.has(module) ? module : undefined;
  }

  /** W (outFeatures, inFeatures) of a quantized module, whatever layout the checkpoint had. The caller may keep it. */
  decode(module: string): Promise<Float32Array> {
    return this.#modules.decode(module);
  }

  async read(name: string): Promise<Tensor> {
    const module = this.moduleOf(name);
    if (module === undefined) return this.#readStored(name);
    return { ...this.tensors.get(name)!, data: asBytes(await this.#weight(module)) };
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const module = this.moduleOf(name);
    if (module === undefined && !this.#biasOrders.has(name)) return this.#stored.readRows(name, start, end);
    if (module === undefined) {
      const { data, shape, byteLength, ...rest } = await this.#readStored(name);
      const width = byteLength / shape[0];
      const rows = data.subarray(start * width, end * width);
      return { ...rest, shape: [end - start], byteLength: rows.byteLength, data: rows };
    }
    const [, columns] = this.tensors.get(name)!.shape;
    const data = asBytes((await this.#weight(module)).subarray(start * columns, end * columns));
    return { name, dtype: 'F32', shape: [end - start, columns], byteLength: data.byteLength, data };
  }

  async #readStored(name: string): Promise<Tensor> {
    const tensor = await this.#stored.read(name);
    const order = this.#biasOrders.get(name);
    return order ? { ...tensor, data: takeRows(tensor.data, order, tensor.byteLength / order.length) } : tensor;
  }

  /** In the checkpoint's own layout. */
  #weight(module: string): Promise<Float32Array> {
    if (this.#last?.name !== module) this.#last = { name: module, data: this.#decodeAsStored(module) };
    return this.#last.data;
  }

  async #decodeAsStored(module: string): Promise<Float32Array> {
    const weight = await this.#modules.decode(module);
    const { outFeatures, inFeatures, transposed } = this.#modules.modules.get(module)!;
    return transposed ? transpose(weight, outFeatures, inFeatures) : weight;
  }

  async close(): Promise<void> {
    await this.#stored.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
