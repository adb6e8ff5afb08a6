/** What a layer takes of what a budget counts, for every choice of its widths: exact, so that a sum over layers is what the files have. */

import { gapBehind } from '../../formats/onnx/external-data.ts';
import type { LayerSizes } from '../methods/quantize/allocation/frontier.ts';
import { shapeOfKind } from '../methods/quantize/best/prepared-input.ts';
import { groupCount } from '../methods/quantize/quantized-linear.ts';
import type { SitePlan, TransformKind } from '../methods/quantize/quantizer.ts';
import type { LinearSite } from '../model/model.ts';
import { hadamardBits, rotationSteps } from './onnx/hadamard-constant.ts';
import { blockSizeOf, leastOperand, type OnnxContainer, operandBits, trueWidth } from './onnx/linear-layout.ts';
import { planeWordCount } from './packing/bit-planes.ts';
import type { OperandBits } from './packing/byte-rows.ts';

/** What a budget counts: `code` the codes alone; a layout everything its files hold for them; `runtime` operands as onnxruntime holds them. */
export type BudgetUnit = 'code' | 'planes' | 'onnx' | 'onnx-plain' | 'runtime';

type Shape = Pick<LinearSite, 'outFeatures' | 'inFeatures'>;

/** Bits of an index of a group in ONNX. */
const INDEX_BITS = 64;

/**
 * What a layer's widths take in a graph or a header, beside its constants: bytes by the width of its codes in the file, and for an order of its
 * groups. In `planes`: for having groups of one bit, and, under 2, for having others.
 */
export interface PartBytes {
  readonly order: number;
  readonly widths: Readonly<Record<number, number>>;
  /** What is done to an input. */
  readonly transforms: Readonly<Record<TransformKind, number>>;
}

/** What a budget counts, and what that depends on. */
export interface Counted {
  readonly unit: BudgetUnit;
  /** Operands of ONNX files. */
  readonly container?: OnnxContainer;
  /** Where whole files are counted. */
  readonly partBytes?: PartBytes | undefined;
}

/**
 * Sizes of the groups of a layer, `groupSize` columns each, at each of `widths`. What sites share is not counted: the order of an input's columns,
 * and the matrices of rotations. Lists of groups that sites may come to share are counted for each of them.
 */
export function layerSizes(counted: Counted, site: Shape, groupSize: number, widths: readonly number[]): LayerSizes {
  const { unit, partBytes } = counted;
  const { outFeatures: rows, inFeatures } = site;
  const groups = groupCount(inFeatures, groupSize);
  const sizesOf = (size: (columns: number, width: number) => number) =>
    Array.from({ length: groups }, (_, g) => {
      const columns = Math.min(groupSize, inFeatures - g * groupSize);
      return widths.map((width) => size(columns, width));
    });
  switch (unit) {
    case 'code':
      return { sizes: sizesOf((columns, width) => rows * columns * width) };
    case 'planes':
      return {
        sizes: sizesOf((columns, width) => planesGroupBits(rows, columns, width)),
        ...(partBytes && { rest: (bits: readonly number[]) => planesRest(bits, partBytes) }),
      };
    case 'onnx':
    case 'onnx-plain':
    case 'runtime': {
      const blockSize = blockSizeOf(inFeatures, groupSize);
      const alone = (width: number) => rows * operandGroupBits(unit, blockSize, width);
      return {
        sizes: sizesOf((_, width) => alone(width)),
        rest: (bits) => operandBitsOf(counted, rows, blockSize, bits) - bits.reduce((sum, width) => sum + alone(width), 0),
      };
    }
    default:
      return unit satisfies never;
  }
}

/** Words of codes, scales, words of zero points or offsets, and the width itself. */
function planesGroupBits(rows: number, columns: number, width: number): number {
  const grid = width === 1 ? 16 * rows : 32 * planeWordCount(1, rows, width);
  return 8 + 32 * planeWordCount(rows, columns, width) + 16 * rows + grid;
}

/** A row's block of codes with its scale and zero point in the least operand, and what code 0 stands for where it has one bit. A short group fills its block up. */
function operandGroupBits(unit: BudgetUnit, blockSize: number, width: number): number {
  const stored = unit === 'onnx' ? trueWidth(width) : operandBits(width);
  return stored * blockSize + operandBits(width) + scaleBits(unit) * (width === 1 ? 2 : 1);
}

