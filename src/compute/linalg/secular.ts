/** The eigenvalues of a diagonal matrix plus a matrix of rank one: roots of the secular equation, and the eigenvectors that belong to them. */

/** Steps for one root; five are usual, and halving the interval ends any. */
const MOST_STEPS = 100;

export interface RankOneUpdate {
  /** Ascending, (k). */
  readonly values: Float64Array;
  /** Row i is the eigenvector of `values[i]`, (k, k). */
  readonly vectors: Float64Array;
}

/**
 * Of `diag(d) + rho z z^T`: d strictly ascending, no z zero, rho > 0. Vectors are orthogonal to rounding however close the values lie: they are those of a
 * z that the computed roots belong to exactly (Gu and Eisenstat 1994).
 */
export function rankOneUpdate(d: Float64Array, z: Float64Array, rho: number): RankOneUpdate {
  const k = d.length;
  const squares = z.map((value) => rho * value * value);
  const values = new Float64Array(k);
  // Row i: d_j - value_i, from the nearer of the two d around the root, so that no digit is lost.
  const gaps = new Float64Array(k * k);
  for (let i = 0; i < k; i++) {
    const row = gaps.subarray(i * k, (i + 1) * k);
    const { origin, offset } = root(d, squares, i, row);
    values[i] = d[origin] + offset;
    for (let j = 0; j < k; j++) row[j] = d[j] - d[origin] - offset;
  }
  const exact = new Float64Array(k);
  for (let j = 0; j < k; j++) {
    let product = -gaps[j * k + j];
    for (let i = 0; i < k; i++) if (i !== j) product *= gaps[i * k + j] / (d[j] - d[i]);
    exact[j] = Math.sign(z[j]) * Math.sqrt(Math.abs(product));
  }
  for (let i = 0; i < k; i++) {
    const row = gaps.subarray(i * k, (i + 1) * k);
    let square = 0;
    for (let j = 0; j < k; j++) {
      row[j] = exact[j] / row[j];
      square += row[j] * row[j];
    }
    const length = Math.sqrt(square);
    for (let j = 0; j < k; j++) row[j] /= length;
  }
  return { values, vectors: gaps };
}

/** The root of `1 + sum squares_j / (d_j - x)` between d_i and d_{i+1}: as an offset from one of them. @param room (k) */
function root(d: Float64Array, squares: Float64Array, i: number, room: Float64Array): { origin: number; offset: number } {
  const k = d.length;
  const last = i === k - 1;
  const end = last ? squares.reduce((sum, square) => sum + square, 0) : d[i + 1] - d[i];
  let origin = i;
  let [low, high] = [0, end];
  if (!last) {
    let middle = 1;
    for (let j = 0; j < k; j++) middle += squares[j] / (d[j] - d[i] - end / 2);
    if (middle < 0) {
      origin = i + 1;
      [low, high] = [-end / 2, 0];
    } else high = end / 2;
  }
  for (let j = 0; j < k; j++) room[j] = d[j] - d[origin];
  let x = (low + high) / 2;
  for (let step = 0; step < MOST_STEPS; step++) {
    let [below, belowSlope, above, aboveSlope] = [0, 0, 0, 0];
    for (let j = 0; j <= i; j++) {
      const gap = room[j] - x;
      const part = squares[j] / gap;
      below += part;
      belowSlope += part / gap;
    }
    for (let j = i + 1; j < k; j++) {
      const gap = room[j] - x;
      const part = squares[j] / gap;
      above += part;
      aboveSlope += part / gap;
    }
    const f = 1 + below + above;
    if (f < 0) low = x;
    else high = x;
    if (Math.abs(f) <= Number.EPSILON * k * (1 + above - below)) break;
    // Both sides as a constant and one pole with the right value and slope.
    const [first, second] = [room[i] - x, last ? Number.POSITIVE_INFINITY : room[i + 1] - x];
    const step1 = last
      ? first + (belowSlope * first * first) / (f - first * belowSlope)
      : twoPoles(f, first, second, belowSlope, aboveSlope);
    const next = x + step1;
    const inside = next > low && next < high;
    const middle = (low + high) / 2;
    const to = inside ? next : middle;
    if (to === x || middle === low || middle === high) break;
    x = to;
  }
  return { origin, offset: x };
}

/** The step to the root of `c + s / (first - step) + t / (second - step)` with the given value and slopes. */
function twoPoles(f: number, first: number, second: number, slope1: number, slope2: number): number {
  const c = f - first * slope1 - second * slope2;
  const a = (first + second) * f - first * second * (slope1 + slope2);
  const b = first * second * f;
  const discriminant = Math.sqrt(Math.max(0, a * a - 4 * b * c));
  return a <= 0 ? (a - discriminant) / (2 * c) : (2 * b) / (a + discriminant);
}
