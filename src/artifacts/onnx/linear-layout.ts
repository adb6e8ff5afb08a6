/**
 * How a quantized linear is laid out for stock onnxruntime: MatMulNBits has operands of 2, 4 and 8 bits only, so the groups
 * are sorted into uniform parts, widest first, whose products are added. A compact file holds a part in pieces, one for each width of its codes.
 */
import { RecipeError } from '../../errors.ts';
import { shapeOfTransform, type TransformShape } from '../../methods/quantize/input-transform.ts';
import type { LowRankShape } from '../../methods/quantize/low-rank.ts';
import type { QuantizedLinear } from '../../methods/quantize/quantized-linear.ts';
import { groupCount } from '../../methods/quantize/quantized-linear.ts';
import { type OperandBits, packByteRows } from '../packing/byte-rows.ts';
import { squeeze } from '../packing/squeezed.ts';
import type { QuantizedGrid } from '../planes.ts';
import { isIdentity } from '../stored-order.ts';

/** Widths of codes in a file. */
export type CodeBits = 1 | 2 | 3 | 4 | 8;

/**
 * Which operands a runtime is to hold. `auto`: one for all groups of up to 4 bits of a layer, the narrowest that holds them, so that there is one product;
 * `2`: each group in the narrowest, which is the least memory; `4`: nothing narrower than 4 bits.
 */
export const ONNX_CONTAINERS = ['auto', '2', '4'] as const;
export type OnnxContainer = (typeof ONNX_CONTAINERS)[number];

/** How an ONNX file stores codes, and what a runtime makes of them. */
export interface OnnxStorageOptions {
  /** Codes at their true width and scales as F16, which a runtime unfolds when it loads the model. Default true. */
  readonly compact?: boolean;
  /** Default `auto`; in a file that is not compact, whose operands are what it stores, that is `2`. */
  readonly container?: OnnxContainer;
}

/** Groups that a file stores together, by their place in stored order, ascending. */
export interface OnnxPiece {
  /** Width of their codes in the file; less than the operand's where that is unfolded when a model is loaded. */
  readonly codeBits: CodeBits;
  readonly groups: readonly number[];
}

/** One MatMulNBits: its operand's width and its groups, by their place in stored order, ascending. */
export interface OnnxPart {
  readonly bits: OperandBits;
  readonly groups: readonly number[];
  /** Widest first. */
  readonly pieces: readonly OnnxPiece[];
  /** Input columns the node reads, padding included. */
  readonly columns: number;
}

