/** GPTQ's sweep over the columns of a layer (slim-llm 3.4; Frantar et al., arXiv 2210.17323), whatever the grids. */
import type { Blas } from '../../compute/blas.ts';
import type { AsyncKernels, Grid, Group } from '../../compute/kernels/kernels.ts';
import type { DampedFactor } from './damped-factor.ts';

/**
 * Columns whose errors are pushed on to all later ones by one matrix product. A product over 512 columns runs at about twice the rate of
 * one over a group's 128; up to there errors go to the columns of the same span only.
 */
const SPAN = 512;

/** Columns quantized together. */
export interface SweepBlock {
  /** Visited columns [start, end). */
  readonly start: number;
  readonly end: number;
  /** Their weights, compensated for all earlier blocks. */
  readonly group: Group;
}

/** How a block's columns are to be quantized: one width a column, and a grid shared by all, (rows), or one a column, (columns, rows). */
export interface BlockGrids {
  readonly bits: Uint8Array;
  readonly grid: Grid;
}

/**
 * Quantizes W^T, given as (inFeatures, outFeatures) in visiting order and overwritten, block after block of `blockSize` columns:
 * each column's error is made up for by the later columns of its block, and a block's errors by all later blocks.
 * @param grids asked for each block in turn, and may fit them to the compensated weights
 * @param accept gets each block's codes, (columns, rows)
 * @returns `sum e^2 = tr((Wq - W) H (Wq - W)^T)` for the damped H
 */
export async function sweep(
  blas: Blas,
  kernels: AsyncKernels,
  factor: DampedFactor,
  columns: Float32Array,
  blockSize: number,
  grids: (block: SweepBlock) => BlockGrids | Promise<BlockGrids>,
  accept: (block: SweepBlock, codes: Uint8Array) => void,
): Promise<number> {
  const n = factor.features;
  const rows = columns.length / n;
  const span = blockSize * Math.max(1, Math.floor(SPAN / blockSize));
  const errors = new Float32Array(Math.min(span, n) * rows);
  let loss = 0;
  /** `W[:, from..to] -= E U[start..end, from..to]`, E being the errors of columns [start, end) of the span that begins at `first`. */
  const pushOn = async (first: number, start: number, end: number, from: number, to: number): Promise<void> => {
    if (from === to) return;
    const e = { rows: end - start, columns: rows, data: errors.subarray((start - first) * rows, (end - first) * rows) };
    const out = { rows: to - from, columns: rows, data: columns.subarray(from * rows, to * rows) };
    await blas.gemm(factor.laterBlock(start, end, from, to), e, { alpha: -1, beta: 1, out });
  };
  for (let first = 0; first < n; first += span) {
    const last = Math.min(first + span, n);
    for (let start = first; start < last; start += blockSize) {
      const end = Math.min(start + blockSize, last);
      const group = { columns: end - start, rows, values: columns.subarray(start * rows, end * rows) };
      const block = { start, end, group };
      const { bits, grid } = await grids(block);
      const compensated = await kernels.compensate(group, factor.diagonalBlock(start, end), bits, grid);
      accept(block, compensated.codes);
      loss += sumOfSquares(compensated.errors);
      errors.set(compensated.errors, (start - first) * rows);
      await pushOn(first, start, end, end, last);
    }
    await pushOn(first, first, last, last, n);
  }
  return loss;
}

function sumOfSquares(values: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] * values[i];
  return sum;
}
