/** The constants of quantized linears in an ONNX graph: named as onnxruntime-genai names them, packed when the writer asks for their bytes. */
import { byteLengthOf, fromFloat32 } from '../../../formats/dtype.ts';
import type { Initializer } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import type { QuantizedSource } from '../quantized-source.ts';
import { asBytes } from '../tensor-bytes.ts';
import { transpose } from '../transpose.ts';
import { packSignBytes, signsPerByte } from './input-signs.ts';
import {
  layOutLinear,
  type OnnxLinearLayout,
  type OnnxPart,
  type OnnxStorageOptions,
  packMeans,
  packPart,
  partRowBytes,
  storedShapes,
} from './linear-layout.ts';

/** Names of a part's constants. Where there are several, codes end in `_<their bits>`, grids in `_<bits of the operand>`; 3-bit codes in `.0`, `.1`, `.2` too. */
function partNames(site: string, { parts }: Pick<OnnxLinearLayout, 'parts'>, part: OnnxPart) {
  const prefix = `${site}.MatMulNBits`;
  const suffix = parts.length > 1 ? `_${part.bits}` : '';
  const mixed = parts.reduce((sum, { pieces }) => sum + pieces.length, 0) > 1;
  const qweight = part.pieces.map(({ codeBits }) => {
    const name = `${prefix}.qweight${mixed ? `_${codeBits}` : ''}`;
    return codeBits === 3 ? [0, 1, 2].map((stored) => `${name}.${stored}`) : [name];
  });
  return { qweight, scales: `${prefix}.scales${suffix}`, qzeros: `${prefix}.qzeros${suffix}` };
}

/** Constants of one linear. */
export interface LinearInitializers {
  readonly parts: readonly {
    /** For each piece, what it folds from. */
    readonly qweight: readonly (readonly Initializer[])[];
    readonly scales: Initializer;
    readonly qzeros: Initializer;
  }[];
  /** (meanGroups, outFeatures); absent when no group has a mean. */
  readonly means?: Initializer;
  /** I32 (inFeatures): stored column k reads input `inputOrder[k]`. */
  readonly inputOrder?: Initializer;
  /** U8: signs of the input's columns, see `packSignBytes`. */
  readonly inputSigns?: Initializer;
  /** A^T (inFeatures, rank) and B^T (rank, outFeatures) of the branch. */
  readonly lowRank?: { readonly down: Initializer; readonly up: Initializer };
}

/** Names of a branch's constants. */
export function branchNames(site: string): { readonly down: string; readonly up: string } {
  return { down: `${site}.lora_A.weight`, up: `${site}.lora_B.weight` };
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
  static async create(
    source: QuantizedSource,
    names: Iterable<string>,
    options: OnnxStorageOptions = {},
  ): Promise<QuantizedInitializers> {
    const layouts = new Map<string, OnnxLinearLayout>();
    for (const name of names) {
      if (source.has(name)) layouts.set(name, layOutLinear(await source.readGrid(name), options));
    }
    return new QuantizedInitializers(source, layouts);
  }

  get layouts(): ReadonlyMap<string, OnnxLinearLayout> {
    return this.#layouts;
  }

  /** The constants of a linear that has a layout. */
  of(site: string): LinearInitializers {
    const layout = this.#layouts.get(site)!;
    const { outFeatures: rows, blockSize, meanGroups, scaleDtype } = layout;
    const scaleBytes = scaleDtype === 'F16' ? 2 : 4;
    const parts = layout.parts.map((part) => {
      const names = partNames(site, layout, part);
      const blocks = part.groups.length;
      const bytes = partRowBytes(part, blockSize);
      return {
        qweight: part.pieces.map((piece, p) =>
          storedShapes(piece, rows, blockSize).map((shape, i) =>
            this.#initializer(site, names.qweight[p][i], 'U8', shape, shape[0] * shape[1] * shape[2]),
          ),
        ),
        scales: this.#initializer(site, names.scales, scaleDtype, [rows, blocks], rows * blocks * scaleBytes),
        qzeros: this.#initializer(site, names.qzeros, 'U8', [rows, bytes.qzeros], rows * bytes.qzeros),
      };
    });
    const shape = [meanGroups.length, rows];
    const columns = layout.inFeatures;
    const signBytes = columns / signsPerByte(columns);
    const { lowRank } = layout;
    return {
      parts,
      ...(meanGroups.length > 0 && {
        means: this.#initializer(site, `${site}.MatMulNBits.means`, scaleDtype, shape, meanGroups.length * rows * scaleBytes),
      }),
      ...(layout.transform?.permuted && {
        inputOrder: this.#initializer(site, `${site}.input_order`, 'I32', [columns], columns * 4),
      }),
      ...(layout.transform?.signed && {
        inputSigns: this.#initializer(site, `${site}.input_signs`, 'U8', [signBytes, 1], signBytes),
      }),
      ...(lowRank && {
        lowRank: {
          down: this.#factor(site, branchNames(site).down, lowRank.dtype, [columns, lowRank.rank]),
          up: this.#factor(site, branchNames(site).up, lowRank.dtype, [lowRank.rank, rows]),
        },
      }),
    };
  }

  #factor(site: string, name: string, dtype: 'F16' | 'F32', shape: readonly [number, number]): Initializer {
    return this.#initializer(site, name, dtype, shape, byteLengthOf(dtype, shape));
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
      packed.qweight.forEach((piece, p) => {
        piece.forEach((bytes, i) => {
          tensors.set(names.qweight[p][i], bytes);
        });
      });
      tensors.set(names.scales, fromFloat32(layout.scaleDtype, packed.scales)).set(names.qzeros, packed.qzeros);
    }
    if (q.lowRank && layout.lowRank) {
      const { rank, loraA, loraB } = q.lowRank;
      const { dtype } = layout.lowRank;
      const { down, up } = branchNames(site);
      tensors.set(down, fromFloat32(dtype, transpose(loraA, rank, q.inFeatures)));
      tensors.set(up, fromFloat32(dtype, transpose(loraB, q.outFeatures, rank)));
    }
    if (q.transform?.order) tensors.set(`${site}.input_order`, asBytes(q.transform.order));
    if (q.transform?.signs) tensors.set(`${site}.input_signs`, packSignBytes(q.transform.signs));
    if (layout.meanGroups.length > 0)
      tensors.set(`${site}.MatMulNBits.means`, fromFloat32(layout.scaleDtype, packMeans(q, layout)));
    return tensors;
  }
}