export interface OnnxLinearLayout {
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly blockSize: number;
  /** What is done to the input before anything else, once per input; absent: nothing. */
  readonly transform?: TransformShape;
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

/** Width of the codes of a group of `bits` bits in a compact file: the true width, where that is 4 or less. */
export function trueWidth(bits: number): CodeBits {
  return bits > 4 ? 8 : ((bits || 1) as CodeBits);
}

/** The narrowest operand to make for the groups of a layer that need no more than 4 bits. */
export function leastOperand(bits: ArrayLike<number>, compact: boolean, container: OnnxContainer): OperandBits {
  if (container === '4') return 4;
  if (container === '2' || !compact) return 2;
  return Array.from(bits).some((width) => width === 3 || width === 4) ? 4 : 2;
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
export function layOutLinear({ transform, ...shape }: QuantizedGrid, options: OnnxStorageOptions = {}): OnnxLinearLayout {
  if (!transform) return layOutShape(shape, options);
  return layOutShape({ ...shape, transform: { ...shapeOfTransform(transform), permuted: !isIdentity(transform) } }, options);
}

/** As `layOutLinear` for a linear whose levels and order of columns are not known yet. */
export function layOutShape(
  shape: Pick<QuantizedLinear, 'outFeatures' | 'inFeatures' | 'groupSize' | 'scaleDtype'> & {
    readonly bits: ArrayLike<number>;
    readonly transform?: TransformShape;
    readonly lowRank?: LowRankShape;
  },
  { compact = true, container = 'auto' }: OnnxStorageOptions = {},
): OnnxLinearLayout {
  const { outFeatures, inFeatures, groupSize, bits, transform, lowRank } = shape;
  const groups = groupCount(inFeatures, groupSize);
  const blockSize = blockSizeOf(inFeatures, groupSize);
  const indices = Array.from({ length: groups }, (_, g) => g);
  const meanGroups = indices.filter((g) => bits[g] === 1);
  const least = leastOperand(bits, compact, container);
  const sorted = ([8, 4, 2] as const)
    .map((operand) => {
      const chosen = indices.filter((g) => Math.max(operandBits(bits[g]), least) === operand);
      const widths = compact ? ([8, 4, 3, 2, 1] as const) : [operand];
      const pieces = widths
        .map((codeBits) => ({ codeBits, groups: chosen.filter((g) => !compact || trueWidth(bits[g]) === codeBits) }))
        .filter((piece) => piece.groups.length > 0);
      return { bits: operand, groups: chosen, pieces };
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
  const changed = transform && (transform.permuted || transform.signed || hadamard > 0);
  return {
    outFeatures,
    inFeatures,
    blockSize,
    parts,
    padding,
    meanGroups,
    scaleDtype: compact ? shape.scaleDtype : 'F32',
    ...(changed && { transform: { ...transform, hadamard } }),
    ...(reordered && { order }),
    ...(lowRank && { lowRank: { rank: lowRank.rank, dtype: compact ? lowRank.dtype : 'F32' } }),
  };
}

/** Bytes of one part's initializers. */
export interface PackedPart {
  /** For each piece, what its (outFeatures, blocks, blockSize * bits / 8) folds into. */
  readonly qweight: readonly (readonly Uint8Array[])[];
  /** (outFeatures, blocks). */
  readonly scales: Float32Array;
  /** (outFeatures, ceil(blocks * bits / 8)). */
  readonly qzeros: Uint8Array;
}

/** Bytes a row of a part's operand and of its zero points takes; `stored`: what the file holds of the operand. */
export function partRowBytes(
  { groups, bits, pieces }: Pick<OnnxPart, 'groups' | 'bits' | 'pieces'>,
  blockSize: number,
): { stored: number; qweight: number; qzeros: number } {
  const bytesOf = (count: number, width: number): number => (count * blockSize * width) / 8;
  return {
    stored: pieces.reduce((sum, piece) => sum + bytesOf(piece.groups.length, piece.codeBits), 0),
    qweight: bytesOf(groups.length, bits),
    qzeros: Math.ceil((groups.length * bits) / 8),
  };
}

/** Shapes of what a piece folds into. */
export function storedShapes({ groups, codeBits }: OnnxPiece, rows: number, blockSize: number): readonly (readonly number[])[] {
  const count = codeBits === 3 ? 3 : 1;
  return new Array(count).fill([rows, groups.length, (blockSize * codeBits) / 8 / count]);
}

/** Packs one part. A short group's block is filled up with zeros. */
export function packPart(q: QuantizedLinear, layout: OnnxLinearLayout, part: OnnxPart): PackedPart {
  const { outFeatures: rows, bits } = q;
  const groups = bits.length;
  const blocks = part.groups.length;
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
    }
  }
  return {
    qweight: part.pieces.map((piece) => packPiece(q, layout, part.bits, piece)),
    scales,
    qzeros: packByteRows(zeros, rows, blocks, part.bits, partRowBytes(part, layout.blockSize).qzeros),
  };
}

function packPiece(
  q: QuantizedLinear,
  { blockSize }: OnnxLinearLayout,
  operand: OperandBits,
  piece: OnnxPiece,
): readonly Uint8Array[] {
  const { outFeatures: rows, inFeatures, groupSize, bits } = q;
  const columns = piece.groups.length * blockSize;
  const codes = new Uint8Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    piece.groups.forEach((g, block) => {
      if (bits[g] === 0) return;
      const start = row * inFeatures + g * groupSize;
      const count = Math.min(groupSize, inFeatures - g * groupSize);
      codes.set(q.codes.subarray(start, start + count), row * columns + block * blockSize);
    });
  }
  const packed = packByteRows(codes, rows, columns, operand, (columns * operand) / 8);
  return squeeze(packed, piece.codeBits, operand, (blockSize * operand) / 8);
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