function scaleBits(unit: BudgetUnit): number {
  return unit === 'onnx' ? 16 : 32;
}

/** Groups in one operand: all, and by the width of their codes in the file. */
interface Part {
  readonly operand: OperandBits;
  count: number;
  readonly pieces: Map<number, number>;
}

/** As `layOutShape` lays groups out; `sorted`: they lie as the operands read them. */
function partsOf(bits: readonly number[], compact: boolean, container: OnnxContainer): { parts: Part[]; sorted: boolean } {
  const least = leastOperand(bits, compact, container);
  const parts = new Map<OperandBits, Part>();
  let widest = 8;
  let sorted = true;
  for (const width of bits) {
    const operand = Math.max(operandBits(width), least) as OperandBits;
    const part = parts.get(operand) ?? { operand, count: 0, pieces: new Map<number, number>() };
    parts.set(operand, part);
    part.count += 1;
    const codeBits = compact ? trueWidth(width) : operand;
    part.pieces.set(codeBits, (part.pieces.get(codeBits) ?? 0) + 1);
    sorted &&= operand <= widest;
    widest = operand;
  }
  return { parts: [...parts.values()], sorted };
}

/** All of a layer: zero points fill whole bytes in every row of every operand, and groups that do not lie as they are read are listed. */
function operandBitsOf(
  { unit, container = 'auto', partBytes }: Counted,
  rows: number,
  blockSize: number,
  bits: readonly number[],
): number {
  const compact = unit !== 'onnx-plain';
  const { parts, sorted } = partsOf(bits, compact, container);
  const means = bits.reduce((count, width) => count + (width === 1 ? 1 : 0), 0);
  let total = rows * scaleBits(unit) * (bits.length + means);
  if (!sorted) total += INDEX_BITS * bits.length;
  if (means < bits.length) total += INDEX_BITS * means;
  for (const { operand, count, pieces } of parts) {
    total += rows * 8 * Math.ceil((count * operand) / 8);
    for (const [codeBits, own] of pieces) total += rows * own * blockSize * (unit === 'onnx' ? codeBits : operand);
  }
  if (partBytes) total += 8 * graphBytes(partBytes, { parts, sorted }, rows, blockSize, means, compact);
  return total;
}

/** Bytes of nodes and names of a layer's parts, and of the gaps behind their constants. */
function graphBytes(
  { order, widths }: PartBytes,
  { parts, sorted }: ReturnType<typeof partsOf>,
  rows: number,
  blockSize: number,
  means: number,
  compact: boolean,
): number {
  const scale = compact ? 2 : 4;
  let bytes = (sorted ? 0 : order) + gapBehind(rows * scale * means);
  for (const { operand, count, pieces } of parts) {
    bytes += gapBehind(rows * scale * count) + gapBehind(rows * Math.ceil((count * operand) / 8));
    for (const [codeBits, own] of pieces) {
      const constants = codeBits === 3 ? 3 : 1;
      bytes += widths[codeBits] + constants * gapBehind((rows * own * blockSize * codeBits) / 8 / constants);
    }
  }
  return bytes;
}

/** Zero points and what code 0 stands for have a tensor each, if any group has them. */
function planesRest(bits: readonly number[], { widths }: PartBytes): number {
  const ones = bits.includes(1) ? widths[1] : 0;
  return 8 * (ones + (bits.some((width) => width > 1) ? widths[2] : 0));
}

/** Bits of the matrices that the inputs of these layers are rotated with, each once. */
export function rotationBits(unit: BudgetUnit, plans: Iterable<readonly [site: Shape, plan: SitePlan]>): number {
  if (unit === 'code' || unit === 'planes') return 0;
  const runs = new Set<number>();
  for (const [{ inFeatures }, { transform, groupSize }] of plans) {
    const { hadamard } = transform ? shapeOfKind(transform, groupSize, inFeatures) : { hadamard: 0 };
    if (hadamard > 0) for (const size of rotationSteps(hadamard)) runs.add(size);
  }
  return [...runs].reduce((sum, run) => sum + (unit === 'runtime' ? 32 * run * run : hadamardBits(run)), 0);
}
