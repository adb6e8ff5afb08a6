/**
 * How a quantized linear is laid out for stock onnxruntime: MatMulNBits has operands of 2, 4 and 8 bits only, so the groups
 * are sorted into at most three uniform parts, widest first, whose products are added.
 */
import { RecipeError } from '../../errors.ts';
import type { QuantizedLinear } from '../../methods/quantize/quantized-linear.ts';
import { groupCount } from '../../methods/quantize/quantized-linear.ts';
import { type OperandBits, packByteRows } from '../packing/byte-rows.ts';
import type { QuantizedGrid } from '../planes.ts';
import { isIdentity } from '../stored-order.ts';

/** One MatMulNBits: its operand's width and its groups, natural indices in ascending order. */
export interface OnnxPart {
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
  /** 1-bit groups whose two levels are not symmetric in every row: they have a mean, applied to the group's sum of inputs. */
  readonly meanGroups: readonly number[];
}

/** Smallest block worth a kernel; a lone short group is padded to no more than it needs. */
const SMALLEST_BLOCK = 32;

/** Operand width that holds a group of `bits` bits. */
export function operandBits(bits: number): OperandBits {
  return bits <= 2 ? 2 : bits <= 4 ? 4 : 8;
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
export function layOutLinear(grid: QuantizedGrid): OnnxLinearLayout {
  const meanGroups = [...grid.bits.keys()].filter((g) => grid.bits[g] === 1 && hasMean(grid, g));
  const { transform, ...shape } = grid;
  if (!transform) return layOutShape(shape, meanGroups);
  return layOutShape({ ...shape, transform: { permuted: !isIdentity(transform), hadamard: transform.hadamard } }, meanGroups);
}

/** As `layOutLinear` for a linear whose levels are not known yet: `meanGroups` says which groups are to have a mean. */
export function layOutShape(
  shape: Pick<QuantizedLinear, 'outFeatures' | 'inFeatures' | 'groupSize'> & {
    readonly bits: ArrayLike<number>;
    readonly transform?: OnnxTransform;
  },
  meanGroups: readonly number[],
): OnnxLinearLayout {
  const { outFeatures, inFeatures, groupSize, bits, transform } = shape;
  const groups = groupCount(inFeatures, groupSize);
  const blockSize = blockSizeOf(inFeatures, groupSize);
  const indices = Array.from({ length: groups }, (_, g) => g);
  const sorted = ([8, 4, 2] as const)
    .map((width) => ({ bits: width, groups: indices.filter((g) => operandBits(bits[g]) === width) }))
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
    ...(changed && { transform: { permuted: transform.permuted, hadamard } }),
    ...(reordered && { order }),
  };
}

/** A 1-bit group in a 2-bit operand: code c becomes `factor * c`, the zero point and the scale are the operand's, `mean` is added. */
interface OneBitForm {
  readonly factor: 1 | 2;
  readonly zeroPoint: 0 | 1;
  readonly scale: number;
  readonly mean: number;
}

/**
 * Levels `o` and `o + s` as `mean -+ s/2`, which quantized activations suit best. When float32 cannot hold that mean exactly (s and o many
 * binades apart) the levels are kept as they are: `o + s * {0, 1}`.
 */
function oneBitForm(grid: QuantizedGrid, index: number): OneBitForm {
  const offset = grid.offsets ? grid.offsets[index] : 0;
  const step = grid.scales[index];
  const half = Math.fround(step / 2);
  const mean = Math.fround(offset + half);
  const exact = Math.fround(mean - half) === offset && Math.fround(mean + half) === Math.fround(offset + step);
  return exact ? { factor: 2, zeroPoint: 1, scale: half, mean } : { factor: 1, zeroPoint: 0, scale: step, mean: offset };
}

function hasMean(grid: QuantizedGrid, group: number): boolean {
  const groups = grid.bits.length;
  for (let row = 0; row < grid.outFeatures; row++) {
    if (oneBitForm(grid, row * groups + group).mean !== 0) return true;
  }
  return false;
}

/** Bytes of one part's initializers. */
export interface PackedPart {
  /** (outFeatures, blocks, blockSize * bits / 8). */
  readonly qweight: Uint8Array;
  /** (outFeatures, blocks). */
  readonly scales: Float32Array;
  /** (outFeatures, ceil(blocks * bits / 8)). */
  readonly qzeros: Uint8Array;
}

/** Bytes a row of a part's operand and of its zero points takes. */
export function partRowBytes(part: OnnxPart, blockSize: number): { qweight: number; qzeros: number } {
  return { qweight: (part.groups.length * blockSize * part.bits) / 8, qzeros: Math.ceil((part.groups.length * part.bits) / 8) };
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
      const form = bits[g] === 1 ? oneBitForm(q, from) : undefined;
      scales[to] = form ? form.scale : q.scales[from];
      zeros[to] = form ? form.zeroPoint : q.zeroPoints[from];
      const factor = form ? form.factor : 1;
      const start = row * inFeatures + g * groupSize;
      const count = Math.min(groupSize, inFeatures - g * groupSize);
      const target = to * blockSize;
      for (let k = 0; k < count; k++) codes[target + k] = factor * q.codes[start + k];
    }
  }
  const rowBytes = partRowBytes(part, blockSize);
  return {
    qweight: packByteRows(codes, rows, blocks * blockSize, part.bits, rowBytes.qweight),
    scales,
    qzeros: packByteRows(zeros, rows, blocks, part.bits, rowBytes.qzeros),
  };
}

/** Means of the groups that have one, (meanGroups, outFeatures). */
export function packMeans(grid: QuantizedGrid, layout: OnnxLinearLayout): Float32Array {
  const rows = grid.outFeatures;
  const means = new Float32Array(layout.meanGroups.length * rows);
  layout.meanGroups.forEach((g, i) => {
    for (let row = 0; row < rows; row++) means[i * rows + row] = oneBitForm(grid, row * grid.bits.length + g).mean;
  });
  return means;
}
