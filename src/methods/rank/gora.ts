/** GoRA (He et al., arXiv 2502.12171): ranks by what the gradient does to the weights, and one step against it to start from (adapters.md 5.3). */
import type { Blas, Matrix } from '../../compute/blas.ts';
import { multiply, transposed } from '../../compute/linalg/products.ts';
import { RecipeError } from '../../errors.ts';
import { compensate } from './compensation.ts';
import type { AdaptedShape, SpendableBudget } from './rank-budget.ts';
import { kaimingUniform } from './training/initial.ts';
import { waterfill } from './waterfill.ts';

/** Ranks that a layer has at least, and under `paper` at most; `best` allows so many times the mean. */
const LEAST = 4;
const MOST = 32;
const MOST_OF_MEAN = 4;
/** Length of the first step as a part of the gradient's. */
export const GORA_STEP = 0.05;
/** Parts of it that `best` tries on held-out text, beside none. */
const HALVINGS = 7;

/** Lengths of the first step to try, the best of which is kept. */
export function goraSteps(preset: 'best' | 'paper'): readonly number[] {
  return preset === 'paper' ? [GORA_STEP] : [0, ...Array.from({ length: HALVINGS }, (_, j) => GORA_STEP / 2 ** j)];
}

/** `mean |W * G|`: what setting single weights to nothing would change, to first order. */
export function goraImportance(weight: Float32Array, gradient: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < weight.length; i++) sum += Math.abs(weight[i] * gradient[i]);
  return sum / weight.length;
}

/** Ranks in proportion to importance; `rules` move the floor and ceiling of `best`. `paper` overspends where its floor binds, as published; `best` never does. */
export function goraRanks(
  layers: readonly (AdaptedShape & { readonly importance: number })[],
  budget: SpendableBudget,
  preset: 'best' | 'paper',
  rules: { readonly least?: number | undefined; readonly most?: number | undefined } = {},
): Map<string, number> {
  const whole = layers.reduce((sum, layer) => sum + budget.cost(layer), 0);
  const mean = budget.total / whole;
  if (preset === 'best') {
    const least = rules.least || Math.min(LEAST, Math.floor(mean));
    const ceiling = rules.most ?? Math.max(1, Math.floor(MOST_OF_MEAN * mean));
    const floor = least * whole;
    if (rules.least && floor > budget.total)
      throw new RecipeError(
        `--r-min ${least}: costs ${floor} in all ${layers.length} layers, and the budget is ${Math.floor(budget.total)}`,
      );
    const vessels = layers.map((layer) => ({
      name: layer.name,
      share: layer.importance,
      cost: budget.cost(layer),
      least,
      most: Math.min(ceiling, layer.outFeatures, layer.inFeatures),
    }));
    return waterfill(vessels, budget.total);
  }
  const importance = layers.reduce((sum, layer) => sum + layer.importance, 0);
  const parameters = mean * layers.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures + inFeatures, 0);
  return new Map(
    layers.map(({ name, outFeatures, inFeatures, importance: own }) => {
      const share = importance > 0 ? own / importance : 1 / layers.length;
      const rank = Math.floor(Math.round(parameters * share) / (outFeatures + inFeatures));
      return [name, Math.min(MOST, Math.max(LEAST, rank), outFeatures, inFeatures)];
    }),
  );
}

/** The most ranks a layer may be given: factors are made for so many, and cut. */
export function goraMostRank(budget: SpendableBudget, layers: readonly AdaptedShape[], preset: 'best' | 'paper'): number {
  const mean = budget.total / layers.reduce((sum, layer) => sum + budget.cost(layer), 0);
  return preset === 'paper' ? MOST : Math.max(LEAST, Math.floor(MOST_OF_MEAN * mean));
}

/** How the first step of a layer comes about for any rank up to one. */
export interface GradientStep {
  /** A (rank, n) and B (m, rank): `B A` is the step against the gradient with the gradient's own length (to be multiplied by a part of it). */
  factors(rank: number): { readonly loraA: Float32Array; readonly loraB: Float32Array };
}

/**
 * `paper`: random A, and the B with which `B A` is the gradient on A's rows, times root(n / rank). `best`: A the gradient's principal right
 * directions, `B A` as long as the gradient. Both go against the mean gradient: the released code's step is along the sum, which is uphill.
 */
export async function gradientStep(
  blas: Blas,
  gradient: Matrix,
  most: number,
  preset: 'best' | 'paper',
  { seed, name }: { readonly seed: number; readonly name: string },
): Promise<GradientStep> {
  const { rows: m, columns: n } = gradient;
  if (preset === 'paper') return randomStep(blas, gradient, Math.min(most, n, m), seed, name);
  const { rank: found, values, total, loraA, loraB } = await compensate(blas, gradient, undefined, Math.min(most, n, m));
  return {
    factors: (rank) => {
      const kept = Math.min(rank, found);
      const a = new Float32Array(rank * n);
      a.set(loraA.subarray(0, kept * n));
      const covered = values.slice(0, kept).reduce((sum, value) => sum + value, 0);
      const factor = covered > 0 ? -Math.sqrt(total / covered) : 0;
      const b = new Float32Array(m * rank);
      for (let i = 0; i < m; i++) for (let k = 0; k < kept; k++) b[i * rank + k] = factor * loraB[i * found + k];
      return { loraA: a, loraB: b };
    },
  };
}

async function randomStep(blas: Blas, gradient: Matrix, most: number, seed: number, name: string): Promise<GradientStep> {
  const { rows: m, columns: n } = gradient;
  const all = kaimingUniform(most, n, seed, `${name} loraA`);
  // Row k of A G^T.
  const along = (await blas.gemm({ rows: most, columns: n, data: all }, gradient, { transposeB: true })).data;
  return {
    factors: (rank) => {
      const kept = Math.min(rank, most);
      const a = Float64Array.from(all.subarray(0, kept * n));
      const gram = multiply(a, transposed(a, kept, n), kept, n, kept);
      const solved = solve(gram, Float64Array.from(along.subarray(0, kept * m)), kept, m);
      const factor = -Math.sqrt(n / kept);
      const loraB = new Float32Array(m * kept);
      for (let i = 0; i < m; i++) for (let k = 0; k < kept; k++) loraB[i * kept + k] = factor * solved[k * m + i];
      return { loraA: Float32Array.from(a), loraB };
    },
  };
}

/** `gram^-1 right` for a positive definite gram (k, k), right (k, m), by Gauss-Jordan: k is a rank. */
function solve(gram: Float64Array, right: Float64Array, k: number, m: number): Float64Array {
  const [a, b] = [gram.slice(), right.slice()];
  for (let pivot = 0; pivot < k; pivot++) {
    const inverse = 1 / a[pivot * k + pivot];
    for (let j = 0; j < k; j++) a[pivot * k + j] *= inverse;
    for (let j = 0; j < m; j++) b[pivot * m + j] *= inverse;
    for (let row = 0; row < k; row++) {
      if (row === pivot) continue;
      const factor = a[row * k + pivot];
      for (let j = 0; j < k; j++) a[row * k + j] -= factor * a[pivot * k + j];
      for (let j = 0; j < m; j++) b[row * m + j] -= factor * b[pivot * m + j];
    }
  }
  return b;
}
