/** Weighted grids by section 5.4 of slim-llm to the letter, in doubles, and by trying everything: what the kernel is measured against. */
import { roundToF16 } from '../../formats/dtype.ts';
import type { Fitted, Group } from '../../src/compute/kernels/kernels.ts';
import { codeOf, decodedValue, type RowGrid, roundEven } from './quantize-oracle.ts';

/** Scales as artifacts store them. */
export function storedScale(scale: number): number {
  const s = Math.fround(scale);
  return s >= 2 ** -14 && s <= 65504 ? roundToF16(s) : s;
}

function storedOffset(offset: number): number {
  const o = Math.fround(offset);
  return Math.abs(o) <= 65504 ? roundToF16(o) : o;
}

/** `sum d (w - wq)^2`; squares beyond float32 are no trouble here. */
export function weightedLoss(row: ArrayLike<number>, grid: RowGrid, d: ArrayLike<number>): number {
  let loss = 0;
  for (let j = 0; j < row.length; j++) loss += d[j] * (row[j] - decodedValue(codeOf(row[j], grid), grid)) ** 2;
  return loss;
}

/** The scale that fits the codes best, as stored; 0 if there is none. */
function refit(row: ArrayLike<number>, grid: RowGrid, d: ArrayLike<number>): number {
  let cw = 0;
  let cc = 0;
  for (let j = 0; j < row.length; j++) {
    const c = codeOf(row[j], grid) - grid.shift;
    cw += d[j] * c * row[j];
    cc += d[j] * c * c;
  }
  return cc > 0 ? storedScale(cw / cc) : 0;
}

function range(row: ArrayLike<number>): { lo: number; hi: number } {
  return { lo: Math.min(0, ...Array.from(row)), hi: Math.max(0, ...Array.from(row)) };
}

/** 5.4 for one row: every start, every zero, one refit each, two of the winner. */
export function weightedFit(row: ArrayLike<number>, bits: number, d: ArrayLike<number>): RowGrid {
  if (bits === 1) return twoLevels(row, d);
  const { lo, hi } = range(row);
  if (lo === hi) return { bits, scale: 1, shift: 0 };
  const levels = 2 ** bits - 1;
  const s0 = (hi - lo) / levels;
  const equidistant = Array.from({ length: 8 }, (_, i) => 0.95 - (0.75 * i) / 7);
  let best: RowGrid & { loss: number } = { bits, scale: storedScale(s0), shift: 0, loss: Infinity };
  const evaluate = (grid: RowGrid): void => {
    const loss = weightedLoss(row, grid, d);
    if (loss < best.loss) best = { ...grid, loss };
  };
  for (const p of bits <= 4 ? [1, ...equidistant] : [1, 0.97, 0.94, 0.9]) {
    const z0 = Math.min(Math.max(roundEven(-lo / (p * s0)), 0), levels);
    const first = bits <= 3 ? 0 : Math.max(0, z0 - 2);
    const last = bits <= 3 ? levels : Math.min(levels, z0 + 2);
    for (let shift = first; shift <= last; shift++) {
      const grid = { bits, scale: storedScale(p * s0), shift };
      evaluate(grid);
      const scale = refit(row, grid, d);
      if (scale > 0) evaluate({ ...grid, scale });
    }
  }
  for (let i = 0; i < 2; i++) {
    const scale = refit(row, best, d);
    if (scale > 0) evaluate({ bits, scale, shift: best.shift });
  }
  return { bits, scale: best.scale, shift: best.shift };
}

function twoLevels(row: ArrayLike<number>, d: ArrayLike<number>): RowGrid {
  const values = Array.from(row);
  const mean = (side: number[]): number => {
    const weight = side.reduce((sum, j) => sum + d[j], 0);
    return weight > 0 ? side.reduce((sum, j) => sum + d[j] * values[j], 0) / weight : Number.NaN;
  };
  const all = Array.from(values.keys());
  let border = mean(all);
  if (Number.isNaN(border)) border = 0;
  let [low, high] = [border, border];
  for (let round = 0; round < 8; round++) {
    low = mean(all.filter((j) => values[j] < border));
    high = mean(all.filter((j) => values[j] >= border));
    if (Number.isNaN(low)) low = Number.isNaN(high) ? border : high;
    if (Number.isNaN(high)) high = low;
    border = (low + high) / 2;
  }
  const scale = storedScale(high - low);
  return { bits: 1, scale: scale > 0 ? scale : 1, shift: storedOffset(low) };
}

/** Least loss over `steps` scales of [.1, 1.05] times the min-max scale, as stored, and every zero. */
export function exhaustiveLoss(row: ArrayLike<number>, bits: number, d: ArrayLike<number>, steps: number): number {
  const { lo, hi } = range(row);
  const levels = 2 ** bits - 1;
  const s0 = (hi - lo) / levels;
  let best = Infinity;
  for (let i = 0; i < steps; i++) {
    const scale = storedScale(s0 * (0.1 + (0.95 * i) / (steps - 1)));
    for (let shift = 0; shift <= levels; shift++) best = Math.min(best, weightedLoss(row, { bits, scale, shift }, d));
  }
  return best;
}

/** Row i of a group, as doubles. */
export function rowOf(group: Group, i: number): Float64Array {
  return Float64Array.from({ length: group.columns }, (_, j) => group.values[j * group.rows + i]);
}

/** All rows of a group. */
export function weightedFits(group: Group, bits: number, weights: Float32Array): Fitted {
  const grids = Array.from({ length: group.rows }, (_, i) => weightedFit(rowOf(group, i), bits, weights));
  const scale = Float32Array.from(grids, (grid) => grid.scale);
  const shift = Float32Array.from(grids, (grid) => grid.shift);
  const losses = Float32Array.from(grids, (grid, i) => weightedLoss(rowOf(group, i), grid, weights));
  return { grid: { scale, shift }, losses };
}
