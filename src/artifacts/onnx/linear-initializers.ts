/** The constants of quantized linears in an ONNX graph: named as onnxruntime-genai names them, packed when the writer asks for their bytes. */
import type { Initializer } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import type { QuantizedSource } from '../quantized-source.ts';
import { asBytes } from '../tensor-bytes.ts';
import { layOutLinear, type OnnxLinearLayout, type OnnxPart, packMeans, packPart, partRowBytes } from './linear-layout.ts';

/** Names of a part's constants; `suffix` is empty for a uniform layer, else `_<operand bits>`. */
export function partNames(site: string, layout: Pick<OnnxLinearLayout, 'parts'>, part: Pick<OnnxPart, 'bits'>) {
  const prefix = `${site}.MatMulNBits`;
  const suffix = layout.parts.length > 1 ? `_${part.bits}` : '';
  return { qweight: `${prefix}.qweight${suffix}`, scales: `${prefix}.scales${suffix}`, qzeros: `${prefix}.qzeros${suffix}` };
}

/** Constants of one linear. */
export interface LinearInitializers {
  readonly parts: readonly { readonly qweight: Initializer; readonly scales: Initializer; readonly qzeros: Initializer }[];
  /** (meanGroups, outFeatures); absent when no group has a mean. */
  readonly means?: Initializer;
  /** I32 (inFeatures): stored column k reads input `inputOrder[k]`. */
  readonly inputOrder?: Initializer;
}

/** Lays out every linear of a source and hands out its constants. Holds the packed bytes of one linear at a time. */
export class QuantizedInitializers {
  readonly #source: QuantizedSource;
  readonly #layouts: ReadonlyMap<string, OnnxLinearLayout>;
  #packed: { readonly site: string; readonly tensors: Promise<ReadonlyMap<string, Uint8Array>> } | undefined;

  private constructor(source: QuantizedSource, layouts: ReadonlyMap<string, OnnxLinearLayout>) {
    this.#source = source;
    this.#layouts = layouts;
  }

  /** Reads the grids of the modules named, and lays them out. */
  static async create(source: QuantizedSource, names: Iterable<string>): Promise<QuantizedInitializers> {
    const layouts = new Map<string, OnnxLinearLayout>();
    for (const name of names) {
      if (source.has(name)) layouts.set(name, layOutLinear(await source.readGrid(name)));
    }
    return new QuantizedInitializers(source, layouts);
  }

  get layouts(): ReadonlyMap<string, OnnxLinearLayout> {
    return this.#layouts;
  }

  /** The constants of a linear that has a layout. */
  of(site: string): LinearInitializers {
    const layout = this.#layouts.get(site)!;
    const { outFeatures: rows, blockSize, meanGroups } = layout;
    const parts = layout.parts.map((part) => {
      const names = partNames(site, layout, part);
      const blocks = part.groups.length;
      const bytes = partRowBytes(part, blockSize);
      return {
        qweight: this.#initializer(site, names.qweight, 'U8', [rows, blocks, bytes.qweight / blocks], rows * bytes.qweight),
        scales: this.#initializer(site, names.scales, 'F32', [rows, blocks], rows * blocks * 4),
        qzeros: this.#initializer(site, names.qzeros, 'U8', [rows, bytes.qzeros], rows * bytes.qzeros),
      };
    });
    const shape = [meanGroups.length, rows];
    const columns = layout.inFeatures;
    return {
      parts,
      ...(meanGroups.length > 0 && {
        means: this.#initializer(site, `${site}.MatMulNBits.means`, 'F32', shape, meanGroups.length * rows * 4),
      }),
      ...(layout.transform?.permuted && {
        inputOrder: this.#initializer(site, `${site}.input_order`, 'I32', [columns], columns * 4),
      }),
    };
  }

  #initializer(site: string, name: string, dtype: DType, shape: readonly number[], byteLength: number): Initializer {
    const read = async (start = 0, end = byteLength) => (await this.#pack(site)).get(name)!.subarray(start, end);
    return { name, dtype, shape, byteLength, read };
  }

  #pack(site: string): Promise<ReadonlyMap<string, Uint8Array>> {
    if (this.#packed?.site !== site) this.#packed = { site, tensors: this.#packNow(site) };
    return this.#packed.tensors;
  }

  async #packNow(site: string): Promise<ReadonlyMap<string, Uint8Array>> {
    const layout = this.#layouts.get(site)!;
    const q = await this.#source.read(site);
    const tensors = new Map<string, Uint8Array>();
    for (const part of layout.parts) {
      const names = partNames(site, layout, part);
      const packed = packPart(q, layout, part);
      tensors.set(names.qweight, packed.qweight).set(names.scales, asBytes(packed.scales)).set(names.qzeros, packed.qzeros);
    }
    if (q.transform) tensors.set(`${site}.input_order`, asBytes(q.transform.order));
    if (layout.meanGroups.length > 0) tensors.set(`${site}.MatMulNBits.means`, asBytes(packMeans(q, layout)));
    return tensors;
  }
}
