/** Reads quantized linears back from an ONNX graph that pcomp wrote: from its nodes and constants alone, to float32 as they multiply the model's own activations. */
import type { Attribute, Graph, Initializer, Node } from '../../../formats/onnx/model.ts';
import { FormatError } from '../../errors.ts';
import { untransformColumns } from '../../methods/quantize/input-transform.ts';
import { addBranch, factorBits, type LowRankShape } from '../../methods/quantize/low-rank.ts';
import { type OperandBits, unpackByteRows } from '../packing/byte-rows.ts';
import { factorRowBytes } from '../packing/factor-codes.ts';
import { transpose } from '../transpose.ts';
import { ConstantValues } from './constant-values.ts';
import { hadamardBits, rotationSteps } from './hadamard-constant.ts';
import { branchConstantNames, branchConstants } from './linear-initializers.ts';
import { integers, type StoredInputTransform, storedInput, transformOf } from './linear-input.ts';

/** One MatMulNBits of a linear, as the file has it. */
export interface StoredPart {
  readonly bits: OperandBits;
  readonly columns: number;
  readonly blockSize: number;
  /** Its groups, by their place in the transformed input. */
  readonly groups: readonly number[];
  /** As a runtime has them once it loaded the model. */
  read(): Promise<{ readonly qweight: Uint8Array; readonly scales: Float32Array; readonly qzeros: Uint8Array }>;
}

/** A linear as the file has it. */
export interface StoredLinear {
  readonly outFeatures: number;
  /** What the graph does to the input first. */
  readonly transform?: StoredInputTransform;
  /** Widest first. */
  readonly parts: readonly StoredPart[];
  readonly means?: { readonly groups: readonly number[]; read(): Promise<Float32Array> };
  /** Two products of the untouched input beside the others. */
  readonly lowRank?: StoredBranch;
  /** Bytes of every constant of its own; what it shares with other sites counts at the first of them. */
  readonly byteLength: number;
  /** The same as a runtime holds them. */
  readonly runtimeByteLength: number;
}

/** Constants of a branch: A^T (inFeatures, rank) and B^T (rank, outFeatures). */
interface StoredBranch extends LowRankShape {
  readonly inFeatures: number;
  read(): Promise<{ readonly down: Float32Array; readonly up: Float32Array }>;
}

const WEIGHT_NAME = /^(.*)\.MatMulNBits\.qweight(?:_\d)?(?:\.0)?$/;

/** The quantized linears of a graph by module name. Throws FormatError (`onnx-linear-*`) when the graph is not as pcomp writes it. */
export async function storedLinears(path: string, graph: Graph): Promise<Map<string, StoredLinear>> {
  const constants = new ConstantValues(path, graph);
  const bySite = new Map<string, Node[]>();
  const tables = new Map<string, Node>();
  for (const node of graph.nodes) {
    if (node.op === 'GatherBlockQuantized') {
      const module = moduleOf(constants, node.inputs[0]);
      if (module !== undefined) tables.set(module, node);
    }
    const site = node.op === 'MatMulNBits' ? moduleOf(constants, node.inputs[1]) : undefined;
    if (site !== undefined) bySite.set(site, [...(bySite.get(site) ?? []), node]);
  }
  const linears = new Map<string, StoredLinear>();
  // A table that an output head multiplies with too is read as the head's operand.
  for (const [module, node] of tables) linears.set(module, storedTable(path, graph, constants, module, node));
  const rotations = new Set<number>();
  for (const [site, nodes] of bySite) {
    const linear = await storedLinear(path, graph, constants, site, nodes);
    let { byteLength, runtimeByteLength } = linear;
    for (const size of linear.transform?.hadamard ? rotationSteps(linear.transform.hadamard) : []) {
      if (rotations.has(size)) continue;
      rotations.add(size);
      byteLength += hadamardBits(size) / 8;
      runtimeByteLength += 4 * size * size;
    }
    linears.set(site, { ...linear, byteLength, runtimeByteLength });
  }
  return linears;
}

