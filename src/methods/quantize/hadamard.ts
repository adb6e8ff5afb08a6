/** Hadamard matrices (entries of one size, rows at right angles), all of them symmetric, and vectors multiplied by them. */

/** Orders of matrices that are no products of smaller ones here; every other order is one of these, or 1, times a power of two. */
type Seed = 1 | 12 | 20 | 28;

/** Order of the largest Sylvester matrix that the matrix of order `size` has as its right Kronecker factor: a power of two. */
export function sylvesterPart(size: number): number {
  return size / seedOf(size)!;
}

/** The largest power of two that divides `size`. */
function powerOf(size: number): number {
  let power = 1;
  while (size % (2 * power) === 0) power *= 2;
  return power;
}

function seedOf(size: number): Seed | undefined {
  const power = powerOf(size);
  const rest = size / power;
  if (rest === 1) return 1;
  return power >= 4 && (rest === 3 || rest === 5 || rest === 7) ? ((4 * rest) as Seed) : undefined;
}

/** Whether there is a matrix of this order: 2^k, or 2^k times 12, 20 or 28. */
export function isHadamardOrder(size: number): boolean {
  return Number.isSafeInteger(size) && size > 0 && seedOf(size) !== undefined;
}

/** Order of the largest matrix that rotates all of `features` columns: of one run of them all, or, where there is none, of equal runs. */
export function largestOrder(features: number): number {
  return isHadamardOrder(features) ? features : powerOf(features);
}

/** Entries of the matrix of order `size` are +-`hadamardScale` for activations: a power of two, so that scaling them is exact. */
export function hadamardScale(size: number): number {
  return 2 ** -Math.floor(Math.log2(size) / 2);
}

/** The same for weights; the product of the two matrices is the identity. A power of two where `size` is one. */
export function hadamardWeightScale(size: number): number {
  return 1 / (size * hadamardScale(size));
}

/** Sign of entry (row, column) of the matrix of order `size`: that of the seed (Kronecker) that of the Sylvester matrix. */
export function hadamardSign(size: number, row: number, column: number): number {
  const seed = seedOf(size)!;
  const power = size / seed;
  const own = seedMatrix(seed)[Math.floor(row / power) * seed + Math.floor(column / power)];
  let sign = own;
  for (let bits = (row % power) & (column % power); bits !== 0; bits &= bits - 1) sign = -sign;
  return sign;
}

/**
 * Multiplies every whole run of `size` values by the matrix of that order with entries +-`scale`, in place. A last run that is shorter stays as it is.
 * With `width`, a value is a row of so many numbers: the columns of a matrix are rotated.
 */
export function rotateRuns(values: Float64Array, size: number, scale: number, width = 1): void {
  const seed = seedOf(size)!;
  const [length, part] = [size * width, (size / seed) * width];
  const mixed = new Float64Array(seed);
  for (let start = 0; start + length <= values.length; start += length) {
    const end = start + length;
    for (let half = width; half < part; half *= 2) {
      for (let i = start; i < end; i += 2 * half) {
        for (let j = i; j < i + half; j++) {
          const a = values[j];
          const b = values[j + half];
          values[j] = a + b;
          values[j + half] = a - b;
        }
      }
    }
    if (seed > 1) mix(values, start, part, seedMatrix(seed), mixed);
    for (let i = start; i < end; i++) values[i] *= scale;
  }
}

/** Multiplies by a seed: its rows are `part` values apart. */
function mix(values: Float64Array, start: number, part: number, matrix: Int8Array, mixed: Float64Array): void {
  const seed = mixed.length;
  for (let j = start; j < start + part; j++) {
    for (let a = 0; a < seed; a++) {
      let sum = 0;
      for (let b = 0; b < seed; b++) sum += matrix[a * seed + b] * values[j + b * part];
      mixed[a] = sum;
    }
    for (let a = 0; a < seed; a++) values[j + a * part] = mixed[a];
  }
}

const seeds = new Map<Seed, Int8Array>([[1, Int8Array.of(1)]]);

/** (seed, seed), entries +-1. Paley, On orthogonal matrices (1933). */
function seedMatrix(seed: Seed): Int8Array {
  let matrix = seeds.get(seed);
  if (!matrix) {
    matrix = seed === 28 ? paleyTwo(13) : paleyOne(seed - 1);
    seeds.set(seed, matrix);
  }
  return matrix;
}

/** 1 for a square modulo the prime p, -1 for none, 0 for 0. */
function legendre(a: number, p: number): number {
  const rest = ((a % p) + p) % p;
  if (rest === 0) return 0;
  for (let root = 1; root < p; root++) if ((root * root) % p === rest) return 1;
  return -1;
}

/** Order p + 1 for a prime p = 3 mod 4. With i + j where Paley has i - j, which is another order of rows, it is symmetric. */
function paleyOne(p: number): Int8Array {
  const n = p + 1;
  return Int8Array.from({ length: n * n }, (_, at) => {
    const [i, j] = [Math.floor(at / n), at % n];
    return i === 0 || j === 0 ? 1 : legendre(i + j - 2, p) || -1;
  });
}

/** Order 2 (p + 1) for a prime p = 1 mod 4. */
function paleyTwo(p: number): Int8Array {
  const n = 2 * (p + 1);
  return Int8Array.from({ length: n * n }, (_, at) => {
    const [i, j] = [Math.floor(at / n), at % n];
    const [row, column] = [i >> 1, j >> 1];
    // Off the diagonal the conference matrix times [1 1; 1 -1], on it [1 -1; -1 -1].
    if (row === column) return (i & 1) === 0 && (j & 1) === 0 ? 1 : -1;
    const entry = row === 0 || column === 0 ? 1 : legendre(row - column, p);
    return (i & j & 1) === 1 ? -entry : entry;
  });
}
