/** Follows what the operands of a linear multiply back to its input: how the graph sorts, rotates and splits it. */
import type { Node } from '../../../formats/onnx/model.ts';
import { FormatError } from '../../errors.ts';
import type { InputTransform } from '../../methods/quantize/input-transform.ts';
import { checkedOrder } from '../stored-order.ts';
import type { ConstantValues } from './constant-values.ts';
import { isHadamard, isHadamardProduct } from './hadamard-constant.ts';

/** The way from a linear's input to its operands, as the file has it. */
export interface StoredInput {
  /** Places of the groups, in the order in which the operands read them; absent: as they lie. */
  readonly groupOrder?: readonly number[];
  readonly transform?: StoredInputTransform;
}

/** Rotation, signs and order of the columns; whether the order is a permutation is known only with the number of columns. */
export interface StoredInputTransform {
  readonly hadamard: number;
  /** Factors of the columns, 1 or -1; absent: none. */
  readonly signs?: { readonly name: string; readonly factors: Float32Array };
  /** Absent: columns stay where they are. */
  readonly order?: { readonly name: string; readonly columns: Int32Array };
}

/**
 * @param operands the linear's MatMulNBits nodes
 * @throws FormatError `onnx-linear-rotation`, `onnx-linear-constant`
 */
export async function storedInput(
  path: string,
  constants: ConstantValues,
  site: string,
  operands: readonly Node[],
): Promise<StoredInput> {
  let value = operands[0].inputs[0];
  if (operands.length > 1) {
    const split = constants.producer(value);
    if (split?.op === 'Split') value = split.inputs[0];
  }
  let groupOrder: readonly number[] | undefined;
  const groups = behindReshape(constants, value, 'Gather', (name) => name.endsWith('.group_order'));
  if (groups) {
    groupOrder = await integers(constants, groups.inputs[1]);
    value = constants.producer(groups.inputs[0])?.inputs[0] ?? '';
  }
  const pad = constants.producer(value);
  if (pad?.op === 'Pad') value = pad.inputs[0];
  const transform = await storedTransform(path, constants, site, value);
  return { ...(groupOrder && { groupOrder }), ...(transform && { transform }) };
}

async function storedTransform(
  path: string,
  constants: ConstantValues,
  site: string,
  start: string,
): Promise<StoredInputTransform | undefined> {
  let value = start;
  // A short last group goes around the rotation.
  const joined = constants.producer(value);
  const split = joined?.op === 'Concat' ? constants.producer(joined.inputs[1]) : undefined;
  const around = split?.op === 'Split' && joined?.inputs.length === 2;
  const rotation = storedRotation(constants, around ? joined.inputs[0] : value);
  let hadamard = rotation ? 1 : 0;
  for (const matrix of rotation?.matrices ?? []) hadamard *= await rotationSize(path, constants, site, matrix);
  if (rotation) value = around ? split.inputs[0] : rotation.input;
  let signs: StoredInputTransform['signs'];
  const product = constants.producer(value);
  if (product?.op === 'Mul' && constants.root(product.inputs[1])?.name.endsWith('.input_signs')) {
    const { values } = await constants.of(product.inputs[1]);
    signs = { name: product.inputs[1], factors: Float32Array.from(values, Number) };
    [value] = product.inputs;
  }
  const signed = signs && { signs };
  const columns = constants.producer(value);
  const gather = columns?.op === 'Transpose' ? constants.producer(columns.inputs[0]) : undefined;
  if (gather?.op === 'Gather' && gather.inputs[1].endsWith('.input_order')) {
    const [, name] = gather.inputs;
    return { hadamard, ...signed, order: { name, columns: Int32Array.from(await integers(constants, name)) } };
  }
  return hadamard > 0 || signs ? { hadamard, ...signed } : undefined;
}

/** A product with one matrix from the right, or with two from both sides, between two reshapes. */
function storedRotation(
  constants: ConstantValues,
  value: string,
): { readonly matrices: readonly string[]; readonly input: string } | undefined {
  const one = behindReshape(constants, value, 'MatMul', isHadamardProduct);
  const left = one ? undefined : behindReshape(constants, value, 'MatMul', () => true);
  const right = left && isHadamardProduct(left.inputs[0]) ? constants.producer(left.inputs[1]) : undefined;
  const last = one ?? (right?.op === 'MatMul' && isHadamardProduct(right.inputs[1]) ? right : undefined);
  if (!last) return undefined;
  const matrices = [...(left ? [left.inputs[0]] : []), last.inputs[1]];
  return { matrices, input: constants.producer(last.inputs[0])?.inputs[0] ?? '' };
}

/** The transform of an input of `inFeatures` columns. Throws FormatError `columns-order` when its order is no permutation of them, `columns-signs` when it has other signs than for them. */
export function transformOf(path: string, { hadamard, signs, order }: StoredInputTransform, inFeatures: number): InputTransform {
  if (signs && signs.factors.length !== inFeatures) {
    const { length } = signs.factors;
    throw new FormatError(path, 'columns-signs', `"${signs.name}" has ${length} signs, its input has ${inFeatures} columns`);
  }
  return {
    hadamard,
    ...(signs && { signs: Uint8Array.from(signs.factors, (factor) => (factor < 0 ? 1 : 0)) }),
    ...(order && { order: checkedOrder(path, `constant "${order.name}"`, order.columns, inFeatures) }),
  };
}

/** The node of that kind whose output is reshaped to `value`, when its second operand has such a name. */
function behindReshape(
  constants: ConstantValues,
  value: string,
  op: string,
  isSecond: (name: string) => boolean,
): Node | undefined {
  const reshape = constants.producer(value);
  const node = reshape?.op === 'Reshape' ? constants.producer(reshape.inputs[0]) : undefined;
  return node?.op === op && isSecond(node.inputs[1]) ? node : undefined;
}

async function rotationSize(path: string, constants: ConstantValues, site: string, matrix: string): Promise<number> {
  const { shape, values } = await constants.of(matrix);
  const [size] = shape;
  if (shape.length === 2 && shape[1] === size && isHadamard(values as Float32Array, size)) return size;
  throw new FormatError(
    path,
    'onnx-linear-rotation',
    `${site}: its input is rotated by "${matrix}" [${shape.join(', ')}], which is no Hadamard matrix`,
  );
}

/** A vector of integers among the constants. */
export async function integers(constants: ConstantValues, name: string): Promise<number[]> {
  return Array.from((await constants.of(name)).values, Number);
}
