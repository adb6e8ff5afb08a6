/**
 * How a quantized linear is laid out for stock onnxruntime: MatMulNBits has operands of 2, 4 and 8 bits only, so the groups
 * are sorted into uniform parts, widest first, whose products are added. A compact file has a part for each width that it stores.
 */
import { RecipeError } from '../../errors.ts';
import type { LowRankShape } from '../../methods/quantize/low-rank.ts';
import type { QuantizedLinear } from '../../methods/quantize/quantized-linear.ts';
import { groupCount } from '../../methods/quantize/quantized-linear.ts';
import { type OperandBits, packByteRows } from '../packing/byte-rows.ts';
import { squeezeOne, squeezeThree } from '../packing/squeezed.ts';
import type { QuantizedGrid } from '../planes.ts';
import { isIdentity } from '../stored-order.ts';

/** Widths of codes in a file. */
export type CodeBits = 1 | 2 | 3 | 4 | 8;

/** One MatMulNBits: its operand's width and its groups, by their place in stored order, ascending. */
export interface OnnxPart {
  /** Width of its codes in the file; less than the operand's where that is unfolded when a model is loaded. */
  readonly codeBits: CodeBits;
  readonly bits: OperandBits;
  readonly groups: readonly number[];
  /** Input columns the node reads, padding included. */
  readonly columns: number;
}

/** How an input becomes what the operands multiply: two operations at most, once per input. */
export interface OnnxTransform {
  /** A gather by a vector of int32. */
  readonly permuted: boolean;
  /** Columns rotated together by one product with a constant matrix; 0: none. */
  readonly hadamard: number;
}

export interface OnnxLinearLayout {
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly blockSize: number;
  /** What is done to the input before anything else; absent: nothing. */
  readonly transform?: OnnxTransform;
  /** Widest first. */
  readonly parts: readonly OnnxPart[];
  /** Group order the activation must be brought into; absent when the parts lie in natural order. */
  readonly order?: readonly number[];
  /** Zero columns to append to the activation, so that it consists of whole groups. */
  readonly padding: number;
  /** The 1-bit groups: what their code 0 stands for is applied to the group's sum of inputs. */
  readonly meanGroups: readonly number[];
  /** In the file; the runtime has F32. */
  readonly scaleDtype: 'F16' | 'F32';
  /** Two products beside the others, of the input before anything is done to it. Their dtype is the file's. */
  readonly lowRank?: LowRankShape;
}

/** Smallest block worth a kernel; a lone short group is padded to no more than it needs. */
const SMALLEST_BLOCK = 32;

/** Operand width that holds a group of `bits` bits. */
export function operandBits(bits: number): OperandBits {
  return bits <= 2 ? 2 : bits <= 4 ? 4 : 8;
}

/** Width of the codes of a group of `bits` bits in a file: in a compact one the true width, where that is 4 or less. */
function codeBitsIn(bits: number, compact: boolean): CodeBits {
  if (!compact || bits > 4) return operandBits(bits);
  return bits <= 1 ? 1 : (bits as CodeBits);
}

/** Block size of MatMulNBits for groups of `groupSize` columns. Throws RecipeError for sizes it does not take. */
export function blockSizeOf(inFeatures: number, groupSize: number): number {
  if (groupSize < 16 || (groupSize & (groupSize - 1)) !== 0) {
    throw new RecipeError(
      `--group-size ${groupSize}: ONNX operands take powers of two from 16. Use 32, 64 or 128, or --format safetensors.`,
    );
  }
  let enough = SMALLEST_BLOCK;
  while (enough < inFeatures) enough *= 2;
  return Math.min(groupSize, enough);
}

/** Lays out one linear; reads no codes. */
export function layOutLinear({ transform, ...shape }: QuantizedGrid, compact = true): OnnxLinearLayout {
  if (!transform) return layOutShape(shape, compact);
  return layOutShape({ ...shape, transform: { permuted: !isIdentity(transform), hadamard: transform.hadamard } }, compact);
}

