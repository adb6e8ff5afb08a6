import { readFile } from 'node:fs/promises';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { buildKernels } from '../../../scripts/build-kernels.mjs';
import { KERNELS_WASM } from '../../../src/compute/kernels/kernels.generated.ts';
import type { Grid, Group } from '../../../src/compute/kernels/kernels.ts';
import { wasmKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { plainKernels } from '../../support/plain-kernels.ts';
import { FACTORS, minMaxGrid, searchedGrid, searchLoss } from '../../support/quantize-oracle.ts';
import { normals } from '../../support/reference-layer.ts';

/** How much worse than the best the chosen scale may be: the kernel's power function is right to 5e-6. */
const SEARCH_TOLERANCE = 1e-5;

const wasm = wasmKernels();
const plain = plainKernels();
const GRID_VECTOR = [-0.9, -0.2, 0.1, 0.3, 1.1, 0.05, -0.4, 0.7];

function randomGroup(columns: number, rows: number, seed = 1, scale = 0.02): Group {
  const z = normals(seed, 2 * columns * rows);
  const values = Float32Array.from({ length: columns * rows }, (_, i) => scale * z[2 * i] * Math.exp(0.5 * z[2 * i + 1]));
  return { columns, rows, values };
}

/** Rows 1, 2, ... repeat these values, so that every lane sees them. */
function groupOfRow(row: readonly number[], rows: number): Group {
  return { columns: row.length, rows, values: Float32Array.from(row.flatMap((w) => new Array<number>(rows).fill(w))) };
}

/** A fresh upper triangle with a diagonal near 1. */
function randomUpper(columns: number, seed = 2): Float32Array {
  const z = normals(seed, columns * columns);
  return Float32Array.from({ length: columns * columns }, (_, i) => {
    const [row, column] = [Math.floor(i / columns), i % columns];
    if (column < row) return 0;
    return column === row ? 1 + 0.2 * Math.abs(z[i]) : 0.1 * z[i];
  });
}

function gridFor(group: Group, bits: number, symmetric = false): Grid {
  return bits === 1 ? plain.twoLevelGrid(group, symmetric) : plain.minMaxGrid(group, bits, symmetric);
}

/** Odd sizes, one lane, whole lanes, and more rows than one slice holds. */
const SHAPES = [
  [1, 1],
  [7, 3],
  [32, 16],
  [33, 17],
  [5, 1025],
] as const;

describe.each(SHAPES)('on a group of %i columns and %i rows, WASM agrees with its plain twin', (columns, rows) => {
  const group = randomGroup(columns, rows);

  test.each([2, 3, 4, 5, 8])('on min-max grids of %i bits', (bits) => {
    for (const symmetric of [false, true]) {
      expect(wasm.minMaxGrid(group, bits, symmetric)).toEqual(plain.minMaxGrid(group, bits, symmetric));
    }
  });

  test('on grids of two levels', () => {
    for (const symmetric of [false, true])
      expect(wasm.twoLevelGrid(group, symmetric)).toEqual(plain.twoLevelGrid(group, symmetric));
  });

  test.each([1, 2, 3, 4, 7, 8])('on rounded codes of %i bits', (bits) => {
    const grid = gridFor(group, bits);
    expect(wasm.roundCodes(group, bits, grid)).toEqual(plain.roundCodes(group, bits, grid));
  });

  test.each([1, 2, 3, 8])('on every code and error of GPTQ at %i bits', (bits) => {
    const grid = gridFor(group, bits);
    const widths = new Uint8Array(columns).fill(bits);
    const upper = randomUpper(columns);
    expect(wasm.compensate(group, upper, widths, grid)).toEqual(plain.compensate(group, upper, widths, grid));
  });

  test('on GPTQ with another width and grid for each column', () => {
    const widths = Uint8Array.from({ length: columns }, (_, j) => 1 + ((j * 3) % 8));
    const grids = Array.from(widths, (bits) => gridFor(group, bits));
    const grid = {
      scale: Float32Array.from(grids.flatMap((g) => [...g.scale])),
      shift: Float32Array.from(grids.flatMap((g) => [...g.shift])),
    };
    const upper = randomUpper(columns);
    expect(wasm.compensate(group, upper, widths, grid)).toEqual(plain.compensate(group, upper, widths, grid));
  });
});

describe('scale search', () => {
  test.each([2, 3, 4, 8])('finds the best of 101 factors at %i bits, as far as the loss can tell', (bits) => {
    for (const [columns, rows, size] of [
      [128, 40, 0.02],
      [31, 21, 1e-8],
      [1, 5, 3],
    ] as const) {
      const group = randomGroup(columns, rows, 3 + bits, size);
      const grid = wasm.minMaxGrid(group, bits, false);
      const scales = wasm.searchScales(group, bits, grid);
      for (let i = 0; i < rows; i++) {
        const row = Float64Array.from({ length: columns }, (_, j) => group.values[j * rows + i]);
        const start = minMaxGrid(row, bits);
        const best = Math.min(...FACTORS.map((factor) => searchLoss(row, start, factor)));
        const chosen = searchLoss(row, start, scales[i] / start.scale);
        // A single weight is hit exactly: only the float32 of the scale is then left of the error.
        const floor = columns * (Math.abs(start.scale) * 2 ** bits * 2 ** -22) ** 2.4;
        expect(chosen).toBeLessThanOrEqual(best * (1 + SEARCH_TOLERANCE) + floor);
      }
    }
  });

  test('multiplies the scale of the vector by 0.914, on every lane', () => {
    const group = groupOfRow(GRID_VECTOR, 9);
    const grid = wasm.minMaxGrid(group, 2, false);
    expect(grid.scale[4]).toBeCloseTo(0.6666667, 7);
    expect(grid.shift[4]).toBe(1);
    expect([...wasm.roundCodes(group, 2, grid)].filter((_, i) => i % 9 === 4)).toEqual([0, 1, 1, 1, 3, 1, 0, 2]);
    for (const scale of wasm.searchScales(group, 2, grid)) expect(scale / grid.scale[0]).toBeCloseTo(0.914, 6);
  });

  test('weighs each element as told', () => {
    const group = randomGroup(24, 10, 8);
    const grid = wasm.minMaxGrid(group, 2, false);
    const weights = Float32Array.from({ length: 240 }, (_, i) => (i % 7 === 0 ? 20 : 1));
    const scales = wasm.searchScales(group, 2, grid, weights);
    expect(scales).not.toEqual(wasm.searchScales(group, 2, grid));
    for (let i = 0; i < 10; i++) {
      const column = (values: Float32Array) => Float64Array.from({ length: 24 }, (_, j) => values[j * 10 + i]);
      const row = column(group.values);
      const start = minMaxGrid(row, 2);
      const losses = FACTORS.map((factor) => searchLoss(row, start, factor, column(weights)));
      expect(searchLoss(row, start, scales[i] / start.scale, column(weights))).toBeLessThanOrEqual(
        Math.min(...losses) * (1 + SEARCH_TOLERANCE),
      );
    }
  });

  test('with weights of 1 chooses what it chooses without', () => {
    const group = randomGroup(40, 30, 9);
    const grid = wasm.minMaxGrid(group, 3, false);
    const ones = new Float32Array(1200).fill(1);
    expect(wasm.searchScales(group, 3, grid, ones)).toEqual(wasm.searchScales(group, 3, grid));
  });

  test('keeps the first of equal factors: a row of zeros keeps its scale', () => {
    const group = { columns: 4, rows: 2, values: new Float32Array(8) };
    const grid = wasm.minMaxGrid(group, 2, false);
    expect([...grid.scale, ...grid.shift]).toEqual([1, 1, 0, 0]);
    expect([...wasm.searchScales(group, 2, grid)]).toEqual([1, 1]);
  });
});

test('the oracle itself gives the vector: loss .16548320, squared error .29310978, .32361111 before the search', () => {
  const squared = (factor: number) => {
    const grid = minMaxGrid(GRID_VECTOR, 2);
    const s = grid.scale * factor;
    return GRID_VECTOR.reduce((sum, w) => {
      const q = Math.min(Math.max(Math.round(w / s) + grid.shift, 0), 3);
      return sum + (w - s * (q - grid.shift)) ** 2;
    }, 0);
  };
  const { factor } = searchedGrid(GRID_VECTOR, 2);
  expect(factor).toBeCloseTo(0.914, 12);
  expect(searchLoss(GRID_VECTOR, minMaxGrid(GRID_VECTOR, 2), factor)).toBeCloseTo(0.1654832, 8);
  expect(squared(factor)).toBeCloseTo(0.29310978, 8);
  expect(squared(1)).toBeCloseTo(0.32361111, 8);
});

test('the 1-bit vector: mean .09375, mean magnitude .46875, squared error 1.078125', () => {
  const group = groupOfRow(GRID_VECTOR, 5);
  const { scale, shift } = wasm.twoLevelGrid(group, false);
  expect(scale[3] / 2).toBeCloseTo(0.46875, 6);
  expect(shift[3] + scale[3] / 2).toBeCloseTo(0.09375, 6);
  const codes = wasm.roundCodes(group, 1, { scale, shift });
  const error = GRID_VECTOR.reduce((sum, w, j) => sum + (w - (shift[3] + scale[3] * codes[j * 5 + 3])) ** 2, 0);
  expect(error).toBeCloseTo(1.078125, 6);
});

test('halves round to even', () => {
  const group = groupOfRow([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], 4);
  const grid = { scale: new Float32Array(4).fill(1), shift: new Float32Array(4).fill(8) };
  expect([...wasm.roundCodes(group, 4, grid)].filter((_, i) => i % 4 === 0)).toEqual([6, 6, 8, 8, 10, 10]);
});

test('a weight in the middle takes the upper of two levels', () => {
  const group = groupOfRow([-1, 0, 1], 3);
  const codes = wasm.roundCodes(group, 1, { scale: new Float32Array(3).fill(2), shift: new Float32Array(3).fill(-1) });
  expect([...codes]).toEqual([0, 0, 0, 1, 1, 1, 1, 1, 1]);
});

test('a constant row is exact at 1 bit', () => {
  const group = groupOfRow([0.3, 0.3, 0.3], 4);
  const grid = wasm.twoLevelGrid(group, false);
  expect([...grid.shift]).toEqual(new Array(4).fill(Math.fround(0.3)));
  expect([...wasm.roundCodes(group, 1, grid)].every((code) => code === 0)).toBe(true);
});

test('a NaN among the weights reaches the scale of its row only', () => {
  const group = randomGroup(6, 8);
  group.values[2 * 8 + 5] = Number.NaN;
  const { scale } = wasm.minMaxGrid(group, 3, false);
  expect([...scale].map(Number.isNaN)).toEqual([false, false, false, false, false, true, false, false]);
});

test('calls leave nothing behind for the next, whatever their sizes', () => {
  const shape = fc.record({
    columns: fc.integer({ min: 1, max: 40 }),
    rows: fc.integer({ min: 1, max: 40 }),
    bits: fc.integer({ min: 1, max: 8 }),
  });
  fc.assert(
    fc.property(shape, ({ columns, rows, bits }) => {
      const group = randomGroup(columns, rows, columns * 100 + rows);
      const grid = gridFor(group, bits);
      const widths = new Uint8Array(columns).fill(bits);
      const upper = randomUpper(columns);
      expect(wasm.compensate(group, upper, widths, grid)).toEqual(plain.compensate(group, upper, widths, grid));
    }),
    { numRuns: 40, seed: 1 },
  );
});

test('the committed module is what its source builds to', async () => {
  expect(KERNELS_WASM).toBe(Buffer.from(await buildKernels('kernels')).toString('base64'));
  const generated = await readFile(new URL('../../../src/compute/kernels/kernels.generated.ts', import.meta.url), 'utf8');
  expect(generated).toContain(KERNELS_WASM);
});
