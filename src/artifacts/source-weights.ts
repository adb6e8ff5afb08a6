/** Float32 weights out of a source of tensors, whether stored as floats or quantized. */
import { toFloat32 } from '../../formats/dtype.ts';
import type { Tensor, TensorInfo, TensorSource } from '../../formats/tensor.ts';
import type { RoutedShape } from '../graph/routed-branch.ts';
import type { LinearSite, WeightReader } from '../model/model.ts';
import { DecodedSource } from './decoded-source.ts';
import { transpose } from './transpose.ts';

/** Where a file says which layers have experts: JSON, a RoutedShape by module. Their tensors are `<module>.router` and so on (routed-branch.ts). */
export const EXPERTS_METADATA = 'pcomp.experts';

export class SourceWeights implements WeightReader {
  readonly #source: TensorSource;
  readonly #experts: Readonly<Record<string, RoutedShape>>;

  constructor(source: TensorSource) {
    this.#source = source;
    this.#experts = JSON.parse(source.metadata.get(EXPERTS_METADATA) ?? '{}') as Record<string, RoutedShape>;
  }

  routed({ name }: LinearSite): RoutedShape | undefined {
    return this.#experts[name];
  }

  info(name: string): TensorInfo | undefined {
    return this.#source.tensors.get(name);
  }

  async load(name: string): Promise<Float32Array> {
    return floats(await this.#source.read(name));
  }

  async loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    return floats(await this.#source.readRows(name, start, end));
  }

  async loadSite(site: LinearSite): Promise<Float32Array> {
    if (this.#source instanceof DecodedSource && this.#source.moduleOf(`${site.name}.weight`) !== undefined) {
      return this.#source.decode(site.name);
    }
    const weight = await this.load(`${site.name}.weight`);
    return site.transposed ? transpose(weight, site.inFeatures, site.outFeatures) : weight;
  }
}

function floats({ dtype, data }: Tensor): Float32Array {
  return toFloat32(dtype, data);
}
