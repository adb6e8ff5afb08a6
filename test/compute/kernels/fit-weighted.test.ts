import { describe, expect, test } from 'vitest';
import type { Group } from '../../../src/compute/kernels/kernels.ts';
import { wasmKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { normals } from '../../support/reference-layer.ts';
import { exhaustiveLoss, rowOf, storedScale, weightedFit, weightedFits, weightedLoss } from '../../support/weighted-fit.ts';

/** How far a loss summed in float32 may be from its double. */
const LOSS_TOLERANCE = 2e-5;
/** How much worse than the letter of the specification the losses of many rows may be together. */
const SUM_TOLERANCE = 0.01;
/** The same at 6 to 8 bits, where losses are small and fewer zero points are tried than the specification has. */
const WIDE_TOLERANCE = 0.04;
/** The same for a short last group of a few columns. */
const SHORT_TOLERANCE = 0.12;
/** How much worse a single row may be: the fit is a descent from a few starts, and so is the specification's. */
const ROW_TOLERANCE = 0.5;

const wasm = wasmKernels();
const VECTOR = [-0.9, -0.2, 0.1, 0.3, 1.1, 0.05, -0.4, 0.7];

/** `heavy` is the spread of the sizes: 0 makes normals, 1 a row with a few outliers. */
function randomGroup(columns: number, rows: number, heavy: number, seed = 1, size = 0.02): Group {
  const z = normals(seed, 2 * columns * rows);
  const values = Float32Array.from({ length: columns * rows }, (_, i) => size * z[2 * i] * Math.exp(heavy * z[2 * i + 1]));
  return { columns, rows, values };
}

function randomWeights(columns: number, seed = 4): Float32Array {
  return Float32Array.from(normals(seed, columns), Math.exp);
}

/** Rows of equal length. */
function groupOf(rows: readonly (readonly number[])[]): Group {
  const columns = rows[0].length;
  const values = Float32Array.from(
    { length: columns * rows.length },
    (_, i) => rows[i % rows.length][Math.floor(i / rows.length)],
  );
  return { columns, rows: rows.length, values };
}

const sum = (values: ArrayLike<number>) => Array.from(values).reduce((a, b) => a + b, 0);

/** Loss of row i under the grid that was found. */
function lossOf(
  group: Group,
  bits: number,
  weights: Float32Array,
  fitted: ReturnType<typeof wasm.fitWeighted>,
  i: number,
): number {
  return weightedLoss(rowOf(group, i), { bits, scale: fitted.grid.scale[i], shift: fitted.grid.shift[i] }, weights);
}

describe('the vector of eight weights', () => {
  const group = groupOf(Array.from({ length: 7 }, () => VECTOR));
  const ones = new Float32Array(8).fill(1);
  const first = ones.map((_, j) => (j === 0 ? 10 : 1));

  test.each([
    ['2 bits', 2, ones, 0.5625, 1, 0.28125],
    ['2 bits, the first column ten times as heavy', 2, first, 0.89990234, 2, 0.38250011],
    ['1 bit', 1, ones, 0.91259766, -0.36254883, 1.07687502],
  ])('ends where every lane should: %s', (_, bits, weights, scale, shift, loss) => {
    const fitted = wasm.fitWeighted(group, bits, weights);
    for (let i = 0; i < 7; i++) {
      expect(fitted.grid.scale[i]).toBeCloseTo(scale, 8);
      expect(fitted.grid.shift[i]).toBeCloseTo(shift, 8);
      expect(fitted.losses[i]).toBeCloseTo(loss, 6);
    }
  });

  test('has the codes 0 1 1 2 3 1 0 2, and 1 2 2 2 3 2 2 3 when the first column is ten times as heavy', () => {
    const codes = (weights: Float32Array) => {
      const { grid } = wasm.fitWeighted(group, 2, weights);
      return [...wasm.roundCodes(group, 2, grid)].filter((_, i) => i % 7 === 6);
    };
    expect(codes(ones)).toEqual([0, 1, 1, 2, 3, 1, 0, 2]);
    expect(codes(first)).toEqual([1, 2, 2, 2, 3, 2, 2, 3]);
  });

  test('is as the oracle, by the letter of the specification, finds it', () => {
    expect(weightedFit(VECTOR, 2, ones)).toEqual({ bits: 2, scale: 0.5625, shift: 1 });
    expect(weightedFit(VECTOR, 2, first).scale).toBeCloseTo(0.89990234, 8);
    expect(exhaustiveLoss(VECTOR, 2, ones, 20_000)).toBeCloseTo(0.28125, 6);
  });
});

describe.each([1, 2, 3, 4, 5, 6, 7, 8])('at %i bits', (bits) => {
  test.each([
    [128, 21, 0.5],
    [32, 16, 0],
    [33, 17, 1],
    [1, 5, 0.5],
    [2, 9, 0.5],
    [3, 520, 0.5],
  ])('a group of %i columns and %i rows costs what the specification allows, and what is claimed', (columns, rows, heavy) => {
    const group = randomGroup(columns, rows, heavy, bits);
    const weights = randomWeights(columns);
    const fitted = wasm.fitWeighted(group, bits, weights);
    const wanted = weightedFits(group, bits, weights).losses;
    // What rounding a scale to F16 may cost a row that could be exact.
    const floor = (i: number) => sum(rowOf(group, i).map((w, j) => weights[j] * (w * 2 ** -11) ** 2));
    let floors = 0;
    for (let i = 0; i < rows; i++) {
      floors += floor(i);
      const { scale, shift } = fitted.grid;
      expect(scale[i]).toBe(storedScale(scale[i]));
      if (bits > 1) expect(Number.isInteger(shift[i]) && shift[i] >= 0 && shift[i] < 2 ** bits).toBe(true);
      const loss = lossOf(group, bits, weights, fitted, i);
      expect(Math.abs(fitted.losses[i] - loss)).toBeLessThanOrEqual(loss * LOSS_TOLERANCE + floor(i) * 1e-3);
      // A row of two or three weights is nearly exact on many grids, and which is found is chance: there only the sum says something.
      if (columns >= 32) expect(loss).toBeLessThanOrEqual(wanted[i] * (1 + ROW_TOLERANCE) + floor(i));
    }
    const tolerance = columns < 32 ? SHORT_TOLERANCE : bits <= 5 ? SUM_TOLERANCE : WIDE_TOLERANCE;
    expect(sum(fitted.losses)).toBeLessThanOrEqual(sum(wanted) * (1 + tolerance) + floors);
  });

  test('weights that are on such a grid come back as they are', () => {
    const levels = 2 ** bits - 1;
    const rows = Array.from({ length: 13 }, (_, i) => {
      const scale = storedScale(0.01 * 1.37 ** i);
      const zero = bits === 1 ? 0 : (i * 5) % (levels + 1);
      return Array.from({ length: 40 }, (_, j) =>
        Math.fround(scale * ((j === 0 ? 0 : j === 1 ? levels : (j * 29) % (levels + 1)) - zero)),
      );
    });
    const group = groupOf(rows);
    const fitted = wasm.fitWeighted(group, bits, randomWeights(40));
    for (let i = 0; i < rows.length; i++) {
      expect(lossOf(group, bits, randomWeights(40), fitted, i)).toBeLessThan(1e-12 * rows[i][1] ** 2 + 1e-16);
    }
  });

  test('a row of zeros gets s = 1 and a shift of 0, whatever its neighbours', () => {
    const group = groupOf([VECTOR, VECTOR.map(() => 0), VECTOR.map((w) => -w), VECTOR.map(() => 0)]);
    const { grid, losses } = wasm.fitWeighted(group, bits, randomWeights(8));
    expect([grid.scale[1], grid.shift[1], losses[1]]).toEqual([1, 0, 0]);
    expect([grid.scale[3], grid.shift[3], losses[3]]).toEqual([1, 0, 0]);
    expect(grid.scale[0]).not.toBe(1);
  });

  test('constant rows, one outlier, and sizes from 1e-30 to 1e30 cost no more than the specification allows', () => {
    const bulk = Array.from(randomGroup(24, 1, 0).values);
    const rows = [
      bulk.map(() => 0.3),
      bulk.map(() => -7e-6),
      bulk.map((w, j) => (j === 5 ? 3 : w)),
      bulk.map((w, j) => (j === 0 ? -400 : Math.abs(w))),
      bulk.map((w) => w * 1e-28),
      bulk.map((w) => w * 1e-6),
      bulk.map((w) => w * 1e8),
      bulk.map((w) => w * 1e31),
    ].map((row) => Array.from(Float32Array.from(row)));
    const group = groupOf(rows);
    const weights = randomWeights(24);
    const fitted = wasm.fitWeighted(group, bits, weights);
    for (const [i, row] of rows.entries()) {
      const loss = lossOf(group, bits, weights, fitted, i);
      const floor = sum(row.map((w, j) => weights[j] * (w * 2 ** -11) ** 2));
      const wanted = weightedLoss(row, weightedFit(row, bits, weights), weights);
      expect(loss).toBeLessThanOrEqual(wanted * (1 + ROW_TOLERANCE) + floor);
      // Scales below F16's normal range are left as they are, and so is what they lose.
      expect(fitted.grid.scale[i]).toBe(storedScale(fitted.grid.scale[i]));
    }
  });

  test('columns of weight 0 do not count', () => {
    const group = randomGroup(20, 12, 0.5, 30 + bits);
    const weights = randomWeights(20).map((d, j) => (j % 3 === 0 ? 0 : d));
    const kept = Array.from({ length: 20 }, (_, j) => j).filter((j) => weights[j] !== 0);
    const fitted = wasm.fitWeighted(group, bits, weights);
    const without = groupOf(Array.from({ length: 12 }, (_, i) => kept.map((j) => rowOf(group, i)[j])));
    const alone = wasm.fitWeighted(
      without,
      bits,
      Float32Array.from(kept, (j) => weights[j]),
    );
    expect(sum(fitted.losses)).toBeLessThanOrEqual(sum(alone.losses) * (1 + ROW_TOLERANCE));
    const none = wasm.fitWeighted(group, bits, new Float32Array(20));
    expect([...none.losses]).toEqual(new Array(12).fill(0));
    expect(none.grid.scale.every((scale) => scale > 0)).toBe(true);
  });

  test('a NaN or an overflow reaches the scale of its row only', () => {
    const group = randomGroup(6, 8, 0);
    group.values[2 * 8 + 5] = Number.NaN;
    const { scale } = wasm.fitWeighted(group, bits, randomWeights(6)).grid;
    expect([...scale].map(Number.isFinite)).toEqual([true, true, true, true, true, false, true, true]);
  });

  test('what a row gets does not depend on how many rows there are', () => {
    const group = randomGroup(31, 600, 0.5, 9);
    const weights = randomWeights(31);
    const whole = wasm.fitWeighted(group, bits, weights);
    const part = groupOf(Array.from({ length: 5 }, (_, i) => Array.from(rowOf(group, 511 + i))));
    const { grid, losses } = wasm.fitWeighted(part, bits, weights);
    expect(grid.scale).toEqual(whole.grid.scale.slice(511, 516));
    expect(grid.shift).toEqual(whole.grid.shift.slice(511, 516));
    expect(losses).toEqual(whole.losses.slice(511, 516));
  });
});

test.each([
  [2, 400],
  [3, 300],
  [4, 200],
])(
  'at %i bits, random rows together cost at most 1 %% more than the best of a scan of all zeros and %i scales',
  (bits, steps) => {
    for (const [heavy, columns] of [
      [0, 128],
      [0.5, 128],
      [1, 32],
    ]) {
      const group = randomGroup(columns, 24, heavy, 70 + bits);
      for (const weights of [new Float32Array(columns).fill(1), randomWeights(columns)]) {
        const best = Array.from({ length: 24 }, (_, i) => exhaustiveLoss(rowOf(group, i), bits, weights, steps));
        expect(sum(wasm.fitWeighted(group, bits, weights).losses)).toBeLessThanOrEqual(sum(best) * 1.01);
      }
    }
  },
);
