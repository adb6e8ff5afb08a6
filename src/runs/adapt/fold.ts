/** Adapters that are no plain factors as plain factors, where little is lost: routed experts by least squares on text, sparse updates by their principal components. */

import type { AdapterContents } from '../../artifacts/adapter-reader.ts';
import type { AdapterModule } from '../../artifacts/peft.ts';
import type { RoutedModule } from '../../artifacts/routed-adapter.ts';
import type { DeltaModule } from '../../artifacts/sparse-delta.ts';
import { Calibration } from '../../calibration/calibration.ts';
import type { MeasuredBlock, MeasuredInput } from '../../calibration/measured.ts';
import type { Blas, Matrix } from '../../compute/blas.ts';
import type { Engine, NdArray, Program } from '../../compute/engine.ts';
import { UnsupportedError } from '../../errors.ts';
import { GraphBuilder } from '../../graph/builder.ts';
import { ROUTED_TENSORS, routedBranch, routedSizes } from '../../graph/routed-branch.ts';
import { compensate } from '../../methods/rank/compensation.ts';
import type { LinearSite, WeightReader } from '../../model/model.ts';
import type { Forward } from '../forward.ts';
import type { RunHooks } from '../run.ts';
import { AdapterWeights } from './adapter-weights.ts';
import { surveyWindows } from './text.ts';

/** What folding may lose, unless something else is asked for: the part of a branch's output, root of the mean square. */
export const FOLD_LIMIT = 0.05;
/** Of the mean second moment of an input, so that directions that the text does not have say nothing. */
const DAMPENING = 1e-6;

export interface FoldRules {
  /** Relative error that is allowed. */
  readonly limit: number;
  /** Of the factors; absent: as many as the experts have together, or as cost what a sparse update costs. */
  readonly rank?: number | undefined;
  /** `ls`: least squares of the branch's outputs on its inputs. `mean`: every expert by its mean weight. */
  readonly fold: 'ls' | 'mean';
}

/** A folded layer, and what was lost of it. */
export interface FoldedModule extends AdapterModule {
  /** `sqrt(E |y - C x|^2 / E |y|^2)` on held-out text; of a sparse update, of its entries. */
  readonly error: number;
  /** Mean entropy of the router's softmax over all experts, in parts of the most it could be; absent: no router. */
  readonly entropy?: number;
}

/** Throws UnsupportedError with the error and the limit, for the layer that loses most. */
export function requireFaithful(path: string, modules: readonly FoldedModule[], limit: number): void {
  const worst = modules.reduce((most, module) => (module.error > most.error ? module : most), modules[0]);
  if (worst === undefined || worst.error <= limit) return;
  const router = worst.entropy === undefined ? '' : `, router entropy ${worst.entropy.toFixed(4)} of 1`;
  throw new UnsupportedError(
    `${path}: folded to rank ${worst.rank}, "${worst.name}" loses ${worst.error.toFixed(3)} of what it adds (root mean square${router}), and the limit is ${limit}; --max-error allows more`,
  );
}

/** Sparse updates by their principal components. */
export async function foldDeltas(blas: Blas, deltas: readonly DeltaModule[], { rank }: FoldRules): Promise<FoldedModule[]> {
  const folded: FoldedModule[] = [];
  for (const { name, outFeatures, inFeatures, indices, values } of deltas) {
    const data = new Float32Array(outFeatures * inFeatures);
    for (const [i, at] of indices.entries()) data[at] = values[i];
    const most = Math.min(outFeatures, inFeatures, rank ?? Math.max(1, Math.floor(values.length / (outFeatures + inFeatures))));
    const matrix = { rows: outFeatures, columns: inFeatures, data };
    const found = await compensate(blas, matrix, undefined, most);
    const covered = found.values.reduce((sum, value) => sum + value, 0);
    const error = found.total > 0 ? Math.sqrt(Math.max(0, 1 - covered / found.total)) : 0;
    folded.push({ name, rank: found.rank, loraA: found.loraA, loraB: found.loraB, error });
  }
  return folded;
}