/** An embedding: the operand of a linear whose rows are looked up. */
function storedTable(path: string, graph: Graph, constants: ConstantValues, module: string, node: Node): StoredLinear {
  const [outFeatures, blocks] = constants.root(node.inputs[0])!.shape;
  const groups = Array.from({ length: blocks }, (_, g) => g);
  const columns = blocks * integer(path, node, 'block_size');
  const names = [node.inputs[0], ...node.inputs.slice(2, 4)];
  const parts = [storedPart(path, constants, module, node, names, outFeatures, columns, groups)];
  return { outFeatures, parts, ...byteLengths(graph, module, outFeatures, parts, 0, undefined) };
}

function moduleOf(constants: ConstantValues, operand: string): string | undefined {
  const root = constants.root(operand);
  return root && WEIGHT_NAME.exec(root.name)?.[1];
}

/** @param names of the constants: codes, scales, zero points */
function storedPart(
  path: string,
  constants: ConstantValues,
  site: string,
  node: Node,
  names: readonly string[],
  outFeatures: number,
  columns: number,
  groups: readonly number[],
): StoredPart {
  const bits = integer(path, node, 'bits');
  if (bits !== 2 && bits !== 4 && bits !== 8)
    throw new FormatError(path, 'onnx-linear-bits', `${node.name} has ${bits} bits, operands have 2, 4 or 8`);
  const blockSize = integer(path, node, 'block_size');
  const missing = names.find((name) => !constants.root(name));
  if (missing !== undefined)
    throw new FormatError(path, 'onnx-linear-constant', `${site}: operand "${missing}" is not a constant of the graph`);
  const blocks = groups.length;
  const [qweight, scales, qzeros] = names;
  return {
    bits,
    columns,
    blockSize,
    groups,
    read: async () => ({
      qweight: await bytesOf(path, constants, qweight, (outFeatures * blocks * blockSize * bits) / 8),
      scales: await floatsOf(path, constants, scales, outFeatures * blocks),
      qzeros: await bytesOf(path, constants, qzeros, outFeatures * Math.ceil((blocks * bits) / 8)),
    }),
  };
}

/** Bytes of a linear's constants in the file and at run time, but for the matrix of a rotation. */
function byteLengths(
  graph: Graph,
  site: string,
  rows: number,
  parts: readonly StoredPart[],
  means: number,
  branch: StoredBranch | undefined,
): Pick<StoredLinear, 'byteLength' | 'runtimeByteLength'> {
  const sum = (names: (name: string) => boolean): number =>
    [...graph.initializers.values()].filter(({ name }) => names(name)).reduce((total, { byteLength }) => total + byteLength, 0);
  const indexNames = ['input_order', 'input_signs', 'group_order', 'mean_groups'].map((name) => `${site}.${name}`);
  const indices = sum((name) => indexNames.includes(name));
  const operands = parts.map(({ bits, blockSize, groups }) => {
    return rows * ((groups.length * blockSize * bits) / 8 + Math.ceil((groups.length * bits) / 8) + 4 * groups.length);
  });
  const factors = branch ? branch.rank * (branch.inFeatures + rows) : 0;
  const branchNamed = branchConstantNames(site);
  return {
    byteLength: indices + sum((name) => name.startsWith(`${site}.MatMulNBits.`) || branchNamed.includes(name)),
    runtimeByteLength: indices + operands.reduce((total, one) => total + one, 0) + 4 * (rows * means + factors),
  };
}

async function storedLinear(
  path: string,
  graph: Graph,
  constants: ConstantValues,
  site: string,
  nodes: readonly Node[],
): Promise<StoredLinear> {
  const outFeatures = integer(path, nodes[0], 'N');
  const counts = nodes.map((node) => Math.ceil(integer(path, node, 'K') / integer(path, node, 'block_size')));
  const total = counts.reduce((sum, count) => sum + count, 0);
  const { groupOrder, transform } = await storedInput(path, constants, site, nodes);
  const order = groupOrder ?? Array.from({ length: total }, (_, g) => g);
  if (order.length !== total || new Set(order).size !== total || order.some((g) => g < 0 || g >= total)) {
    throw new FormatError(path, 'onnx-linear-order', `${site}: its group order is no permutation of its ${total} groups`);
  }
  let first = 0;
  const parts = nodes.map((node, i): StoredPart => {
    const groups = order.slice(first, first + counts[i]);
    first += counts[i];
    return storedPart(path, constants, site, node, node.inputs.slice(1, 4), outFeatures, integer(path, node, 'K'), groups);
  });
  const means = await storedMeans(path, graph, constants, site, outFeatures, total);
  const lowRank = await storedBranch(path, graph, constants, site, outFeatures);
  const sizes = byteLengths(graph, site, outFeatures, parts, means?.groups.length ?? 0, lowRank);
  return { outFeatures, parts, ...sizes, ...(transform && { transform }), ...(means && { means }), ...(lowRank && { lowRank }) };
}

