/** What singular vectors cost decides the default: cheap for small models, out of reach for large ones. */
import { expect, it } from 'vitest';
import type { MergeInput } from '../../../src/artifacts/merge/merge-input.ts';
import type { OutputTensor } from '../../../src/runs/merge/inputs.ts';
import { blockRowsFor } from '../../../src/runs/merge/jobs.ts';
import { matrixSeconds } from '../../../src/runs/merge/schedule.ts';

const experts = [{}, {}] as MergeInput[];
const matrix = (...shape: number[]): OutputTensor => ({
  name: 'w',
  dtype: 'BF16',
  shape,
  role: 'matrix',
  transposed: false,
  made: { by: 'merge', experts: [] },
});

it('grows with the cube of a matrix, with stacks and with experts, and counts nothing but merged matrices', () => {
  const one = matrixSeconds({ outputs: [matrix(64, 64)], experts });
  expect(matrixSeconds({ outputs: [matrix(128, 128)], experts }) / one).toBeCloseTo(8);
  expect(matrixSeconds({ outputs: [matrix(3, 64, 64)], experts }) / one).toBeCloseTo(3);
  expect(matrixSeconds({ outputs: [matrix(64, 64)], experts: [...experts, ...experts] }) / one).toBeCloseTo(6 / 4);
  // A method that works on the columns pays for that side, once.
  const wide = { outputs: [matrix(64, 128)], experts };
  expect(matrixSeconds(wide, 'columns') / matrixSeconds({ outputs: [matrix(128, 128)], experts })).toBeCloseTo(1 / 4);
  const others: OutputTensor[] = [
    { ...matrix(64, 64), role: 'embedding' },
    { ...matrix(64, 64), made: { by: 'copy', input: 0, name: 'w' } },
  ];
  expect(matrixSeconds({ outputs: others, experts })).toBe(0);
});

it('is seconds for a model of 5 million parameters and far over an hour for one of 7 billion', () => {
  const block = (hidden: number, inner: number) => [
    ...new Array<OutputTensor>(4).fill(matrix(hidden, hidden)),
    ...new Array<OutputTensor>(3).fill(matrix(inner, hidden)),
  ];
  expect(matrixSeconds({ outputs: new Array(6).fill(block(256, 768)).flat(), experts })).toBeLessThan(120);
  expect(matrixSeconds({ outputs: new Array(32).fill(block(4096, 11008)).flat(), experts })).toBeGreaterThan(10 * 3600);
});

it('a matrix too large to decompose is refused by name before any work', () => {
  const sizing = {
    name: 'w',
    rows: 25_000,
    columns: 30_000,
    experts: 2,
    access: 'matrix',
    whole: true,
    stored: true,
    budget: 1e15,
  } as const;
  expect(() => blockRowsFor({ ...sizing, decomposes: true })).toThrow(/tensor "w": eigenvectors of a \(25000, 25000\) matrix/);
  expect(blockRowsFor({ ...sizing, decomposes: false })).toBe(25_000);
  expect(blockRowsFor({ ...sizing, rows: 20_000, decomposes: true })).toBe(20_000);
});
