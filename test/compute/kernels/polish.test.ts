import { describe, expect, test } from 'vitest';
import type { Grid } from '../../../src/compute/kernels/kernels.ts';
import { wasmKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { plainKernels } from '../../support/plain-kernels.ts';
import { outputEnergy } from '../../support/quantize-oracle.ts';
import { normals } from '../../support/reference-layer.ts';

/** `D` and the loss are carried along in float32. */
const DRIFT_TOLERANCE = 1e-5;

const wasm = wasmKernels();
const plain = plainKernels();

/** Random inputs' second moments plus a diagonal, (columns, columns). */
function randomHessian(columns: number, seed = 5): Float32Array {
  const tokens = columns + 8;
  const x = normals(seed, tokens * columns);
  return Float32Array.from({ length: columns * columns }, (_, at) => {
    const [i, j] = [Math.floor(at / columns), at % columns];
    let total = i === j ? 0.1 : 0;
    for (let t = 0; t < tokens; t++) total += (x[t * columns + i] * x[t * columns + j]) / tokens;
    return total;
  });
}

/** A group rounded to its min-max grid, with `D = (Wq - W) H`. */
function rounded(columns: number, rows: number, bits: number) {
  const values = Float32Array.from(normals(columns + rows, columns * rows), (w) => 0.02 * w);
  const group = { columns, rows, values };
  const grid = bits === 1 ? plain.twoLevelGrid(group, false) : plain.minMaxGrid(group, bits, false);
  const hessian = randomHessian(columns);
  const decoded = decode(plain.roundCodes(group, bits, grid), bits, grid);
  const gradient = new Float32Array(columns * rows);
  for (let k = 0; k < columns; k++) {
    for (let i = 0; i < rows; i++) {
      let d = 0;
      for (let j = 0; j < columns; j++) d += (decoded[j * rows + i] - values[j * rows + i]) * hessian[j * columns + k];
      gradient[k * rows + i] = d;
    }
  }
  return { values, grid, hessian, decoded, gradient };
}

function decode(codes: Uint8Array, bits: number, { scale, shift }: Grid): Float32Array {
  const rows = scale.length;
  return Float32Array.from(codes, (q, at) => {
    const i = at % rows;
    return bits === 1 ? shift[i] + Math.fround(scale[i] * q) : scale[i] * (q - shift[i]);
  });
}

/** `tr((Wq - W) H (Wq - W)^T)` of a group. */
function energy(decoded: Float32Array, values: Float32Array, hessian: Float32Array, columns: number): number {
  const rows = values.length / columns;
  const difference = Float64Array.from(
    { length: values.length },
    (_, at) =>
      decoded[(at % columns) * rows + Math.floor(at / columns)] - values[(at % columns) * rows + Math.floor(at / columns)],
  );
  return outputEnergy(difference, Float64Array.from(hessian), columns);
}

test('takes the vector from [0,-1,-1,1] to [-1,-1,-1,1], loss 2.36 to .76', () => {
  const hessian = Float32Array.of(4, 2, 1, 0, 2, 3, 1, 1, 1, 1, 2, 0.5, 0, 1, 0.5, 1);
  const w = [-0.4, -1.4, -1.4, 1.6];
  const start = [0, -1, -1, 1];
  const rows = 3;
  const spread = (row: readonly number[]) => Float32Array.from(row.flatMap((x) => new Array<number>(rows).fill(x)));
  const decoded = spread(start);
  const gradient = spread([0, 1, 2, 3].map((k) => start.reduce((sum, wq, j) => sum + (wq - w[j]) * hessian[j * 4 + k], 0)));
  const grid = { scale: new Float32Array(rows).fill(1), shift: new Float32Array(rows).fill(1) };
  expect(energy(decoded, spread(w), hessian, 4) / rows).toBeCloseTo(2.36, 6);
  const { codes, changes } = wasm.polish(decoded, gradient, hessian, 2, grid);
  expect(decoded).toEqual(spread([-1, -1, -1, 1]));
  expect([...codes]).toEqual([...spread([0, 0, 0, 2])]);
  expect(changes).toEqual(spread([-1, 0, 0, 0]));
  expect(energy(decoded, spread(w), hessian, 4) / rows).toBeCloseTo(0.76, 6);
});

describe.each([1, 2, 3, 4, 8])('at %i bits', (bits) => {
  test.each([
    [1, 1],
    [7, 3],
    [32, 16],
    [33, 17],
    [5, 1025],
  ])('a group of %i columns and %i rows ends as its plain twin does, number for number', (columns, rows) => {
    const one = rounded(columns, rows, bits);
    const two = rounded(columns, rows, bits);
    expect(wasm.polish(one.decoded, one.gradient, one.hessian, bits, one.grid)).toEqual(
      plain.polish(two.decoded, two.gradient, two.hessian, bits, two.grid),
    );
    expect(one.decoded).toEqual(two.decoded);
    // Zeros may differ in sign where nothing moved.
    expect(one.gradient.map((d) => d + 0)).toEqual(two.gradient.map((d) => d + 0));
  });

  test('no sweep raises the loss, the gradient stays (Wq - W) H, and codes, changes and weights agree', () => {
    const { values, grid, hessian, decoded, gradient } = rounded(40, 10, bits);
    let loss = energy(decoded, values, hessian, 40);
    const start = loss;
    for (let sweep = 0; sweep < 4; sweep++) {
      const before = decoded.slice();
      const { codes, changes } = wasm.polish(decoded, gradient, hessian, bits, grid);
      expect(decoded).toEqual(decode(codes, bits, grid));
      expect(changes).toEqual(decoded.map((value, at) => value - before[at]));
      const now = energy(decoded, values, hessian, 40);
      expect(now).toBeLessThanOrEqual(loss * (1 + DRIFT_TOLERANCE));
      loss = now;
    }
    expect(loss).toBeLessThan(start * 0.99);
    const largest = gradient.reduce((most, d) => Math.max(most, Math.abs(d)), 0);
    for (let i = 0; i < 10; i++) {
      for (let k = 0; k < 40; k++) {
        let d = 0;
        for (let j = 0; j < 40; j++) d += (decoded[j * 10 + i] - values[j * 10 + i]) * hessian[j * 40 + k];
        expect(Math.abs(gradient[k * 10 + i] - d)).toBeLessThan(largest * DRIFT_TOLERANCE);
      }
    }
  });
});