async function storedMeans(
  path: string,
  graph: Graph,
  constants: ConstantValues,
  site: string,
  outFeatures: number,
  total: number,
): Promise<StoredLinear['means']> {
  const values = graph.initializers.get(`${site}.MatMulNBits.means`);
  if (!values) return undefined;
  const matmul = graph.nodes.find((node) => node.op === 'MatMul' && constants.root(node.inputs[1]) === values);
  const gather = matmul ? constants.producer(matmul.inputs[0]) : undefined;
  const groups =
    gather?.op === 'Gather' ? await integers(constants, gather.inputs[1]) : Array.from({ length: total }, (_, g) => g);
  if (groups.some((g) => g < 0 || g >= total))
    throw new FormatError(path, 'onnx-linear-means', `${site}: a mean belongs to none of its ${total} groups`);
  return { groups, read: () => floatsOf(path, constants, values.name, groups.length * outFeatures) };
}

/** The branch beside a linear: throws FormatError `onnx-linear-branch` when its constants are there and nothing multiplies with them one after the other. */
async function storedBranch(
  path: string,
  graph: Graph,
  constants: ConstantValues,
  site: string,
  outFeatures: number,
): Promise<StoredBranch | undefined> {
  const names = branchConstants(site).find(({ down, up }) => graph.initializers.has(down) || graph.initializers.has(up));
  if (!names) return undefined;
  const [a, b] = [names.down, names.up].map((name) => graph.initializers.get(name));
  const productWith = (constant: Initializer | undefined, input?: string): Node | undefined =>
    graph.nodes.find(
      (node) =>
        node.op === 'MatMul' &&
        (input === undefined || node.inputs[0] === input) &&
        constant !== undefined &&
        constants.root(node.inputs[1]) === constant,
    );
  const inner = productWith(a);
  const outer = inner && productWith(b, inner.outputs[0]);
  const fail = (): FormatError =>
    new FormatError(
      path,
      'onnx-linear-branch',
      `${site}: "${names.down}" [${a?.shape.join(', ') ?? ''}] and "${names.up}" [${b?.shape.join(', ') ?? ''}] make no branch with ${outFeatures} outputs`,
    );
  if (!a || !b || !outer) throw fail();
  const dtype = names.storage ?? (a.dtype === 'F16' ? 'F16' : 'F32');
  const bits = factorBits(dtype);
  const coded = bits === 8 || bits === 4;
  const rank = a.shape[coded ? 0 : 1] ?? 0;
  const upShape = [rank, coded ? factorRowBytes(outFeatures, bits) : outFeatures];
  if (rank < 1 || b.shape.join() !== upShape.join()) throw fail();
  const inFeatures = coded ? await rowLength(constants, inner.inputs[1], a.shape[1] * (8 / bits)) : a.shape[0];
  return {
    rank,
    inFeatures,
    dtype,
    read: async () => ({
      down: await floatsOf(path, constants, inner.inputs[1], inFeatures * rank),
      up: await floatsOf(path, constants, outer.inputs[1], rank * outFeatures),
    }),
  };
}

/** Codes in a row of a factor: all that its bytes have, unless they are cut. */
async function rowLength(constants: ConstantValues, factor: string, most: number): Promise<number> {
  for (let node = constants.producer(factor); node; node = constants.producer(node.inputs[0]))
    if (node.op === 'Slice') return (await integers(constants, node.inputs[2]))[0];
  return most;
}

