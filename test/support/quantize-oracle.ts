/** The quantizers' mathematics in doubles, one weight at a time, straight from slim-llm sections 3 and 4: what the fast code is compared with. */

/** Levels of one row in one group. */
export interface RowGrid {
  readonly bits: number;
  readonly scale: number;
  /** Zero point, or the lower level's value for 1 bit. */
  readonly shift: number;
}

/** Half to even. */
export function roundEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

export function codeOf(w: number, grid: RowGrid): number {
  const { bits, scale, shift } = grid;
  if (bits === 1) return w >= shift + scale / 2 ? 1 : 0;
  return Math.min(Math.max(roundEven(w / scale) + shift, 0), 2 ** bits - 1);
}

export function decodedValue(code: number, grid: RowGrid): number {
  return grid.bits === 1 ? grid.shift + grid.scale * code : grid.scale * (code - grid.shift);
}

export function minMaxGrid(row: ArrayLike<number>, bits: number): RowGrid {
  const values = Array.from(row);
  if (bits === 1) {
    const mu = values.reduce((a, b) => a + b, 0) / values.length;
    const a = values.reduce((sum, w) => sum + Math.abs(w), 0) / values.length;
    return values.every((w) => w === values[0]) ? { bits, scale: 1, shift: values[0] } : { bits, scale: 2 * a, shift: mu - a };
  }
  const lo = Math.min(0, ...values);
  const hi = Math.max(0, ...values);
  if (lo === hi) return { bits, scale: 1, shift: 0 };
  const scale = (hi - lo) / (2 ** bits - 1);
  return { bits, scale, shift: roundEven(-lo / scale) };
}

/** The factors of the scale search, in the order they are tried. */
export const FACTORS: readonly number[] = [
  1,
  ...Array.from({ length: 50 }, (_, t) => 1 + (0.1 * (t + 1)) / 50),
  ...Array.from({ length: 50 }, (_, t) => 1 - (0.1 * (t + 1)) / 50),
];

/** `sum weight |w - wq|^2.4` with the scale multiplied by `factor`. */
export function searchLoss(row: ArrayLike<number>, grid: RowGrid, factor: number, weights?: ArrayLike<number>): number {
  const scaled = { ...grid, scale: grid.scale * factor };
  let loss = 0;
  for (let j = 0; j < row.length; j++) {
    loss += (weights ? weights[j] : 1) * Math.abs(row[j] - decodedValue(codeOf(row[j], scaled), scaled)) ** 2.4;
  }
  return loss;
}

/** The min-max grid, its scale multiplied by the first best of the factors. */
export function searchedGrid(row: ArrayLike<number>, bits: number): RowGrid & { readonly factor: number } {
  const grid = minMaxGrid(row, bits);
  if (bits === 1) return { ...grid, factor: 1 };
  let best = { factor: 1, loss: Infinity };
  for (const factor of FACTORS) {
    const loss = searchLoss(row, grid, factor);
    if (loss < best.loss) best = { factor, loss };
  }
  return { ...grid, scale: grid.scale * best.factor, factor: best.factor };
}

export interface OracleSweep {
  /** (rows, n) */
  readonly codes: Uint8Array;
  readonly values: Float64Array;
  readonly errors: Float64Array;
}

/** GPTQ, column by column, every error pushed to every later column at once. `gridOf` sees a row's compensated weights of one group. */
export function gptqOracle(
  weight: Float64Array,
  rows: number,
  upper: Float64Array,
  groupSize: number,
  gridOf: (weights: Float64Array, group: number, row: number) => RowGrid,
): OracleSweep {
  const n = weight.length / rows;
  const w = weight.slice();
  const codes = new Uint8Array(w.length);
  const values = new Float64Array(w.length);
  const errors = new Float64Array(w.length);
  for (let i = 0; i < rows; i++) {
    const row = w.subarray(i * n, (i + 1) * n);
    let grid: RowGrid | undefined;
    for (let j = 0; j < n; j++) {
      if (j % groupSize === 0) grid = gridOf(row.slice(j, j + groupSize), j / groupSize, i);
      codes[i * n + j] = codeOf(row[j], grid!);
      values[i * n + j] = decodedValue(codes[i * n + j], grid!);
      const e = (row[j] - values[i * n + j]) / upper[j * n + j];
      errors[i * n + j] = e;
      for (let k = j; k < n; k++) row[k] -= e * upper[j * n + k];
    }
  }
  return { codes, values, errors };
}

/** `tr(D H D^T)` */
export function outputEnergy(difference: Float64Array, hessian: Float64Array, n: number): number {
  let energy = 0;
  for (let start = 0; start < difference.length; start += n) {
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += hessian[i * n + j] * difference[start + j];
      energy += sum * difference[start + i];
    }
  }
  return energy;
}

/** H with `dampening` times its mean diagonal added to the diagonal. */
export function damp(hessian: Float64Array, n: number, dampening: number): Float64Array {
  const damped = hessian.slice();
  let trace = 0;
  for (let i = 0; i < n; i++) trace += hessian[i * n + i];
  for (let i = 0; i < n; i++) damped[i * n + i] += (dampening * trace) / n;
  return damped;
}
