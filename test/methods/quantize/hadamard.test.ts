/** Hadamard matrices and the transforms made of them, against matrices multiplied out in float64. */
import { describe, expect, it } from 'vitest';
import { shapeOfKind, transformOf } from '../../../src/methods/quantize/best/prepared-input.ts';
import {
  hadamardScale,
  hadamardSign,
  hadamardWeightScale,
  isHadamardOrder,
  largestOrder,
  rotateRuns,
} from '../../../src/methods/quantize/hadamard.ts';
import {
  type InputTransform,
  shapeOfTransform,
  transformActivation,
  transformColumns,
  transformSymmetric,
  untransformColumns,
} from '../../../src/methods/quantize/input-transform.ts';
import { normals } from '../../support/reference-layer.ts';
import { randomWeight } from './support.ts';

const ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 224];

describe.each(ORDERS)('the Hadamard matrix of order %i', (order) => {
  it('is symmetric and has rows at right angles', () => {
    const row = (i: number) => Array.from({ length: order }, (_, j) => hadamardSign(order, i, j));
    for (let i = 0; i < order; i++) {
      for (let k = 0; k < order; k++) {
        expect(hadamardSign(order, i, k)).toBe(hadamardSign(order, k, i));
        const product = row(i).reduce((sum, value, j) => sum + value * hadamardSign(order, k, j), 0);
        expect(product).toBe(i === k ? order : 0);
      }
    }
  });

  it('is what runs are rotated with, and a shorter last run is left', () => {
    const values = normals(order, 2 * order + 1);
    const rotated = values.slice();
    rotateRuns(rotated, order, 0.5);
    for (let i = 0; i < 2 * order; i++) {
      const start = i - (i % order);
      let sum = 0;
      for (let j = 0; j < order; j++) sum += hadamardSign(order, i % order, j) * values[start + j];
      expect(rotated[i]).toBeCloseTo(sum / 2, 10);
    }
    if (order > 1) expect(rotated[2 * order]).toBe(values[2 * order]);
  });

  it('has scales whose product makes it its own inverse; the one of activations is exact', () => {
    expect(order * hadamardScale(order) * hadamardWeightScale(order)).toBeCloseTo(1, 15);
    expect(Number.isInteger(Math.log2(hadamardScale(order)))).toBe(true);
  });
});

describe('the order of a rotation over a whole input', () => {
  it.each([
    [256, 256],
    [768, 768],
    [5120, 5120],
    [14336, 14336],
    [11008, 256],
    [172, 4],
    [6, 2],
    [9, 1],
  ])('of %i columns is %i', (features, order) => {
    expect(largestOrder(features)).toBe(order);
    expect(isHadamardOrder(order)).toBe(true);
    expect(features % order).toBe(0);
  });

  it.each([0, 3, 6, 10, 36, 44, -4, 2.5])('is never %d', (size) => expect(isHadamardOrder(size)).toBe(false));
});

/** T as a matrix: what it does to each unit vector. */
function matrixOf(transform: InputTransform, n: number): Float64Array[] {
  const columns = Array.from({ length: n }, (_, j) => {
    const to = new Float64Array(n);
    transformActivation(
      transform,
      Float64Array.from({ length: n }, (__, i) => (i === j ? 1 : 0)),
      to,
    );
    return to;
  });
  return Array.from({ length: n }, (_, i) => Float64Array.from(columns, (column) => column[i]));
}

/** Last: columns of a run that are rotated together, the largest order there is a matrix of that divides them, or the group. */
const KINDS = [
  ['perm', 40, 16, 0],
  ['perm-had', 40, 16, 16],
  ['perm-had', 96, 32, 32],
  ['had', 96, 32, 96],
  ['had', 40, 16, 40],
  ['had', 44, 16, 4],
  ['had', 9, 8, 0],
] as const;

describe.each(KINDS)('the transform %s of %i columns in groups of %i', (kind, n, groupSize, hadamard) => {
  const samples = normals(3, 7 * n);
  const hessian = new Float64Array(n * n);
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) for (let t = 0; t < 7; t++) hessian[i * n + j] += samples[t * n + i] * samples[t * n + j];
  const input = { name: 'x', seed: 5, hessian, features: n };
  const transform = transformOf(kind, input, groupSize)!;

  it('consists of what its kind says', () => {
    const shape = { permuted: kind !== 'had', signed: kind === 'had', hadamard };
    expect(shapeOfTransform(transform)).toEqual(shape);
    expect(shapeOfKind(kind, groupSize, n)).toEqual(shape);
  });

  it('leaves the layer what it was: the float model and the transformed one agree to 1e-5', () => {
    const weight = randomWeight(5, n);
    const stored = transformColumns(transform, weight, 5, n);
    const to = new Float64Array(n);
    for (let t = 0; t < 7; t++) {
      const x = samples.subarray(t * n, (t + 1) * n);
      transformActivation(transform, x, to);
      for (let row = 0; row < 5; row++) {
        const own = (w: Float32Array, v: Float64Array) => v.reduce((sum, value, j) => sum + value * w[row * n + j], 0);
        expect(Math.abs(own(stored, to) - own(weight, x))).toBeLessThan(1e-5 * Math.abs(own(weight, x)) + 1e-7);
      }
    }
    const back = untransformColumns(transform, stored, 5, n);
    for (const [i, w] of weight.entries()) expect(Math.abs(back[i] - w)).toBeLessThan(1e-7);
  });

  it('turns second moments as it turns what they are of', () => {
    const turned = hessian.slice();
    transformSymmetric(transform, turned, n);
    const matrix = matrixOf(transform, n);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        let sum = 0;
        for (let a = 0; a < n; a++) for (let b = 0; b < n; b++) sum += matrix[i][a] * hessian[a * n + b] * matrix[j][b];
        expect(Math.abs(turned[i * n + j] - sum)).toBeLessThan(1e-9);
      }
    }
  });

  it('is the same for the same input and seed', () => {
    expect(transformOf(kind, input, groupSize)).toEqual(transform);
    const other = transformOf(kind, { ...input, name: 'y' }, groupSize);
    if (kind === 'had') expect(other).not.toEqual(transform);
    else expect(other).toEqual(transform);
  });
});
