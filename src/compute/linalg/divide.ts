/** Eigenvalues and eigenvectors of a tridiagonal matrix by divide and conquer (Cuppen 1981): nearly all of it is products of matrices. */
import { implicitQl } from './implicit-ql.ts';
import { addProduct, strided } from './products.ts';
import { rankOneUpdate } from './secular.ts';

/** Matrices up to this size are diagonalized directly. */
const SMALL = 32;

/**
 * `values` ascending, row i of `vectors` (n, n) the eigenvector of `values[i]`.
 * @param diagonal (n), used up @param beside `beside[i]` between `diagonal[i]` and `diagonal[i + 1]`; used up
 */
export function diagonalize(diagonal: Float64Array, beside: Float64Array): { values: Float64Array; vectors: Float64Array } {
  const n = diagonal.length;
  const vectors = new Float64Array(n * n);
  for (let i = 0; i < n; i++) vectors[i * n + i] = 1;
  solve({ values: diagonal, beside, vectors, n }, 0, n);
  return { values: diagonal, vectors };
}

interface Problem {
  readonly values: Float64Array;
  readonly beside: Float64Array;
  readonly vectors: Float64Array;
  readonly n: number;
}

/** Solves rows and columns `[from, to)`; the eigenvectors have nothing outside them. */
function solve(problem: Problem, from: number, to: number): void {
  const { values, beside } = problem;
  const size = to - from;
  if (size <= SMALL) {
    solveSmall(problem, from, size);
    return;
  }
  // T = diag(T1, T2) + rho v v^T, v being 1 at the end of the first part and a sign at the beginning of the second.
  const middle = from + Math.floor(size / 2);
  const between = beside[middle - 1];
  const rho = Math.abs(between);
  values[middle - 1] -= rho;
  values[middle] -= rho;
  solve(problem, from, middle);
  solve(problem, middle, to);
  join(problem, from, middle, to, rho, between < 0 ? -1 : 1);
}

function solveSmall({ values, beside, vectors, n }: Problem, from: number, size: number): void {
  const z = new Float64Array(size * size);
  for (let i = 0; i < size; i++) z[i * size + i] = 1;
  const d = values.slice(from, from + size);
  const e = new Float64Array(size);
  e.set(beside.subarray(from, from + size - 1));
  implicitQl(z, d, e, size);
  const order = [...d.keys()].sort((a, b) => d[a] - d[b] || a - b);
  order.forEach((row, i) => {
    values[from + i] = d[row];
    vectors.set(z.subarray(row * size, (row + 1) * size), (from + i) * n + from);
  });
}

/** One eigenvector of a part, on its way through the joining. */
interface Direction {
  value: number;
  /** Its component along the coupling vector. */
  z: number;
  /** Row in `vectors`. */
  readonly row: number;
  /** Whether it has components in the first part, and in the second. */
  first: boolean;
  second: boolean;
}

/** Makes the eigenvectors of the whole from those of the two parts. */
function join(problem: Problem, from: number, middle: number, to: number, rho: number, sign: number): void {
  const { values, vectors, n } = problem;
  const directions: Direction[] = [];
  for (let row = from; row < to; row++) {
    const first = row < middle;
    const z = first ? vectors[row * n + middle - 1] : sign * vectors[row * n + middle];
    directions.push({ value: values[row], z, row, first, second: !first });
  }
  directions.sort((a, b) => a.value - b.value || a.row - b.row);
  const { coupled, alone } = deflate(problem, directions, from, to, rho);
  const d = Float64Array.from(coupled, ({ value }) => value);
  const update = rankOneUpdate(
    d,
    Float64Array.from(coupled, ({ z }) => z),
    rho,
  );
  const made = combine(problem, coupled, update.vectors, from, middle, to);
  // In order again.
  const kept = alone.map(({ value, row }) => ({ value, vector: vectors.slice(row * n + from, row * n + to) }));
  const size = to - from;
  const all = [...kept, ...Array.from(update.values, (value, i) => ({ value, vector: made.subarray(i * size, (i + 1) * size) }))];
  all.sort((a, b) => a.value - b.value);
  all.forEach(({ value, vector }, i) => {
    values[from + i] = value;
    vectors.set(vector, (from + i) * n + from);
  });
}

/** Takes out what the coupling does not reach: components of next to nothing, and one of two equal values, turned until it has none. */
function deflate(
  { vectors, n }: Problem,
  directions: readonly Direction[],
  from: number,
  to: number,
  rho: number,
): { coupled: Direction[]; alone: Direction[] } {
  const scale = directions.reduce((most, { value, z }) => Math.max(most, Math.abs(value), rho * Math.abs(z)), 0);
  const tolerance = 8 * Number.EPSILON * scale;
  const coupled: Direction[] = [];
  const alone: Direction[] = [];
  for (const direction of directions) {
    if (rho * Math.abs(direction.z) <= tolerance) {
      alone.push(direction);
      continue;
    }
    const before = coupled.at(-1);
    if (before) {
      const length = Math.hypot(before.z, direction.z);
      const [c, s] = [direction.z / length, before.z / length];
      // What the turn would leave between the two.
      if (Math.abs((direction.value - before.value) * c * s) <= tolerance) {
        turn(vectors, before.row * n, direction.row * n, from, to, c, s);
        const [x, y] = [before.value, direction.value];
        before.value = c * c * x + s * s * y;
        direction.value = s * s * x + c * c * y;
        direction.z = length;
        direction.first = before.first = direction.first || before.first;
        direction.second = before.second = direction.second || before.second;
        coupled.pop();
        alone.push(before);
      }
    }
    coupled.push(direction);
  }
  return { coupled, alone };
}

/** `x <- c x - s y`, `y <- s x + c y`. */
function turn(vectors: Float64Array, x: number, y: number, from: number, to: number, c: number, s: number): void {
  for (let i = from; i < to; i++) {
    const [a, b] = [vectors[x + i], vectors[y + i]];
    vectors[x + i] = c * a - s * b;
    vectors[y + i] = s * a + c * b;
  }
}

/** `update` times the coupled directions, (k, to - from): those of one part alone have zeros in the other, which are not multiplied. */
function combine(
  { vectors, n }: Problem,
  coupled: readonly Direction[],
  update: Float64Array,
  from: number,
  middle: number,
  to: number,
): Float64Array {
  const k = coupled.length;
  const size = to - from;
  const made = new Float64Array(k * size);
  for (const [part, start, end] of [
    ['first', from, middle],
    ['second', middle, to],
  ] as const) {
    const members = [...coupled.keys()].filter((j) => coupled[j][part]);
    const width = end - start;
    const sources = new Float64Array(members.length * width);
    members.forEach((j, at) => {
      const row = coupled[j].row * n;
      sources.set(vectors.subarray(row + start, row + end), at * width);
    });
    const factors = new Float64Array(k * members.length);
    for (let i = 0; i < k; i++)
      for (let at = 0; at < members.length; at++) factors[i * members.length + at] = update[i * k + members[at]];
    const out = { data: made, start: start - from, down: size, across: 1 };
    addProduct(strided(factors, members.length), strided(sources, width), out, k, members.length, width);
  }
  return made;
}
