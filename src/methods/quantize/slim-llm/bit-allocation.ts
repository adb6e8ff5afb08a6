/**
 * Salience-determined bit allocation (SBA, slim-llm 4.2): as many of the least salient groups give up a bit as of the most salient gain
 * one. How many is decided by how far the outputs' softmax moves, walking from both ends of the ranking at once.
 */
import type { Blas, Matrix } from '../../../compute/blas.ts';
import type { Group } from '../../../compute/kernels/kernels.ts';
import { wasmKernels } from '../../../compute/kernels/wasm-kernels.ts';
import { decodeGroup, fitMinMax } from '../grid.ts';

/** Tokens whose outputs are held at a time. */
const TOKENS = 1024;

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
export async function divergences(blas: Blas, problem: AllocationProblem, ranking: readonly number[]): Promise<Float64Array> {
  const { inFeatures, outFeatures, bias } = problem;
  const weight = { rows: outFeatures, columns: inFeatures, data: problem.weight };
  const { uniform, moves } = trials(problem, ranking);
  const sums = new Float64Array(moves.length + 1);
  let tokenCount = 0;
  for await (const batch of problem.batches()) {
    for (let start = 0; start < batch.rows; start += TOKENS) {
      const rows = Math.min(TOKENS, batch.rows - start);
      const x = { rows, columns: inFeatures, data: batch.data.subarray(start * inFeatures, (start + rows) * inFeatures) };
      const target = await blas.klTarget(
        await blas.gemm(x, weight, { transposeB: true, beta: 1, out: biasRows(bias, rows, outFeatures) }),
      );
      const trial = await blas.gemm(x, uniform, { beta: 1, out: biasRows(bias, rows, outFeatures) });
      sums[0] += rows * (await target.meanKl(trial));
      for (const [i, move] of moves.entries()) {
        await blas.gemm(takeInputs(x, move.columns), move.change, { beta: 1, out: trial });
        sums[i + 1] += rows * (await target.meanKl(trial));
      }
      tokenCount += rows;
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
function trials(problem: AllocationProblem, ranking: readonly number[]): { uniform: Matrix; moves: Move[] } {
  const { inFeatures, outFeatures, groupSize, bits } = problem;
  const uniform = { rows: inFeatures, columns: outFeatures, data: new Float32Array(inFeatures * outFeatures) };
  for (const g of ranking) uniform.data.set(trialWeights(problem.group(g), bits), g * groupSize * outFeatures);
  const moves = [];
  for (let k = 1; k < Math.floor(ranking.length / 2); k++) {
    const ends = [
      { group: ranking[k - 1], width: bits - 1 },
      { group: ranking[ranking.length - k], width: bits + 1 },
    ];
    const changes = ends.map(({ group: g, width }) => {
      const change = trialWeights(problem.group(g), width);
      const from = g * groupSize * outFeatures;
      for (let i = 0; i < change.length; i++) change[i] -= uniform.data[from + i];
      return { start: g * groupSize, change };
    });
    const count = changes.reduce((sum, { change }) => sum + change.length / outFeatures, 0);
    const columns = new Uint32Array(count);
    const data = new Float32Array(count * outFeatures);
    let at = 0;
    for (const { start, change } of changes) {
      data.set(change, at * outFeatures);
      for (let i = 0; i < change.length / outFeatures; i++) columns[at++] = start + i;
    }
    moves.push({ columns, change: { rows: count, columns: outFeatures, data } });
  }
  return { uniform, moves };
}

/** Plain min-max rounding, (columns, outFeatures). Scales stay float32: trials are compared, not stored. */
function trialWeights(group: Group, bits: number): Float32Array {
  const grid = fitMinMax(group, bits, false);
  return decodeGroup(wasmKernels().roundCodes(group, bits, grid), bits, grid);
}

function takeInputs(x: Matrix, columns: Uint32Array): Matrix {
  const data = new Float32Array(x.rows * columns.length);
  let to = 0;
  for (let row = 0; row < x.rows; row++) {
    const from = row * x.columns;
    for (let j = 0; j < columns.length; j++) data[to++] = x.data[from + columns[j]];
  }
  return { rows: x.rows, columns: columns.length, data };
}

/** The bias in every row, where a product is added to. */
function biasRows(bias: Float32Array | undefined, rows: number, columns: number): Matrix {
  const data = new Float32Array(rows * columns);
  if (bias) for (let row = 0; row < rows; row++) data.set(bias, row * columns);
  return { rows, columns, data };
}