/** As `layOutLinear` for a linear whose levels and order of columns are not known yet. */
export function layOutShape(
  shape: Pick<QuantizedLinear, 'outFeatures' | 'inFeatures' | 'groupSize' | 'scaleDtype'> & {
    readonly bits: ArrayLike<number>;
    readonly transform?: OnnxTransform;
    readonly lowRank?: LowRankShape;
  },
  compact: boolean,
): OnnxLinearLayout {
  const { outFeatures, inFeatures, groupSize, bits, transform, lowRank } = shape;
  const groups = groupCount(inFeatures, groupSize);
  const blockSize = blockSizeOf(inFeatures, groupSize);
  const indices = Array.from({ length: groups }, (_, g) => g);
  const meanGroups = indices.filter((g) => bits[g] === 1);
  const sorted = ([8, 4, 3, 2, 1] as const)
    .map((codeBits) => {
      const chosen = indices.filter((g) => codeBitsIn(bits[g], compact) === codeBits);
      return { codeBits, bits: operandBits(codeBits), groups: chosen };
    })
    .filter((part) => part.groups.length > 0);
  const order = sorted.flatMap((part) => part.groups);
  const reordered = order.some((group, place) => group !== place);
  // Whole groups are gathered and summed: a short last group is filled up with columns of zeros for that.
  const whole = groups * blockSize;
  const padding = reordered || meanGroups.length > 0 ? whole - inFeatures : 0;
  const columnsOf = (part: readonly number[]): number =>
    part.length * blockSize - (part.includes(groups - 1) && padding === 0 ? whole - inFeatures : 0);
  const parts = sorted.map((part) => ({ ...part, columns: columnsOf(part.groups) }));
  // A row shorter than a rotation stays as it is.
  const hadamard = transform && transform.hadamard <= inFeatures ? transform.hadamard : 0;
  const changed = transform && (transform.permuted || hadamard > 0);
  return {
    outFeatures,
    inFeatures,
    blockSize,
    parts,
    padding,
    meanGroups,
    scaleDtype: compact ? shape.scaleDtype : 'F32',
    ...(changed && { transform: { permuted: transform.permuted, hadamard } }),
    ...(reordered && { order }),
    ...(lowRank && { lowRank: { rank: lowRank.rank, dtype: compact ? lowRank.dtype : 'F32' } }),
  };
}

/** Bytes of one part's initializers. */
export interface PackedPart {
  /** (outFeatures, blocks, blockSize * bits / 8), or what that folds into. */
  readonly qweight: readonly Uint8Array[];
  /** (outFeatures, blocks). */
  readonly scales: Float32Array;
  /** (outFeatures, ceil(blocks * bits / 8)). */
  readonly qzeros: Uint8Array;
}

/** Bytes a row of a part's operand and of its zero points takes; `stored`: what the file holds of the operand. */
export function partRowBytes(
  { groups, bits, codeBits }: Pick<OnnxPart, 'groups' | 'bits' | 'codeBits'>,
  blockSize: number,
): { stored: number; qweight: number; qzeros: number } {
  const bytesOf = (width: number): number => (groups.length * blockSize * width) / 8;
  return { stored: bytesOf(codeBits), qweight: bytesOf(bits), qzeros: Math.ceil((groups.length * bits) / 8) };
}

/** Shapes of what a part's operand folds into. */
export function storedShapes({ groups, codeBits }: OnnxPart, rows: number, blockSize: number): readonly (readonly number[])[] {
  const pieces = codeBits === 3 ? 3 : 1;
  return new Array(pieces).fill([rows, groups.length, (blockSize * codeBits) / 8 / pieces]);
}

/** Packs one part. A short group's block is filled up with zeros. */
export function packPart(q: QuantizedLinear, layout: OnnxLinearLayout, part: OnnxPart): PackedPart {
  const { outFeatures: rows, inFeatures, groupSize, bits } = q;
  const { blockSize } = layout;
  const groups = bits.length;
  const blocks = part.groups.length;
  const codes = new Uint8Array(rows * blocks * blockSize);
  const scales = new Float32Array(rows * blocks);
  const zeros = new Uint8Array(rows * blocks);
  for (let row = 0; row < rows; row++) {
    for (let block = 0; block < blocks; block++) {
      const g = part.groups[block];
      const from = row * groups + g;
      const to = row * blocks + block;
      if (bits[g] === 0) {
        scales[to] = 1;
        continue;
      }
      scales[to] = q.scales[from];
      zeros[to] = bits[g] === 1 ? 0 : q.zeroPoints[from];
      const start = row * inFeatures + g * groupSize;
      const count = Math.min(groupSize, inFeatures - g * groupSize);
      const target = to * blockSize;
      for (let k = 0; k < count; k++) codes[target + k] = q.codes[start + k];
    }
  }
  const rowBytes = partRowBytes(part, blockSize);
  const operand = packByteRows(codes, rows, blocks * blockSize, part.bits, rowBytes.qweight);
  const blockBytes = rowBytes.qweight / blocks;
  const folded =
    part.codeBits === 3 ? squeezeThree(operand, blockBytes) : [part.codeBits === 1 ? squeezeOne(operand, blockBytes) : operand];
  return {
    qweight: folded,
    scales,
    qzeros: packByteRows(zeros, rows, blocks, part.bits, rowBytes.qzeros),
  };
}

/** What code 0 stands for in the 1-bit groups, (meanGroups, outFeatures). */
export function packMeans(grid: QuantizedGrid, layout: OnnxLinearLayout): Float32Array {
  const rows = grid.outFeatures;
  const means = new Float32Array(layout.meanGroups.length * rows);
  layout.meanGroups.forEach((g, i) => {
    for (let row = 0; row < rows; row++) means[i * rows + row] = grid.offsets?.[row * grid.bits.length + g] ?? 0;
  });
  return means;
}
