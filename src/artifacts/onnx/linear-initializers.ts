/** The constants of quantized linears in an ONNX graph: named as onnxruntime-genai names them, packed when the writer asks for their bytes. */
import { byteLengthOf, fromFloat32 } from '../../../formats/dtype.ts';
import type { Initializer } from '../../../formats/onnx/model.ts';
import type { DType } from '../../../formats/tensor.ts';
import { branchCodes, type LowRankShape } from '../../methods/quantize/low-rank.ts';
import { factorRowBytes, packFactor } from '../packing/factor-codes.ts';
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
  readonly lowRank?: { readonly down: FactorConstant; readonly up: FactorConstant };
}

/** A factor as it is, or codes U8 (rank, bytes of a row) of `length` each and their steps (rank, 1): of A and B^T, both (rank, length). */
export type FactorConstant =
  | { readonly weight: Initializer }
  | { readonly codes: Initializer; readonly scales: Initializer; readonly bits: 8 | 4; readonly length: number };

/** Names of a branch's constants. */
export function branchNames(site: string): { readonly down: string; readonly up: string } {
  return { down: `${site}.lora_A.weight`, up: `${site}.lora_B.weight` };
}

/** The same of factors in codes. */
function codeNames(site: string, bits: 8 | 4) {
  const of = (side: string) => ({ codes: `${site}.lora_${side}.codes_${bits}`, scales: `${site}.lora_${side}.scales` });
  return { down: of('A'), up: of('B') };
}

/** The constants that a branch may be made of: the first is what it is known by, of A and of B. */
export function branchConstants(
  site: string,
): readonly { readonly down: string; readonly up: string; readonly storage?: 'Q8' | 'Q4' }[] {
  const [eight, four] = [codeNames(site, 8), codeNames(site, 4)];
  return [
    branchNames(site),
    { down: eight.down.codes, up: eight.up.codes, storage: 'Q8' },
    { down: four.down.codes, up: four.up.codes, storage: 'Q4' },
  ];
}

/** Every name that a constant of a branch may have. */
export function branchConstantNames(site: string): string[] {
  const { down, up } = codeNames(site, 8);
  return [...branchConstants(site).flatMap((names) => [names.down, names.up]), down.scales, up.scales];
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
          down: this.#factor(site, 'down', lowRank, columns),
          up: this.#factor(site, 'up', lowRank, rows),
        },
      }),
    };
  }

  #factor(site: string, side: 'down' | 'up', { rank, dtype }: LowRankShape, length: number): FactorConstant {
    if (dtype === 'F16' || dtype === 'F32') {
      const shape = side === 'down' ? [length, rank] : [rank, length];
      return { weight: this.#initializer(site, branchNames(site)[side], dtype, shape, byteLengthOf(dtype, shape)) };
    }
    const bits = dtype === 'Q8' ? 8 : 4;
    const names = codeNames(site, bits)[side];
    const bytes = factorRowBytes(length, bits);
    return {
      codes: this.#initializer(site, names.codes, 'U8', [rank, bytes], rank * bytes),
      scales: this.#initializer(site, names.scales, 'F16', [rank, 1], 2 * rank),
      bits,
      length,
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
      packed.qweight.forEach((piece, p) => {
        piece.forEach((bytes, i) => {
          tensors.set(names.qweight[p][i], bytes);
        });
      });
      tensors.set(names.scales, fromFloat32(layout.scaleDtype, packed.scales)).set(names.qzeros, packed.qzeros);
    }
    if (q.lowRank && layout.lowRank) {
      const { rank, loraA, loraB, scales } = q.lowRank;
      const { dtype } = layout.lowRank;
      if (dtype === 'F16' || dtype === 'F32') {
        const { down, up } = branchNames(site);
        tensors.set(down, fromFloat32(dtype, transpose(loraA, rank, q.inFeatures)));
        tensors.set(up, fromFloat32(dtype, transpose(loraB, q.outFeatures, rank)));
      } else {
        const bits = dtype === 'Q8' ? 8 : 4;
        const { down, up } = codeNames(site, bits);
        const codes = branchCodes(q.lowRank);
        tensors.set(down.codes, packFactor(codes.a, rank, bits)).set(down.scales, fromFloat32('F16', scales!.a));
        tensors.set(up.codes, packFactor(codes.b, rank, bits)).set(up.scales, fromFloat32('F16', scales!.b));
      }
    }
    if (q.transform?.order) tensors.set(`${site}.input_order`, asBytes(q.transform.order));
    if (q.transform?.signs) tensors.set(`${site}.input_signs`, packSignBytes(q.transform.signs));
    if (layout.meanGroups.length > 0)
      tensors.set(`${site}.MatMulNBits.means`, fromFloat32(layout.scaleDtype, packMeans(q, layout)));
    return tensors;
  }
}
