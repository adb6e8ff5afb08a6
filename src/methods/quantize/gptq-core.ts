/** GPTQ's sweep over the columns of a layer (slim-llm 3.4; Frantar et al., arXiv 2210.17323), whatever the grids. */
import type { Blas } from '../../compute/blas.ts';
import type { Grid, Group } from '../../compute/kernels/kernels.ts';
import { wasmKernels } from '../../compute/kernels/wasm-kernels.ts';
import type { DampedFactor } from './damped-factor.ts';

/** Columns quantized before their errors are pushed on to the rest by one matrix product. */
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
  factor: DampedFactor,
  columns: Float32Array,
  blockSize: number,
  grids: (block: SweepBlock) => BlockGrids,
  accept: (block: SweepBlock, codes: Uint8Array) => void,
): Promise<number> {
  const n = factor.features;
  const rows = columns.length / n;
  let loss = 0;
  for (let start = 0; start < n; start += blockSize) {
    const end = Math.min(start + blockSize, n);
    const group = { columns: end - start, rows, values: columns.subarray(start * rows, end * rows) };
    const block = { start, end, group };
    const { bits, grid } = grids(block);
    const { codes, errors } = wasmKernels().compensate(group, factor.diagonalBlock(start, end), bits, grid);
    accept(block, codes);
    for (let i = 0; i < errors.length; i++) loss += errors[i] * errors[i];
    if (end === n) break;
    await blas.gemm(
      factor.laterBlock(start, end),
      { rows: end - start, columns: rows, data: errors },
      {
        transposeA: true,
        alpha: -1,
        beta: 1,
        out: { rows: n - end, columns: rows, data: columns.subarray(end * rows) },
      },
    );
  }
  return loss;
}
