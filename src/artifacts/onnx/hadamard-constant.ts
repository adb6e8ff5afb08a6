/** Hadamard matrices in a graph: each stored as two Kronecker factors, which a runtime multiplies out once, when it loads the model. */
import type { Initializer } from '../../../formats/onnx/model.ts';
import type { GraphBuilder, Value } from '../../graph/builder.ts';
import { hadamardScale, hadamardSign, sylvesterPart } from '../../methods/quantize/hadamard.ts';
import { asBytes } from '../tensor-bytes.ts';

/** The largest matrix that is multiplied with as one: 256 KB in float32. */
const LARGEST = 256;

/** Orders of the factors of the matrix of order `size`, as nearly the same as may be; the right one is a power of two. */
function factorsOf(size: number): readonly [number, number] {
  const right = Math.min(2 ** Math.ceil(Math.log2(size) / 2), sylvesterPart(size));
  return [size / right, right];
}

/**
 * Orders of the matrices that a rotation of `size` columns is a product with: one; or for a large one two, whose Kronecker product it is,
 * at a price of their sum a column instead of `size`.
 */
export function rotationSteps(size: number): readonly number[] {
  if (size <= LARGEST) return [size];
  // The scale of a product is the product of the scales where one of the two logarithms is even.
  let right = 4 ** Math.round(Math.log2(size) / 4);
  while (right > sylvesterPart(size)) right /= 4;
  return [size / right, right];
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
  const data = asBytes(
    Float32Array.from({ length: size * size }, (_, i) => scale * hadamardSign(size, Math.floor(i / size), i % size)),
  );
  const read = async (start = 0, end = data.byteLength) => data.subarray(start, end);
  return { name, dtype: 'F32', shape, byteLength: data.byteLength, read };
}

/** Whether `values` (size, size) are what `hadamardConstant` yields. */
export function isHadamard(values: ArrayLike<number>, size: number): boolean {
  const scale = hadamardScale(size);
  for (let i = 0; i < size * size; i++) {
    if (values[i] !== scale * hadamardSign(size, Math.floor(i / size), i % size)) return false;
  }
  return true;
}