export interface FoldText {
  readonly training: readonly Int32Array[];
  readonly heldOut: readonly Int32Array[];
}

/** Routed experts, fitted to what they add to the text's tokens in the model that has them all, and measured on text that was held out. */
export async function foldRouted(
  forward: Forward,
  base: WeightReader,
  contents: AdapterContents,
  text: FoldText,
  rules: FoldRules,
  progress?: RunHooks['progress'],
): Promise<FoldedModule[]> {
  const { model, engine, blas, path, signal } = forward;
  const weights = new AdapterWeights(base, contents, blas);
  const byName = new Map(contents.routed.map((module) => [module.name, module]));
  const open = (windows: readonly Int32Array[]) =>
    new Calibration({ model, engine, blas, windows, path, ...(signal ? { signal } : {}) });
  await using fitting = open(surveyWindows(text.training));
  await using testing = open(text.heldOut);
  await fitting.start(weights);
  await testing.start(weights);
  const folded: FoldedModule[] = [];
  for (const block of model.blocks) {
    progress?.({ phase: `fold ${block.name}`, done: block.index, total: model.blocks.length });
    const sites = block.sites.filter(({ name }) => byName.has(name));
    const inputs = [...new Set(sites.map(({ input }) => input))];
    const options = { inputs, advance: true };
    await using seen: MeasuredBlock = await fitting.measure(block, weights, options);
    await using unseen: MeasuredBlock = await testing.measure(block, weights, options);
    for (const site of sites) {
      const branch = await Branch.open(engine, byName.get(site.name)!);
      folded.push(await foldOne(blas, site, branch, { seen: seen.get(site.input)!, unseen: unseen.get(site.input)! }, rules));
    }
  }
  return folded.toSorted((x, y) => (x.name < y.name ? -1 : 1));
}

async function foldOne(
  blas: Blas,
  { name, outFeatures: m, inFeatures: n }: LinearSite,
  branch: Branch,
  { seen, unseen }: { readonly seen: MeasuredInput; readonly unseen: MeasuredInput },
  { rank, fold }: FoldRules,
): Promise<FoldedModule> {
  const { routed } = branch.module;
  const matrix = fold === 'mean' ? await meanMatrix(blas, branch, seen) : await leastSquares(blas, branch, seen);
  const usual = routed.sharedA ? routed.rank : branch.module.expertsB.length / m;
  const cut = await compensate(blas, matrix, seen.hessian, Math.min(rank ?? usual, m, n));
  let [missed, whole, entropy] = [0, 0, 0];
  for await (const x of unseen.batches()) {
    const { output, probabilities } = await branch.run(x);
    const down = await blas.gemm(x, { rows: cut.rank, columns: n, data: cut.loraA }, { transposeB: true });
    const { data } = await blas.gemm(down, { rows: m, columns: cut.rank, data: cut.loraB }, { transposeB: true });
    for (let i = 0; i < data.length; i++) {
      missed += (output.data[i] - data[i]) ** 2;
      whole += output.data[i] ** 2;
    }
    for (const p of probabilities.data) entropy -= p > 0 ? p * Math.log(p) : 0;
  }
  const most = Math.log(routed.experts) * unseen.tokenCount;
  return {
    name,
    rank: cut.rank,
    loraA: cut.loraA,
    loraB: cut.loraB,
    error: whole > 0 ? Math.sqrt(missed / whole) : 0,
    entropy: most > 0 ? entropy / most : 1,
  };
}

