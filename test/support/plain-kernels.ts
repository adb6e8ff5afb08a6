/** The kernels in plain TypeScript, one weight at a time, with float32 rounding after every operation: the twin of the WASM build. */
import type { Compensated, Grid, Group, Kernels } from '../../src/compute/kernels/kernels.ts';
import { roundEven, searchedGrid } from './quantize-oracle.ts';
import { weightedFits } from './weighted-fit.ts';

const f = Math.fround;

export function plainKernels(): Kernels {
  return { minMaxGrid, twoLevelGrid, searchScales, roundCodes, compensate, fitWeighted: weightedFits, polish };
}

function rowOf(group: Group, row: number): Float32Array {
  return Float32Array.from({ length: group.columns }, (_, j) => group.values[j * group.rows + row]);
}

function eachRow(group: Group, gridOf: (row: Float32Array, index: number) => { scale: number; shift: number }): Grid {
  const grids = Array.from({ length: group.rows }, (_, row) => gridOf(rowOf(group, row), row));
  return { scale: Float32Array.from(grids, (g) => g.scale), shift: Float32Array.from(grids, (g) => g.shift) };
}

function minMaxGrid(group: Group, bits: number, symmetric: boolean): Grid {
  const levels = 2 ** bits - 1;
  return eachRow(group, (row) => {
    let lo = Math.min(0, ...row);
    let hi = Math.max(0, ...row);
    if (symmetric) {
      hi = Math.max(-lo, hi);
      lo = -hi;
    }
    const scale = f(f(hi - lo) / levels);
    if (scale === 0) return { scale: 1, shift: 0 };
    return { scale, shift: symmetric ? (levels + 1) / 2 : roundEven(f(-lo / scale)) };
  });
}

function twoLevelGrid(group: Group, symmetric: boolean): Grid {
  return eachRow(group, (row) => {
    if (row.every((w) => w === 0)) return { scale: 1, shift: 0 };
    if (!symmetric && row.every((w) => w === row[0])) return { scale: 1, shift: row[0] };
    const mu = symmetric ? 0 : f(row.reduce((sum, w) => f(sum + w), 0) / row.length);
    const a = f(row.reduce((sum, w) => f(sum + Math.abs(w)), 0) / row.length);
    return { scale: f(a + a), shift: f(mu - a) };
  });
}

/** Exhaustively, in doubles and with the library's power function. */
function searchScales(group: Group, bits: number, grid: Grid): Float32Array {
  return eachRow(group, (row, i) => {
    const { factor } = searchedGrid(row, bits);
    return { scale: f(factor * grid.scale[i]), shift: 0 };
  }).scale;
}

function quantize(w: number, bits: number, scale: number, shift: number): { code: number; value: number } {
  if (bits === 1) {
    const code = w >= f(shift + f(scale * 0.5)) ? 1 : 0;
    return { code, value: f(shift + f(scale * code)) };
  }
  const code = Math.min(Math.max(f(roundEven(f(w / scale)) + shift), 0), 2 ** bits - 1);
  return { code, value: f(scale * f(code - shift)) };
}

function roundCodes(group: Group, bits: number, grid: Grid): Uint8Array {
  const { rows, values } = group;
  return Uint8Array.from(values, (w, i) => quantize(w, bits, grid.scale[i % rows], grid.shift[i % rows]).code);
}

function compensate(group: Group, upper: Float32Array, bits: Uint8Array, grid: Grid): Compensated {
  const { columns, rows } = group;
  const w = group.values.slice();
  const codes = new Uint8Array(w.length);
  const errors = new Float32Array(w.length);
  const perColumn = grid.scale.length !== rows;
  for (let j = 0; j < columns; j++) {
    for (let row = 0; row < rows; row++) {
      const at = perColumn ? j * rows + row : row;
      const { code, value } = quantize(w[j * rows + row], bits[j], grid.scale[at], grid.shift[at]);
      codes[j * rows + row] = code;
      const e = f(f(w[j * rows + row] - value) / upper[j * columns + j]);
      errors[j * rows + row] = e;
      for (let k = j + 1; k < columns; k++) w[k * rows + row] = f(w[k * rows + row] - f(e * upper[j * columns + k]));
    }
  }
  return { codes, errors };
}

function polish(decoded: Float32Array, gradient: Float32Array, hessian: Float32Array, bits: number, grid: Grid) {
  const rows = grid.scale.length;
  const columns = decoded.length / rows;
  const codes = new Uint8Array(decoded.length);
  const changes = new Float32Array(decoded.length);
  for (let row = 0; row < rows; row++) {
    for (let j = 0; j < columns; j++) {
      const at = j * rows + row;
      const target = f(decoded[at] - f(gradient[at] / hessian[j * columns + j]));
      const { code, value } = quantize(target, bits, grid.scale[row], grid.shift[row]);
      codes[at] = code;
      changes[at] = f(value - decoded[at]);
      decoded[at] = value;
      for (let k = 0; k < columns; k++) {
        gradient[k * rows + row] = f(gradient[k * rows + row] + f(changes[at] * hessian[j * columns + k]));
      }
    }
  }
  return { codes, changes };
}
