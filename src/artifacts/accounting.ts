/**
 * What quantized modules cost. *Code bits* are the widths decided; *stored bits* are everything a file holds for them: codes with
 * their padding, scales, zero points, offsets, means, width tables, group orders, low-rank branches.
 */
import { byteLengthOf } from '../../formats/dtype.ts';
import type { TensorDeclaration } from '../../formats/tensor.ts';
import { componentBits } from '../methods/quantize/low-rank.ts';
import { gptqDeclarations } from './gptq.ts';
import { hadamardBits, rotationSteps } from './onnx/hadamard-constant.ts';
import { signsPerByte } from './onnx/input-signs.ts';
import { type OnnxLinearLayout, partRowBytes } from './onnx/linear-layout.ts';
import { planesDeclarations, type QuantizedShape } from './planes.ts';

/** One quantized module in one layout. */
export interface ModuleStorage {
  readonly name: string;
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly groupSize: number;
  /** Width of each group, in stored order. */
  readonly bits: readonly number[];
  readonly codeBits: number;
  readonly storedBits: number;
  /** The same as onnxruntime holds it: whole operands, scales in float32. ONNX only. */
  readonly runtimeBits?: number;
  /** The branch beside it; its bits are among the stored ones. */
  readonly lowRank?: { readonly rank: number; readonly storedBits: number };
}

/** All modules of an artifact. */
export interface Storage {
  /** Quantized linear layers of the blocks, in model order. */
  readonly modules: readonly ModuleStorage[];
  /** Quantized embeddings and output head; not part of the two averages. */
  readonly embeddings: readonly ModuleStorage[];
  /** Mean code bits over the quantized weights of `modules`; the width of the float type when there are none. */
  readonly averageBits: number;
  /** Stored bits of `modules` over their weights; the width of the float type when there are none. */
  readonly bitsPerWeight: number;
  /** What branches have of `bitsPerWeight`. */
  readonly lowRankBitsPerWeight: number;
}

/** Sum over groups of width times weights. */
export function codeBitsOf(
  shape: Pick<QuantizedShape, 'outFeatures' | 'inFeatures' | 'groupSize'> & { readonly bits: ArrayLike<number> },
): number {
  const { outFeatures, inFeatures, groupSize, bits } = shape;
  let sum = 0;
  for (let g = 0; g < bits.length; g++) sum += bits[g] * Math.min(groupSize, inFeatures - g * groupSize);
  return sum * outFeatures;
}

/** Bits of a branch's factors; 0 without one. */
export function lowRankBits({
  outFeatures,
  inFeatures,
  lowRank,
}: Pick<QuantizedShape, 'outFeatures' | 'inFeatures' | 'lowRank'>): number {
  if (!lowRank) return 0;
  return lowRank.rank * (componentBits(lowRank.dtype, outFeatures) + componentBits(lowRank.dtype, inFeatures));
}

/** Stored bits in the layout `planes`. */
export function planesStoredBits(shape: QuantizedShape): number {
  return bitsOf(planesDeclarations('', shape));
}

/** Stored bits in the layout `gptq`; the module must suit it. */
export function gptqStoredBits(shape: QuantizedShape): number {
  return bitsOf(gptqDeclarations('', shape));
}

/** Bits of a group order in ONNX: I64 per group. */
const INDEX_BITS = 64;
/** Bits of an order of columns, in every layout: I32 per column. */
const COLUMN_BITS = 32;

/** What a module takes in an ONNX file, and in the runtime that loaded it. */
export interface OnnxStorage {
  readonly storedBits: number;
  readonly runtimeBits: number;
}

/**
 * Bits in the layout `onnx`, by module. Sites that read one activation share the order of its columns, that of its groups where they
 * agree on it, and the list of groups that have means; all sites share the matrices that inputs are rotated with: the first one pays.
 * @param modules in graph order, with the name of the activation each reads
 */
export function onnxStorage(
  modules: Iterable<readonly [name: string, input: string, layout: OnnxLinearLayout]>,
): Map<string, OnnxStorage> {
  const shared = new Set<string>();
  const sharedBits = (key: string, bits: number): number => {
    if (shared.has(key)) return 0;
    shared.add(key);
    return bits;
  };
  const result = new Map<string, OnnxStorage>();
  for (const [name, input, layout] of modules) {
    const { outFeatures: rows, inFeatures, blockSize, parts, order, meanGroups, transform } = layout;
    const scaleBits = layout.scaleDtype === 'F16' ? 16 : 32;
    let storedBits = rows * scaleBits * meanGroups.length + lowRankBits(layout);
    let runtimeBits = rows * 32 * meanGroups.length + 32 * (layout.lowRank?.rank ?? 0) * (rows + inFeatures);
    for (const part of parts) {
      const bytes = partRowBytes(part, blockSize);
      storedBits += rows * (8 * (bytes.stored + bytes.qzeros) + scaleBits * part.groups.length);
      runtimeBits += rows * (8 * (bytes.qweight + bytes.qzeros) + 32 * part.groups.length);
    }
    let indexBits = 0;
    if (transform?.permuted) indexBits += sharedBits(`${input} columns`, inFeatures * COLUMN_BITS);
    if (transform?.signed) indexBits += sharedBits(`${input} signs`, 8 * (inFeatures / signsPerByte(inFeatures)));
    for (const size of transform?.hadamard ? rotationSteps(transform.hadamard) : []) {
      if (sharedBits(`hadamard ${size}`, 1) === 0) continue;
      storedBits += hadamardBits(size);
      runtimeBits += 32 * size * size;
    }
    if (order) indexBits += sharedBits(`${input} order ${order} of ${blockSize}`, order.length * INDEX_BITS);
    const some = meanGroups.length > 0 && meanGroups.length < Math.ceil(inFeatures / blockSize);
    if (some) indexBits += sharedBits(`${input} means ${meanGroups} of ${blockSize}`, meanGroups.length * INDEX_BITS);
    result.set(name, { storedBits: storedBits + indexBits, runtimeBits: runtimeBits + indexBits });
  }
  return result;
}

/** Averages over modules. @param floatBits width of the float type, which counts when nothing is quantized */
export function summarizeStorage(
  modules: readonly ModuleStorage[],
  embeddings: readonly ModuleStorage[],
  floatBits: number,
): Storage {
  const weights = modules.reduce((sum, module) => sum + module.outFeatures * module.inFeatures, 0);
  if (weights === 0) return { modules, embeddings, averageBits: floatBits, bitsPerWeight: floatBits, lowRankBitsPerWeight: 0 };
  const averageBits = modules.reduce((sum, module) => sum + module.codeBits, 0) / weights;
  const bitsPerWeight = modules.reduce((sum, module) => sum + module.storedBits, 0) / weights;
  const branches = modules.reduce((sum, { lowRank }) => sum + (lowRank?.storedBits ?? 0), 0);
  return { modules, embeddings, averageBits, bitsPerWeight, lowRankBitsPerWeight: branches / weights };
}

function bitsOf(declarations: readonly TensorDeclaration[]): number {
  return declarations.reduce((sum, { dtype, shape }) => sum + 8 * byteLengthOf(dtype, shape), 0);
}
