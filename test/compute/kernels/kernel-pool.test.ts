/** Kernels on several threads: the numbers of one. */
import { afterAll, describe, expect, it } from 'vitest';
import { type KernelPool, openKernels } from '../../../src/compute/kernels/kernel-pool.ts';
import { wasmKernels } from '../../../src/compute/kernels/wasm-kernels.ts';
import { randomSource } from '../../support/random.ts';

const pools = new Map<number, KernelPool>();
const pool = (threads: number) => {
  const known = pools.get(threads) ?? openKernels(threads);
  pools.set(threads, known);
  return known;
};
afterAll(async () => {
  for (const each of pools.values()) await each[Symbol.asyncDispose]();
});

const one = wasmKernels();
/** Rows that divide evenly, that leave a short last part, and columns of a short group. */
const SHAPES = [
  [1024, 128],
  [1999, 128],
  [3001, 37],
] as const;

function problem(rows: number, columns: number) {
  const random = randomSource(rows + columns);
  const draw = (length: number, scale = 1) => Float32Array.from({ length }, () => scale * (random() + random() - 1));
  const values = draw(rows * columns);
  const upper = draw(columns * columns, 0.05);
  for (let j = 0; j < columns; j++) upper[j * columns + j] = 1 + random();
  const hessian = draw(columns * columns, 0.1);
  for (let j = 0; j < columns; j++) hessian[j * columns + j] = 1 + random();
  const energies = Float32Array.from({ length: columns }, () => random() + 0.1);
  const weights = Float32Array.from({ length: rows * columns }, () => 1 + random());
  return { group: { rows, columns, values }, upper, hessian, energies, weights, gradient: draw(rows * columns, 0.3) };
}

/** All typed arrays of a result, in order. */
function arraysOf(value: object): ArrayBufferView[] {
  return ArrayBuffer.isView(value) ? [value] : Object.values(value).flatMap(arraysOf);
}

/** Bit for bit; much faster than a comparison number by number. */
function expectSame(actual: object, expected: object): void {
  const bytes = (value: object) =>
    arraysOf(value).map(({ buffer, byteOffset, byteLength }) => Buffer.from(buffer, byteOffset, byteLength));
  const [a, b] = [bytes(actual), bytes(expected)];
  expect(a.map(({ length }) => length)).toEqual(b.map(({ length }) => length));
  expect(a.map((each, i) => each.equals(b[i]))).toEqual(b.map(() => true));
}

describe.each([2, 5])('on %i threads', (threads) => {
  it.each(SHAPES)('every kernel gives what one thread gives, for %i rows of %i columns', async (rows, columns) => {
    const { group, upper, hessian, energies, weights, gradient } = problem(rows, columns);
    const before = group.values.slice();
    const many = pool(threads);
    for (const bits of [1, 2, 3, 4, 8]) {
      const fitted = one.fitWeighted(group, bits, energies);
      expectSame(await many.fitWeighted(group, bits, energies), fitted);
      const widths = new Uint8Array(columns).fill(bits);
      const compensated = one.compensate(group, upper, widths, fitted.grid);
      expectSame(await many.compensate(group, upper, widths, fitted.grid), compensated);
      expectSame(await many.roundCodes(group, bits, fitted.grid), one.roundCodes(group, bits, fitted.grid));

      const [decoded, decodedToo] = [group.values.slice(), group.values.slice()];
      const [left, leftToo] = [gradient.slice(), gradient.slice()];
      const polished = one.polish(decoded, left, hessian, bits, fitted.grid);
      expectSame(await many.polish(decodedToo, leftToo, hessian, bits, fitted.grid), polished);
      expectSame([decodedToo, leftToo], [decoded, left]);
      expect(polished.changes.some((change) => change !== 0)).toBe(true);
      if (bits === 1) continue;
      const grid = one.minMaxGrid(group, bits, false);
      expectSame(await many.searchScales(group, bits, grid), one.searchScales(group, bits, grid));
      expectSame(await many.searchScales(group, bits, grid, weights), one.searchScales(group, bits, grid, weights));
    }
    expectSame(group.values, before);
  });

  it('calls made at once do not meet', async () => {
    const problems = [1024, 1500, 1024, 2000].map((rows, i) => problem(rows + i, 64));
    const made = await Promise.all(problems.map(({ group, energies }) => pool(threads).fitWeighted(group, 2, energies)));
    expectSame(
      made,
      problems.map(({ group, energies }) => one.fitWeighted(group, 2, energies)),
    );
  });

  it('a call that fails leaves the pool as it was', async () => {
    const { group, energies } = problem(4096, 128);
    // No whole number of columns.
    const short = { ...group, values: group.values.subarray(0, 4096 * 127 + 2000) };
    await expect(pool(threads).fitWeighted(short, 2, energies)).rejects.toThrow();
    expectSame(await pool(threads).fitWeighted(group, 4, energies), one.fitWeighted(group, 4, energies));
  });
});
