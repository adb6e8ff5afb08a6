/** Layers of several checkpoints, one after the other, as if they were one checkpoint: nothing is copied, names are renumbered. */

import type { FilePlace, PlacedSource } from '../../../formats/safetensors/reader.ts';
import type { Tensor, TensorInfo } from '../../../formats/tensor.ts';
import { FormatError } from '../../errors.ts';

/** Consecutive layers [start, end) of one checkpoint. */
export interface LayerRange {
  readonly source: PlacedSource;
  readonly start: number;
  readonly end: number;
}

/** Where a layer's number stands in a tensor's name. */
const LAYER = /^((?:.*\.)?(?:layers|h|blocks?)\.)(\d+)(\..*)$/;
const BEFORE = /(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|embed_positions|tok_embeddings|shared)\./;

/** The layer a tensor belongs to; undefined outside the layers. */
export function layerOf(name: string): number | undefined {
  const match = LAYER.exec(name);
  return match ? Number(match[2]) : undefined;
}

/** Layers that a checkpoint has. */
export function layerCountOf(source: PlacedSource): number {
  return [...source.tensors.keys()].reduce((count, name) => Math.max(count, (layerOf(name) ?? -1) + 1), 0);
}

/**
 * Embeddings come from the first range's checkpoint, everything else outside the layers from the last one's. The sources stay the caller's to close.
 */
export class StackedSource implements PlacedSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: PlacedSource['files'];
  readonly #origins = new Map<string, { readonly source: PlacedSource; readonly name: string }>();

  constructor(ranges: readonly LayerRange[]) {
    const [first, last] = [ranges[0].source, ranges.at(-1)!.source];
    const tensors = new Map<string, TensorInfo>();
    const add = (source: PlacedSource, own: TensorInfo, name: string): void => {
      tensors.set(name, { ...own, name });
      this.#origins.set(name, { source, name: own.name });
    };
    for (const [name, info] of first.tensors) if (layerOf(name) === undefined && BEFORE.test(name)) add(first, info, name);
    let from = 0;
    for (const { source, start, end } of ranges) {
      for (const [name, info] of source.tensors) {
        const layer = layerOf(name);
        if (layer === undefined || layer < start || layer >= end) continue;
        const [, before, , after] = LAYER.exec(name)!;
        add(source, info, `${before}${from + layer - start}${after}`);
      }
      from += end - start;
    }
    for (const [name, info] of last.tensors) if (layerOf(name) === undefined && !BEFORE.test(name)) add(last, info, name);
    this.path = first.path;
    this.tensors = tensors;
    this.metadata = first.metadata;
    this.files = [...new Map(ranges.flatMap(({ source }) => source.files.map((file) => [file.path, file]))).values()];
  }

  /** The checkpoint's own name of a tensor. */
  ownName(name: string): string {
    return this.#origin(name).name;
  }

  placeOf(name: string): FilePlace {
    const { source, name: own } = this.#origin(name);
    return source.placeOf(own);
  }

  async read(name: string): Promise<Tensor> {
    const { source, name: own } = this.#origin(name);
    return { ...(await source.read(own)), name };
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const { source, name: own } = this.#origin(name);
    return { ...(await source.readRows(own, start, end)), name };
  }

  async close(): Promise<void> {}

  async [Symbol.asyncDispose](): Promise<void> {}

  #origin(name: string) {
    const origin = this.#origins.get(name);
    if (!origin)
      throw new FormatError(this.path, 'tensor-missing', `there is no tensor "${name}" among the layers that were asked for`);
    return origin;
  }
}