/** Decodes to float32 W (outFeatures, inFeatures): `scale * (code - zero)`, plus the mean of groups that have one; a transform of the input is folded in, a branch added. */
export async function decodeLinear(path: string, linear: StoredLinear, inFeatures: number): Promise<Float32Array> {
  const rows = linear.outFeatures;
  const weight = new Float32Array(rows * inFeatures);
  const covered = linear.parts.reduce((sum, part) => sum + part.groups.length, 0);
  const { blockSize } = linear.parts[0];
  if (covered !== Math.ceil(inFeatures / blockSize)) {
    throw new FormatError(path, 'onnx-linear-shape', `${covered} groups of ${blockSize} do not make ${inFeatures} columns`);
  }
  for (const part of linear.parts) {
    const blocks = part.groups.length;
    const { qweight, scales, qzeros } = await part.read();
    const codes = unpackByteRows(qweight, rows, blocks * blockSize, part.bits, (blocks * blockSize * part.bits) / 8);
    const zeros = unpackByteRows(qzeros, rows, blocks, part.bits, Math.ceil((blocks * part.bits) / 8));
    for (let row = 0; row < rows; row++) {
      for (let block = 0; block < blocks; block++) {
        const index = row * blocks + block;
        const column = part.groups[block] * blockSize;
        const count = Math.min(blockSize, inFeatures - column);
        const target = row * inFeatures + column;
        for (let k = 0; k < count; k++) weight[target + k] = scales[index] * (codes[index * blockSize + k] - zeros[index]);
      }
    }
  }
  if (linear.means) addMeans(weight, inFeatures, blockSize, linear.means.groups, await linear.means.read());
  const natural = linear.transform
    ? untransformColumns(transformOf(path, linear.transform, inFeatures), weight, rows, inFeatures)
    : weight;
  if (linear.lowRank) await applyBranch(path, natural, rows, inFeatures, linear.lowRank);
  return natural;
}

async function applyBranch(
  path: string,
  weight: Float32Array,
  rows: number,
  inFeatures: number,
  { rank, inFeatures: own, read }: StoredBranch,
): Promise<void> {
  if (own !== inFeatures) {
    throw new FormatError(path, 'onnx-linear-branch', `a branch reads ${own} columns beside codes of ${inFeatures}`);
  }
  const { down, up } = await read();
  const loraA = transpose(down, inFeatures, rank);
  addBranch(weight, rows, inFeatures, { rank, loraA, loraB: transpose(up, rank, rows) });
}

function addMeans(
  weight: Float32Array,
  inFeatures: number,
  blockSize: number,
  groups: readonly number[],
  means: Float32Array,
): void {
  const rows = weight.length / inFeatures;
  groups.forEach((g, i) => {
    for (let row = 0; row < rows; row++) {
      const mean = means[i * rows + row];
      const end = row * inFeatures + Math.min((g + 1) * blockSize, inFeatures);
      for (let k = row * inFeatures + g * blockSize; k < end; k++) weight[k] += mean;
    }
  });
}

async function bytesOf(path: string, constants: ConstantValues, name: string, count: number): Promise<Uint8Array> {
  const { values } = await constants.of(name);
  if (values instanceof Uint8Array && values.length === count) return values;
  throw wrongSize(path, name, values.length, count);
}

async function floatsOf(path: string, constants: ConstantValues, name: string, count: number): Promise<Float32Array> {
  const { values } = await constants.of(name);
  if (values instanceof Float32Array && values.length === count) return values;
  throw wrongSize(path, name, values.length, count);
}

function wrongSize(path: string, name: string, found: number, needed: number): FormatError {
  return new FormatError(
    path,
    'onnx-linear-size',
    `constant "${name}" has ${found} elements, its node needs ${needed} of another kind or number`,
  );
}

function integer(path: string, node: Node, name: string): number {
  const attribute: Attribute | undefined = node.attributes[name];
  if (attribute?.kind !== 'int')
    throw new FormatError(path, 'onnx-linear-attribute', `node ${node.name} has no integer attribute "${name}"`);
  const value = Number(attribute.value);
  if (!(value > 0))
    throw new FormatError(path, 'onnx-linear-attribute', `node ${node.name}: "${name}" is ${value}, it must be positive`);
  return value;
}
