/** Plain loops for what the WASM build does not have yet: the weighted grid search and the polish of a group. */
import { roundToF16 } from '../../../formats/dtype.ts';
import type { Fitted, Grid, Group } from './kernels.ts';

const F16_LEAST = 2 ** -14;
const F16_MOST = 65504;

function stored(scale: number): number {
  const s = Math.fround(scale);
  return s >= F16_LEAST && s <= F16_MOST ? roundToF16(s) : s;
}

function storedOffset(offset: number): number {
  const o = Math.fround(offset);
  return Math.abs(o) <= F16_MOST ? roundToF16(o) : o;
}

function halfEven(x: number): number {
  const r = Math.round(x);
  return Math.abs(x % 1) === 0.5 && r % 2 !== 0 ? r - 1 : r;
}

export function fitWeightedPlain(group: Group, bits: number, weights: Float32Array): Fitted {
  const { columns, rows, values } = group;
  const grid = { scale: new Float32Array(rows).fill(1), shift: new Float32Array(rows) };
  const losses = new Float32Array(rows);
  const w = new Float64Array(columns);
  for (let row = 0; row < rows; row++) {
    for (let j = 0; j < columns; j++) w[j] = values[j * rows + row];
    const best = bits === 1 ? fitTwoLevels(w, weights) : fitRow(w, bits, weights);
    grid.scale[row] = best.scale;
    grid.shift[row] = best.shift;
    losses[row] = best.loss;
  }
  return { grid, losses };
}

interface RowFit {
  scale: number;
  shift: number;
  loss: number;
}

function fitTwoLevels(w: Float64Array, d: Float32Array): RowFit {
  const n = w.length;
  let total = 0;
  let mean = 0;
  for (let j = 0; j < n; j++) {
    total += d[j];
    mean += d[j] * w[j];
  }
  mean /= total || 1;
  let threshold = mean;
  let low = mean;
  let high = mean;
  for (let round = 0; round < 8; round++) {
    let lowSum = 0;
    let lowWeight = 0;
    let highSum = 0;
    let highWeight = 0;
    for (let j = 0; j < n; j++) {
      if (w[j] >= threshold) {
        highSum += d[j] * w[j];
        highWeight += d[j];
      } else {
        lowSum += d[j] * w[j];
        lowWeight += d[j];
      }
    }
    high = highWeight > 0 ? highSum / highWeight : mean;
    low = lowWeight > 0 ? lowSum / lowWeight : high;
    if (highWeight === 0) high = low;
    const next = (low + high) / 2;
    if (next === threshold) break;
    threshold = next;
  }
  const o = storedOffset(low);
  let s = stored(high - low);
  if (!(s > 0)) s = 2 ** -14;
  let loss = 0;
  for (let j = 0; j < n; j++) {
    const e = w[j] - (w[j] >= o + s / 2 ? o + s : o);
    loss += d[j] * e * e;
  }
  return { scale: s, shift: o, loss };
}

function fitRow(w: Float64Array, bits: number, d: Float32Array): RowFit {
  const n = w.length;
  const levels = 2 ** bits - 1;
  let lo = 0;
  let hi = 0;
  for (let j = 0; j < n; j++) {
    lo = Math.min(lo, w[j]);
    hi = Math.max(hi, w[j]);
  }
  if (lo === 0 && hi === 0) return { scale: 1, shift: 0, loss: 0 };
  const s0 = (hi - lo) / levels;
  const starts = bits <= 4 ? [1, 0.95, 0.84286, 0.73571, 0.62857, 0.52143, 0.41429, 0.30714, 0.2] : [1, 0.97, 0.94, 0.9];
  const best: RowFit = { scale: stored(s0), shift: 0, loss: Infinity };
  const evaluate = (s: number, z: number): { loss: number; refit: number } => {
    let loss = 0;
    let cw = 0;
    let cc = 0;
    for (let j = 0; j < n; j++) {
      const c = Math.min(Math.max(halfEven(w[j] / s), -z), levels - z);
      const e = w[j] - s * c;
      loss += d[j] * e * e;
      cw += d[j] * c * w[j];
      cc += d[j] * c * c;
    }
    if (loss < best.loss) {
      best.loss = loss;
      best.scale = s;
      best.shift = z;
    }
    return { loss, refit: cc > 0 ? stored(cw / cc) : 0 };
  };
  for (const p of starts) {
    const s = stored(p * s0);
    if (!(s > 0)) continue;
    let zFrom = 0;
    let zTo = levels;
    if (bits > 3) {
      const z = Math.min(Math.max(halfEven(-lo / (p * s0)), 0), levels);
      zFrom = Math.max(0, z - 2);
      zTo = Math.min(levels, z + 2);
    }
    for (let z = zFrom; z <= zTo; z++) {
      const { refit } = evaluate(s, z);
      if (refit > 0) evaluate(refit, z);
    }
  }
  for (let i = 0; i < 2; i++) {
    const { refit } = evaluate(best.scale, best.shift);
    if (refit > 0) evaluate(refit, best.shift);
  }
  return best;
}

export function polishPlain(
  decoded: Float32Array,
  gradient: Float32Array,
  hessian: Float32Array,
  bits: number,
  grid: Grid,
): { readonly codes: Uint8Array; readonly changes: Float32Array } {
  const rows = grid.scale.length;
  const columns = decoded.length / rows;
  const levels = 2 ** bits - 1;
  const codes = new Uint8Array(decoded.length);
  const changes = new Float32Array(decoded.length);
  for (let row = 0; row < rows; row++) {
    const s = grid.scale[row];
    const z = grid.shift[row];
    for (let j = 0; j < columns; j++) {
      const at = j * rows + row;
      const target = Math.fround(decoded[at] - Math.fround(gradient[at] / hessian[j * columns + j]));
      let code: number;
      let value: number;
      if (bits === 1) {
        code = target >= Math.fround(z + s / 2) ? 1 : 0;
        value = Math.fround(z + Math.fround(s * code));
      } else {
        code = Math.min(Math.max(halfEven(Math.fround(target / s)) + z, 0), levels);
        value = Math.fround(s * (code - z));
      }
      codes[at] = code;
      const delta = Math.fround(value - decoded[at]);
      if (delta === 0) continue;
      decoded[at] = value;
      changes[at] += delta;
      for (let k = 0; k < columns; k++) gradient[k * rows + row] += delta * hessian[j * columns + k];
    }
  }
  return { codes, changes };
}
