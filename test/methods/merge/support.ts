/** The tensors of merging.md 4.1, and a short way to take them through a method. */
import { expect } from 'vitest';
import { type BlockInputs, mergeBlock, mergeTensor } from '../../../src/methods/merge/drive.ts';
import { mergerOf } from '../../../src/methods/merge/index.ts';
import type { MergeBlock, MergeContext, MergeTensor } from '../../../src/methods/merge/merger.ts';
import { type RawParameters, resolveParameters } from '../../../src/methods/merge/parameters.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

/** Absolute, merging.md 4.1. */
export const TOLERANCE = 2e-6;

export const BASE = [1, -2, 0.5, 0, 3, -1];
export const ONE = [1.5, -2.25, 0.5, 0.75, 2, -1.5];
export const TWO = [0.75, -1, 1, 0.5, 3, -2];
export const THREE = [1, -2, 0, 1, 3.5, -0.5];
export const ALL = [ONE, TWO, THREE];

/** `base + delta`, in float32. */
export function moved(delta: readonly number[]): number[] {
  return BASE.map((value, i) => Math.fround(value + delta[i]));
}

export interface MergeCase {
  readonly base?: readonly number[] | undefined;
  readonly experts: readonly (readonly number[])[];
  readonly statistics?: readonly (readonly number[])[];
  /** [2, 3] unless said. */
  readonly shape?: readonly number[];
  readonly parameters?: RawParameters['shared'];
  readonly preset?: 'best' | 'paper';
  readonly name?: string;
  /** a, b, c unless said. */
  readonly labels?: readonly string[];
  readonly context?: Partial<MergeContext>;
  /** Rows per block; all unless said. A list is used up block by block, then its last entry again. */
  readonly rows?: number | readonly number[];
}

/** What a method makes of a case, and what it noted on the way. */
export async function merged(method: string, given: MergeCase): Promise<{ values: number[]; notes: string[] }> {
  const merger = mergerOf(method);
  const notes: string[] = [];
  const tensor: MergeTensor = {
    name: given.name ?? 'w',
    shape: given.shape ?? [2, 3],
    role: 'matrix',
    experts: given.labels ?? given.experts.map((_, k) => String.fromCharCode(97 + k)),
  };
  const context: MergeContext = { seed: 5, blas: naiveBlas(), note: (_tensor, message) => notes.push(message), ...given.context };
  const values = resolveParameters(merger, { shared: given.parameters ?? {} }, tensor.experts, given.preset ?? 'best');
  const inputs: BlockInputs = {
    base: given.base && Float32Array.from(given.base),
    experts: given.experts.map((expert) => Float32Array.from(expert)),
    ...(given.statistics ? { statistics: given.statistics.map((f) => Float32Array.from(f)) } : {}),
  };
  const result: number[] = [];
  const blocks = (every = 1) => [...cutRows(tensor.shape, inputs, given.rows)].filter((_, i) => i % every === 0);
  for await (const block of mergeTensor(merger, tensor, blocks, values, context)) result.push(...block);
  const stored = [...inputs.experts, inputs.base];
  const untouched = [...given.experts, given.base ?? []].every((values, i) =>
    values.every((value, at) => Object.is(Math.fround(value), stored[i]?.[at])),
  );
  expect(untouched, 'the inputs are as they were').toBe(true);
  return { values: result, notes };
}

/** The blocks of a tensor, a few rows at a time. */
export function* cutRows(shape: readonly number[], inputs: BlockInputs, rows?: MergeCase['rows']): Generator<MergeBlock> {
  const columns = shape.at(-1) ?? 1;
  const length = shape.reduce((a, b) => a * b, 1);
  const sizes = typeof rows === 'number' ? [rows] : [...(rows ?? [length / columns])];
  let start = 0;
  while (start < length) {
    const end = Math.min(length, start + columns * (sizes.length > 1 ? sizes.shift()! : sizes[0]));
    const cut = (values: Float32Array) => values.subarray(start, end);
    yield mergeBlock(start, {
      base: inputs.base && cut(inputs.base),
      experts: inputs.experts.map(cut),
      // What is of the whole tensor stays whole: a Gram matrix has another size.
      ...(inputs.statistics ? { statistics: rows === undefined ? inputs.statistics : inputs.statistics.map(cut) } : {}),
    });
    start = end;
  }
}
