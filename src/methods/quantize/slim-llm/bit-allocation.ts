/**
 * Salience-determined bit allocation (SBA, slim-llm 4.2): as many of the least salient groups give up a bit as of the most salient gain
 * one. How many is decided by how far the outputs' softmax moves, walking from both ends of the ranking at once.
 */
import type { Blas, Matrix } from '../../../compute/blas.ts';
import type { AsyncKernels, Group } from '../../../compute/kernels/kernels.ts';
import { columnRange } from '../columns.ts';
import { decodeGroup, fitMinMax } from '../grid.ts';

/** Tokens whose outputs are held at a time: enough for products with the whole of W at full speed. */
const TOKENS = 1024;
/** Tokens that make all moves before the next ones do: their outputs stay in the cache from one move to the next. */
const SLAB = 256;

/** What the search looks at: one linear layer and its inputs. */
export interface AllocationProblem {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly groupSize: number;
  /** Mean width N. */
  readonly bits: number;
  /** (outFeatures, inFeatures) */
  readonly weight: Float32Array;
  /** (outFeatures) */
  readonly bias: Float32Array | undefined;
  /** Columns of group g as the trial quantizes them. */
  group(g: number): Group;
  /** Inputs, (tokens, inFeatures) a batch. */
  batches(): AsyncIterable<Matrix>;
}

/** Widths with the k least salient groups at N - 1 bits and the k most salient at N + 1; `ranking` is ascending. */
export function widthsFor(ranking: readonly number[], k: number, bits: number): number[] {
  const widths = new Array<number>(ranking.length).fill(bits);
  for (let i = 0; i < k; i++) {
    widths[ranking[i]] = bits - 1;
    widths[ranking[ranking.length - 1 - i]] = bits + 1;
  }
  return widths;
}

/** Group numbers by ascending salience, equal ones in their order. */
export function rankGroups(salience: Float64Array): number[] {
  return Array.from(salience.keys()).sort((a, b) => salience[a] - salience[b] || a - b);
}

/**
 * Mean over tokens of `KL(softmax(y) || softmax(y_k))` for k = 0 .. floor(G / 2) - 1, y_k being the output with `widthsFor(ranking, k)`.
 * Each y_k is its predecessor plus the change of the two groups that moved, so all k together cost about three products with W.
 */
export async function divergences(
  blas: Blas,
  kernels: AsyncKernels,
  problem: AllocationProblem,
  ranking: readonly number[],
): Promise<Float64Array> {
  const { inFeatures, outFeatures, groupSize, bias } = problem;
  const weight = { rows: outFeatures, columns: inFeatures, data: problem.weight };
  const { uniform, moves } = await trials(kernels, problem, ranking);
  const sums = new Float64Array(moves.length + 1);
  // Used again for every chunk: fresh memory of this size costs about as much as the products that fill it gain.
  const outputs = { target: new Float32Array(TOKENS * outFeatures), trial: new Float32Array(TOKENS * outFeatures) };
  const inputs = new Float32Array(SLAB * 2 * groupSize);
  const softmax = new Float32Array(SLAB * outFeatures);
  let tokenCount = 0;
  for await (const batch of problem.batches()) {
    for (let start = 0; start < batch.rows; start += TOKENS) {
      const x = rowsOf(batch, start, Math.min(start + TOKENS, batch.rows));
      const target = biasRows(bias, outputs.target, x.rows, outFeatures);
      const trial = biasRows(bias, outputs.trial, x.rows, outFeatures);
      await blas.gemm(x, weight, { transposeB: true, beta: 1, out: target });
      await blas.gemm(x, uniform, { beta: 1, out: trial });
      for (let row = 0; row < x.rows; row += SLAB) {
        const end = Math.min(row + SLAB, x.rows);
        const slab = rowsOf(x, row, end);
        const out = rowsOf(trial, row, end);
        const wanted = await blas.klTarget(rowsOf(target, row, end), softmax.subarray(0, slab.rows * outFeatures));
        sums[0] += slab.rows * (await wanted.meanKl(out));
        for (const [i, move] of moves.entries()) {
          await blas.gemm(takeInputs(slab, move.columns, inputs), move.change, { beta: 1, out });
          sums[i + 1] += slab.rows * (await wanted.meanKl(out));
        }
      }
      tokenCount += x.rows;
    }
  }
  return sums.map((sum) => sum / tokenCount);
}