/** `E[y x^T] R^-1`, (m, n). */
async function leastSquares(blas: Blas, branch: Branch, seen: MeasuredInput): Promise<Matrix> {
  const { outFeatures: m, inFeatures: n } = branch.module;
  const moment: Matrix = { rows: m, columns: n, data: new Float32Array(m * n) };
  for await (const x of seen.batches()) {
    const { output } = await branch.run(x);
    await blas.gemm(output, x, { transposeA: true, alpha: 1 / seen.tokenCount, beta: 1, out: moment });
  }
  const damped = seen.hessian.slice();
  let trace = 0;
  for (let j = 0; j < n; j++) trace += damped[j * n + j];
  for (let j = 0; j < n; j++) damped[j * n + j] += (DAMPENING * trace) / n || 1;
  // R^-1 = U^T U.
  const factor = { rows: n, columns: n, data: new Float32Array(n * n) };
  const upper = await blas.inverseFactor(damped, n);
  for (let j = 0; j < n; j++) upper.readRow(j, factor.data.subarray(j * n + j, (j + 1) * n));
  return await blas.gemm(await blas.gemm(moment, factor, { transposeB: true }), factor);
}

/** `sum_j E[w_j] B_j A_j`, (m, n). */
async function meanMatrix(blas: Blas, branch: Branch, seen: MeasuredInput): Promise<Matrix> {
  const { routed, outFeatures: m, inFeatures: n, expertsA, expertsB } = branch.module;
  const { experts, rank, sharedA } = routed;
  const width = expertsB.length / m;
  const weights = new Float64Array(width / rank).fill(1);
  weights.fill(0, 0, experts);
  for await (const x of seen.batches()) {
    const { gate } = await branch.run(x);
    for (let i = 0; i < gate.data.length; i++) weights[i % experts] += gate.data[i] / seen.tokenCount;
  }
  const left = { rows: m, columns: width, data: expertsB.map((value, i) => value * weights[Math.floor((i % width) / rank)]) };
  const each = expertsA.length / n;
  const right = new Float32Array(width * n);
  for (let k = 0; k < width; k++)
    right.set(expertsA.subarray((sharedA ? k % each : k) * n, ((sharedA ? k % each : k) + 1) * n), k * n);
  return await blas.gemm(left, { rows: width, columns: n, data: right });
}

/** A layer's experts on their own. */
class Branch {
  readonly module: RoutedModule;
  readonly #program: Program;
  readonly #tensors: Readonly<Record<string, NdArray>>;

  private constructor(module: RoutedModule, program: Program, tensors: Readonly<Record<string, NdArray>>) {
    this.module = module;
    this.#program = program;
    this.#tensors = tensors;
  }

  static async open(engine: Engine, module: RoutedModule): Promise<Branch> {
    const { routed, inFeatures, outFeatures } = module;
    const builder = new GraphBuilder('routed_branch');
    const x = builder.input('x', 'F32', ['batch', 'rows', inFeatures]);
    const sizes = routedSizes(routed, module);
    const [router, expertsA, expertsB] = ROUTED_TENSORS.map((key) => builder.input(key, 'F32', sizes[key]));
    const { output, logits, gate } = routedBranch(builder, x, routed, { router, expertsA, expertsB });
    builder.output('output', output);
    builder.output('gate', gate);
    builder.output('probabilities', builder.softmax(logits));
    const key = `routed branch ${JSON.stringify(routed)} ${inFeatures} ${outFeatures}`;
    const program = await engine.compile(builder.build(), { key, memoryArena: false });
    const tensors = ROUTED_TENSORS.map((name) => [name, { dtype: 'F32', shape: sizes[name], data: module[name] }] as const);
    return new Branch(module, program, Object.fromEntries(tensors));
  }

  /** @param x (rows, inFeatures) */
  async run({ rows, columns, data }: Matrix): Promise<Record<'output' | 'gate' | 'probabilities', Matrix>> {
    const made = await this.#program.run({ x: { dtype: 'F32', shape: [1, rows, columns], data }, ...this.#tensors });
    const matrix = (name: string): Matrix => {
      const { shape, data: values } = made[name];
      return { rows, columns: shape[2], data: values as Float32Array };
    };
    return { output: matrix('output'), gate: matrix('gate'), probabilities: matrix('probabilities') };
  }
}
