/** The Sylvester-Hadamard matrix in a graph: stored as its two Kronecker factors, which a runtime multiplies out once, when it loads the model. */
import type { Initializer } from '../../../formats/onnx/model.ts';
import type { GraphBuilder, Value } from '../../graph/builder.ts';
import { hadamardScale } from '../../methods/quantize/input-transform.ts';
import { asBytes } from '../tensor-bytes.ts';

/** Orders of the factors of the matrix of order `size`, a power of two: their product is `size`. */
function factorsOf(size: number): readonly [number, number] {
  const left = 2 ** Math.floor(Math.log2(size) / 2);
  return [left, size / left];
}

/** Whether a constant of a graph belongs to such a matrix. */
export function isHadamardFactor(name: string): boolean {
  return /^hadamard_\d+\.(left|right)$/.test(name);
}

/** Whether a value of a graph is such a matrix, multiplied out. */
export function isHadamardProduct(name: string): boolean {
  return /^\/hadamard_\d+\//.test(name);
}

/** Bits that the matrix of order `size` takes in a file. */
export function hadamardBits(size: number): number {
  const [left, right] = factorsOf(size);
  return 32 * (left * left + right * right);
}

/** F32 (size, size), entries +-`hadamardScale(size)`; the same constants each time. */
export function hadamardConstant(builder: GraphBuilder, size: number): Value {
  const [left, right] = factorsOf(size);
  const a = builder.initializer(factor(`hadamard_${size}.left`, left, [left, 1, left, 1], hadamardScale(size)));
  const b = builder.initializer(factor(`hadamard_${size}.right`, right, [1, right, 1, right], 1));
  return builder.rootScope(`hadamard_${size}`, () => builder.reshape(builder.mul(a, b), [size, size]));
}

function factor(name: string, size: number, shape: readonly number[], scale: number): Initializer {
  const data = asBytes(Float32Array.from({ length: size * size }, (_, i) => scale * sign(Math.floor(i / size) & (i % size))));
  const read = async (start = 0, end = data.byteLength) => data.subarray(start, end);
  return { name, dtype: 'F32', shape, byteLength: data.byteLength, read };
}

/** -1 for an odd number of ones among the bits. */
function sign(bits: number): number {
  let result = 1;
  for (let rest = bits; rest !== 0; rest &= rest - 1) result = -result;
  return result;
}

/** Whether `values` (size, size) are what `hadamardConstant` yields. */
export function isHadamard(values: ArrayLike<number>, size: number): boolean {
  const scale = hadamardScale(size);
  for (let i = 0; i < size * size; i++) {
    if (values[i] !== scale * sign(Math.floor(i / size) & (i % size))) return false;
  }
  return true;
}