/** Smallest k whose divergence no other k undercuts. */
export function bestSplit(divergence: Float64Array): number {
  let best = 0;
  for (let k = 1; k < divergence.length; k++) if (divergence[k] < divergence[best]) best = k;
  return best;
}

/** Two groups changing width: their columns, and by how much the decoded weights change, (columns, outFeatures). */
interface Move {
  readonly columns: Uint32Array;
  readonly change: Matrix;
}

/** Every group decoded at N bits, (inFeatures, outFeatures), and the moves that lead from one k to the next. */
async function trials(
  kernels: AsyncKernels,
  problem: AllocationProblem,
  ranking: readonly number[],
): Promise<{ uniform: Matrix; moves: Move[] }> {
  const { inFeatures, outFeatures, groupSize, bits } = problem;
  const uniform = { rows: inFeatures, columns: outFeatures, data: new Float32Array(inFeatures * outFeatures) };
  const columnsOf = (g: number) => columnRange(g * groupSize, Math.min((g + 1) * groupSize, inFeatures));
  const moves = Array.from({ length: Math.max(0, Math.floor(ranking.length / 2) - 1) }, (_, i): Move => {
    const columns = Uint32Array.of(...columnsOf(ranking[i]), ...columnsOf(ranking[ranking.length - 1 - i]));
    const change = { rows: columns.length, columns: outFeatures, data: new Float32Array(columns.length * outFeatures) };
    return { columns, change };
  });
  for (const [i, g] of ranking.entries()) {
    const group = problem.group(g);
    const trial = await trialWeights(kernels, group, bits);
    uniform.data.set(trial, g * groupSize * outFeatures);
    const last = ranking.length - 1 - i;
    const move = moves[Math.min(i, last)];
    if (move === undefined) continue;
    // The less salient of the two groups comes first in a move.
    const at = i < last ? 0 : move.change.data.length - trial.length;
    const moved = await trialWeights(kernels, group, i < last ? bits - 1 : bits + 1);
    for (let j = 0; j < trial.length; j++) move.change.data[at + j] = moved[j] - trial[j];
  }
  return { uniform, moves };
}

/** Plain min-max rounding, (columns, outFeatures). Scales stay float32: trials are compared, not stored. */
async function trialWeights(kernels: AsyncKernels, group: Group, bits: number): Promise<Float32Array> {
  const grid = await fitMinMax(kernels, group, bits, false);
  return decodeGroup(await kernels.roundCodes(group, bits, grid), bits, grid);
}

/** Columns of x, packed into `memory`. */
function takeInputs(x: Matrix, columns: Uint32Array, memory: Float32Array): Matrix {
  let to = 0;
  for (let row = 0; row < x.rows; row++) {
    const from = row * x.columns;
    for (let j = 0; j < columns.length; j++) memory[to++] = x.data[from + columns[j]];
  }
  return { rows: x.rows, columns: columns.length, data: memory.subarray(0, to) };
}

/** Rows [start, end), a view. */
function rowsOf({ columns, data }: Matrix, start: number, end: number): Matrix {
  return { rows: end - start, columns, data: data.subarray(start * columns, end * columns) };
}

/** The bias in every row of `memory`, where a product is added to. */
function biasRows(bias: Float32Array | undefined, memory: Float32Array, rows: number, columns: number): Matrix {
  const data = memory.subarray(0, rows * columns);
  if (bias) for (let row = 0; row < rows; row++) data.set(bias, row * columns);
  else data.fill(0);
  return { rows, columns, data };
}
