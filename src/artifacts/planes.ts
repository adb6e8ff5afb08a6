/** A quantized linear as the named tensors of the `planes` layout, version 1 (docs/formats.md), and back. */
import { fromFloat32, toFloat32 } from '../../formats/dtype.ts';
import type { Tensor, TensorDeclaration, TensorSource } from '../../formats/tensor.ts';
import { FormatError } from '../errors.ts';
import { type InputTransform, shapeOfTransform, type TransformShape } from '../methods/quantize/input-transform.ts';
import {
  branchCodes,
  branchOfCodes,
  type FactorStorage,
  type LowRankBranch,
  type LowRankShape,
} from '../methods/quantize/low-rank.ts';
import type { QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import { groupCount } from '../methods/quantize/quantized-linear.ts';
import { readExpected } from './expected-tensor.ts';
import { packPlanes, planeWordCount, unpackPlanes } from './packing/bit-planes.ts';
import { factorRowBytes, packFactor, unpackFactor } from './packing/factor-codes.ts';
import type { QuantizedModule } from './quant-metadata.ts';
import { checkedOrder } from './stored-order.ts';
import { asBytes, asWords } from './tensor-bytes.ts';

/** Everything of a quantized linear but its codes: small, and enough to lay out or account for an artifact. */
export type QuantizedGrid = Omit<QuantizedLinear, 'codes'>;

/** Rows, columns, and the width of every group. */
export type CodeShape = Pick<QuantizedLinear, 'outFeatures' | 'inFeatures' | 'groupSize' | 'bits' | 'scaleDtype'>;

/** The shape of a quantized linear: what the size and the names of its tensors depend on. */
export type QuantizedShape = CodeShape & {
  readonly transform?: TransformShape;
  readonly lowRank?: LowRankShape;
};

/** The shape of a linear that is at hand. */
export function shapeOfGrid({ transform, ...rest }: QuantizedGrid): QuantizedShape {
  return transform ? { ...rest, transform: shapeOfTransform(transform) } : rest;
}

/** Suffixes of the tensors that stand for `<module>.weight`. */
const SUFFIXES = {
  bits: '.pq_bits',
  codes: '.pq_codes',
  scales: '.pq_scales',
  zeros: '.pq_zeros',
  offsets: '.pq_offsets',
  order: '.pq_perm',
  signs: '.pq_signs',
  loraA: '.lora_A.weight',
  loraB: '.lora_B.weight',
  ...codeSuffixes('A'),
  ...codeSuffixes('B'),
} as const;

/** Of a factor in codes: (rank, bytes of a row), one row a component, and their steps. */
function codeSuffixes<Side extends 'A' | 'B'>(side: Side) {
  return {
    [`codes8${side}`]: `.lora_${side}.codes_8`,
    [`codes4${side}`]: `.lora_${side}.codes_4`,
    [`steps${side}`]: `.lora_${side}.scales`,
  } as { readonly [Key in `${'codes8' | 'codes4' | 'steps'}${Side}`]: string };
}

/** Names of the tensors that hold module `name`: what may be there. */
export const PLANES_SUFFIXES: readonly string[] = Object.values(SUFFIXES);
/** Those of its branch. */
export const LOW_RANK_SUFFIXES: readonly string[] = PLANES_SUFFIXES.filter((suffix) => suffix.startsWith('.lora_'));

/** Width of group `g` in columns: the last one may be short. */
function groupColumns(shape: CodeShape, g: number): number {
  return Math.min(shape.groupSize, shape.inFeatures - g * shape.groupSize);
}

/** Words of all code planes and of all zero points. */
function wordCounts(shape: CodeShape): { codes: number; zeros: number } {
  let codes = 0;
  let zeros = 0;
  shape.bits.forEach((bits, g) => {
    codes += planeWordCount(shape.outFeatures, groupColumns(shape, g), bits);
    if (bits >= 2) zeros += planeWordCount(1, shape.outFeatures, bits);
  });
  return { codes, zeros };
}

/**
 * Headers of the tensors that hold module `name`; tensors without elements are omitted. Order and signs of the columns are among them where `shape` has
 * such a transform: of modules that share an input only the first should.
 */
export function planesDeclarations(name: string, shape: QuantizedShape): TensorDeclaration[] {
  const { codes, zeros } = wordCounts(shape);
  const stored = shape.bits.filter((bits) => bits >= 1).length;
  const oneBit = shape.bits.filter((bits) => bits === 1).length;
  const all: TensorDeclaration[] = [
    { name: name + SUFFIXES.bits, dtype: 'U8', shape: [shape.bits.length] },
    { name: name + SUFFIXES.codes, dtype: 'I32', shape: [codes] },
    { name: name + SUFFIXES.scales, dtype: shape.scaleDtype, shape: [stored, shape.outFeatures] },
    { name: name + SUFFIXES.zeros, dtype: 'I32', shape: [zeros] },
    { name: name + SUFFIXES.offsets, dtype: shape.scaleDtype, shape: [oneBit, shape.outFeatures] },
  ];
  if (shape.transform?.permuted) all.push(orderDeclaration(name, shape.inFeatures));
  if (shape.transform?.signed) all.push(signsDeclaration(name, shape.inFeatures));
  if (shape.lowRank) all.push(...branchDeclarations(name, shape, shape.lowRank));
  return all.filter((tensor) => tensor.shape.every((dim) => dim > 0));
}

function branchDeclarations(
  name: string,
  { outFeatures, inFeatures }: Pick<QuantizedShape, 'outFeatures' | 'inFeatures'>,
  { rank, dtype }: LowRankShape,
): TensorDeclaration[] {
  if (dtype === 'Q8' || dtype === 'Q4') {
    const bits = dtype === 'Q8' ? 8 : 4;
    return (['A', 'B'] as const).flatMap((side) => [
      {
        name: name + SUFFIXES[`codes${bits}${side}`],
        dtype: 'U8',
        shape: [rank, factorRowBytes(side === 'A' ? inFeatures : outFeatures, bits)],
      },
      { name: name + SUFFIXES[`steps${side}`], dtype: 'F16', shape: [rank, 1] },
    ]);
  }
  return [
    { name: name + SUFFIXES.loraA, dtype, shape: [rank, inFeatures] },
    { name: name + SUFFIXES.loraB, dtype, shape: [outFeatures, rank] },
  ];
}

function orderDeclaration(name: string, columns: number): TensorDeclaration {
  return { name: name + SUFFIXES.order, dtype: 'I32', shape: [columns] };
}

/** A bit a column. */
function signsDeclaration(name: string, columns: number): TensorDeclaration {
  return { name: name + SUFFIXES.signs, dtype: 'I32', shape: [planeWordCount(1, columns, 1)] };
}

/** All columns as one row of codes of one bit. */
function signWindow(signs: Uint8Array) {
  return { codes: signs, offset: 0, stride: signs.length, rows: 1, columns: signs.length };
}

/** Tensors of module `name`, in the order of `planesDeclarations`. */
export function encodePlanes(name: string, q: QuantizedLinear): Tensor[] {
  const { outFeatures: rows, inFeatures, groupSize, bits } = q;
  const counts = wordCounts(q);
  const codes = new Uint32Array(counts.codes);
  const zeros = new Uint32Array(counts.zeros);
  const zeroRow = new Uint8Array(rows);
  const zeroWindow = { codes: zeroRow, offset: 0, stride: rows, rows: 1, columns: rows };
  let codeWord = 0;
  let zeroWord = 0;
  bits.forEach((width, g) => {
    const window = { codes: q.codes, offset: g * groupSize, stride: inFeatures, rows, columns: groupColumns(q, g) };
    codeWord = packPlanes(window, width, codes, codeWord);
    if (width < 2) return;
    for (let row = 0; row < rows; row++) zeroRow[row] = q.zeroPoints[row * bits.length + g];
    zeroWord = packPlanes(zeroWindow, width, zeros, zeroWord);
  });
  const data: Record<string, Uint8Array> = {
    [name + SUFFIXES.bits]: q.bits,
    [name + SUFFIXES.codes]: asBytes(codes),
    [name + SUFFIXES.scales]: fromFloat32(
      q.scaleDtype,
      groupRows(q.scales, q, (width) => width >= 1),
    ),
    [name + SUFFIXES.zeros]: asBytes(zeros),
    [name + SUFFIXES.offsets]: q.offsets
      ? fromFloat32(
          q.scaleDtype,
          groupRows(q.offsets, q, (width) => width === 1),
        )
      : new Uint8Array(0),
    ...(q.transform?.order ? { [name + SUFFIXES.order]: asBytes(q.transform.order) } : {}),
    ...(q.transform?.signs ? { [name + SUFFIXES.signs]: packSigns(q.transform.signs) } : {}),
    ...(q.lowRank ? branchData(name, q.lowRank) : {}),
  };
  return planesDeclarations(name, shapeOfGrid(q)).map((declared) => {
    const bytes = data[declared.name];
    return { ...declared, byteLength: bytes.byteLength, data: bytes };
  });
}

function branchData(name: string, branch: LowRankBranch): Record<string, Uint8Array> {
  const { rank, dtype, loraA, loraB, scales } = branch;
  if (dtype === 'F16' || dtype === 'F32')
    return { [name + SUFFIXES.loraA]: fromFloat32(dtype, loraA), [name + SUFFIXES.loraB]: fromFloat32(dtype, loraB) };
  const bits = dtype === 'Q8' ? 8 : 4;
  const { a, b } = branchCodes(branch);
  return {
    [name + SUFFIXES[`codes${bits}A`]]: packFactor(a, rank, bits),
    [name + SUFFIXES.stepsA]: fromFloat32('F16', scales!.a),
    [name + SUFFIXES[`codes${bits}B`]]: packFactor(b, rank, bits),
    [name + SUFFIXES.stepsB]: fromFloat32('F16', scales!.b),
  };
}

/** Turns (outFeatures, groups) into (chosen groups, outFeatures). */
function groupRows(values: Float32Array, shape: CodeShape, chosen: (bits: number) => boolean): Float32Array {
  const groups = [...shape.bits.keys()].filter((g) => chosen(shape.bits[g]));
  const rows = shape.outFeatures;
  const result = new Float32Array(groups.length * rows);
  groups.forEach((g, i) => {
    for (let row = 0; row < rows; row++) result[i * rows + row] = values[row * shape.bits.length + g];
  });
  return result;
}

/** Reverse of `groupRows`: the other groups are `rest`. */
function columnsOfGroups(values: Float32Array, shape: CodeShape, chosen: (bits: number) => boolean, rest: number): Float32Array {
  const rows = shape.outFeatures;
  const groups = shape.bits.length;
  const result = new Float32Array(rows * groups).fill(rest);
  let source = 0;
  shape.bits.forEach((bits, g) => {
    if (!chosen(bits)) return;
    for (let row = 0; row < rows; row++) result[row * groups + g] = values[source++];
  });
  return result;
}

/** What the metadata says of a module. */
export type PlanesModule = Pick<QuantizedModule, 'outFeatures' | 'inFeatures' | 'groupSize' | 'input' | 'transform' | 'rank'>;

/** Reads the widths of module `name`, and the dtype of its scales from the headers. Throws FormatError when they contradict the metadata. */
export async function readPlanesShape(source: TensorSource, name: string, module: PlanesModule): Promise<QuantizedShape> {
  const groups = groupCount(module.inFeatures, module.groupSize);
  const bits = (await readExpected(source, { name: name + SUFFIXES.bits, dtype: 'U8', shape: [groups] })).slice();
  const wide = bits.find((width) => width > 8);
  if (wide !== undefined) {
    throw new FormatError(
      source.path,
      'planes-width',
      `tensor "${name}${SUFFIXES.bits}" has a width of ${wide} bits, the most is 8`,
    );
  }
  const scaleDtype = source.tensors.get(name + SUFFIXES.scales)?.dtype === 'F32' ? 'F32' : 'F16';
  const { outFeatures, inFeatures, groupSize, transform, rank } = module;
  const shape = { outFeatures, inFeatures, groupSize, bits, scaleDtype, ...(transform && { transform }) } as const;
  if (rank === undefined) return shape;
  return { ...shape, lowRank: { rank, dtype: storageOf(source, name) } };
}

function storageOf({ tensors }: TensorSource, name: string): FactorStorage {
  if (tensors.has(name + SUFFIXES.codes8A)) return 'Q8';
  if (tensors.has(name + SUFFIXES.codes4A)) return 'Q4';
  return tensors.get(name + SUFFIXES.loraA)?.dtype === 'F32' ? 'F32' : 'F16';
}

/** Reads module `name` without its codes. */
export async function readPlanesGrid(source: TensorSource, name: string, module: PlanesModule): Promise<QuantizedGrid> {
  const { transform: stored, lowRank: branch, ...shape } = await readPlanesShape(source, name, module);
  const declared = new Map(planesDeclarations(name, shape).map((tensor) => [tensor.name, tensor]));
  const read = async (suffix: string): Promise<Uint8Array> => {
    const declaration = declared.get(name + suffix);
    return declaration ? readExpected(source, declaration) : new Uint8Array(0);
  };
  const { outFeatures: rows, bits } = shape;
  const scales = toFloat32(shape.scaleDtype, await read(SUFFIXES.scales));
  const words = asWords(await read(SUFFIXES.zeros));
  const zeroPoints = new Uint8Array(rows * bits.length);
  let position = 0;
  bits.forEach((width, g) => {
    if (width < 2) return;
    const zeroRow = new Uint8Array(rows);
    position = unpackPlanes({ codes: zeroRow, offset: 0, stride: rows, rows: 1, columns: rows }, width, words, position);
    for (let row = 0; row < rows; row++) zeroPoints[row * bits.length + g] = zeroRow[row];
  });
  const transform = stored && (await readTransform(source, module, stored));
  const grid = {
    ...shape,
    scales: columnsOfGroups(scales, shape, (width) => width >= 1, 1),
    zeroPoints,
    ...(transform && { transform }),
    ...(branch && { lowRank: await readBranch(source, name, shape, branch) }),
  };
  if (!bits.includes(1)) return grid;
  const offsets = toFloat32(shape.scaleDtype, await read(SUFFIXES.offsets));
  return { ...grid, offsets: columnsOfGroups(offsets, shape, (width) => width === 1, 0) };
}

async function readBranch(
  source: TensorSource,
  name: string,
  shape: Pick<QuantizedShape, 'outFeatures' | 'inFeatures'>,
  branch: LowRankShape,
): Promise<LowRankBranch> {
  const { rank, dtype } = branch;
  if (dtype === 'Q8' || dtype === 'Q4') {
    const bits = dtype === 'Q8' ? 8 : 4;
    const [a, ofA, b, ofB] = branchDeclarations(name, shape, branch);
    const codes = async (declared: TensorDeclaration, length: number) =>
      unpackFactor(await readExpected(source, declared), rank, length, bits);
    const scales = async (declared: TensorDeclaration) => toFloat32('F16', await readExpected(source, declared));
    return branchOfCodes(
      branch,
      { a: await codes(a, shape.inFeatures), b: await codes(b, shape.outFeatures) },
      { a: await scales(ofA), b: await scales(ofB) },
    );
  }
  const [a, b] = branchDeclarations(name, shape, branch);
  const loraA = toFloat32(dtype, await readExpected(source, a));
  return { ...branch, loraA, loraB: toFloat32(dtype, await readExpected(source, b)) };
}

function packSigns(signs: Uint8Array): Uint8Array {
  const words = new Uint32Array(planeWordCount(1, signs.length, 1));
  packPlanes(signWindow(signs), 1, words, 0);
  return asBytes(words);
}

/** Order and signs of a module's input, which lie with the first module that reads it. */
async function readTransform(
  source: TensorSource,
  module: PlanesModule,
  { permuted, signed, hadamard }: TransformShape,
): Promise<InputTransform> {
  return {
    ...(permuted && { order: await readOrder(source, module) }),
    ...(signed && { signs: await readSigns(source, module) }),
    hadamard,
  };
}

async function readSigns(source: TensorSource, { input, inFeatures }: PlanesModule): Promise<Uint8Array> {
  const signs = new Uint8Array(inFeatures);
  unpackPlanes(signWindow(signs), 1, asWords(await readExpected(source, signsDeclaration(input, inFeatures))), 0);
  return signs;
}

async function readOrder(source: TensorSource, { input, inFeatures }: PlanesModule): Promise<Uint32Array> {
  const declared = orderDeclaration(input, inFeatures);
  const words = asWords(await readExpected(source, declared));
  return checkedOrder(source.path, `tensor "${declared.name}"`, Int32Array.from(words), inFeatures);
}

/** Reads module `name`. Throws FormatError with a `planes-*` rule when a tensor is missing or has the wrong shape. */
export async function readPlanes(source: TensorSource, name: string, module: PlanesModule): Promise<QuantizedLinear> {
  const grid = await readPlanesGrid(source, name, module);
  const { outFeatures: rows, inFeatures, groupSize, bits } = grid;
  const count = wordCounts(grid).codes;
  const packed =
    count > 0 ? await readExpected(source, { name: name + SUFFIXES.codes, dtype: 'I32', shape: [count] }) : new Uint8Array(0);
  const words = asWords(packed);
  const codes = new Uint8Array(rows * inFeatures);
  let position = 0;
  bits.forEach((width, g) => {
    position = unpackPlanes(
      { codes, offset: g * groupSize, stride: inFeatures, rows, columns: groupColumns(grid, g) },
      width,
      words,
      position,
    );
  });
  return { ...grid, codes };
}
