/**
 * The Karcher (Riemannian) mean of the experts' directions on the sphere, at their mean length (arXiv 2603.04972). The mean is a
 * combination of the experts, so the iteration runs on K coefficients with the Gram matrix; the tensors are read twice, whatever `max_iter`.
 */
import { GramScan } from './gram.ts';
import { defineMerger } from './merger.ts';
import { weightedSum } from './weighted-sum.ts';
import { normalizedWeights } from './weights.ts';

/** A start shorter than this has no direction; a term whose sine is below it has none to add. */
const TINY = 1e-8;

export const karcher = defineMerger({
  name: 'karcher',
  formula: 'u sum a_k |theta_k|, u the point of the sphere with the least sum a_k angle(u, theta_k)^2',
  reference: '2603.04972',
  access: 'gram',
  base: 'unused',
  experts: { min: 1 },
  parameters: {
    weight: {
      type: 'number',
      summary: 'weight of the expert; they are divided by their sum',
      default: 1,
      min: 0,
      perExpert: true,
    },
    max_iter: { type: 'number', summary: 'most steps of the iteration', default: 10, min: 0, integer: true },
    tol: {
      type: 'number',
      summary: 'length of a step that ends it; experts not longer have no direction',
      default: 1e-5,
      min: 0,
    },
  },
  prepare(_tensor, { weight, max_iter, tol }) {
    const a = normalizedWeights('karcher', weight);
    const gram = new GramScan(a.length);
    let coefficients: readonly number[] | undefined;
    return {
      scans: [{ look: (block) => gram.add(block.experts) }],
      merge(block) {
        coefficients ??= karcherCoefficients(gram.matrix(), a, max_iter, tol);
        return weightedSum(block.experts, coefficients, block.output);
      },
    };
  },
});

/** `c` with mean = sum c_k theta_k. @param products (K, K), @param a weights that sum to 1 */
function karcherCoefficients(products: Float64Array, a: readonly number[], maxIterations: number, tolerance: number): number[] {
  const size = a.length;
  const norms = a.map((_, k) => Math.sqrt(products[k * size + k]));
  const used = a.flatMap((_, k) => (norms[k] > tolerance ? [k] : []));
  const usedWeight = used.reduce((total, k) => total + a[k], 0);
  const result = new Array<number>(size).fill(0);
  if (used.length === 0 || usedWeight === 0) return result;
  const weights = used.map((k) => a[k] / usedWeight);
  // Inner products of the unit vectors.
  const cosines = used.map((i) => used.map((j) => products[i * size + j] / (norms[i] * norms[j])));
  const project = (u: readonly number[]) => cosines.map((row) => dot(row, u));
  const length = (u: readonly number[]) => Math.sqrt(Math.max(0, dot(u, project(u))));

  let u: number[] = weights;
  if (length(u) < TINY) u = weights.map((_, k) => (k === 0 ? 1 : 0));
  u = divide(u, length(u));
  for (let iteration = 0; iteration < maxIterations; iteration++) {
    const tangent = new Array<number>(used.length).fill(0);
    for (const [k, cosine] of project(u).entries()) {
      const clamped = Math.max(-1, Math.min(1, cosine));
      const phi = Math.acos(clamped);
      if (phi < tolerance || Math.sin(phi) < TINY) continue;
      const scale = (weights[k] * phi) / Math.sin(phi);
      for (let j = 0; j < u.length; j++) tangent[j] -= scale * clamped * u[j];
      tangent[k] += scale;
    }
    const step = length(tangent);
    if (step < tolerance) break;
    const next = u.map((value, k) => Math.cos(step) * value + (Math.sin(step) * tangent[k]) / step);
    u = divide(next, length(next));
  }
  const scale = a.reduce((total, weight, k) => total + weight * norms[k], 0);
  for (const [i, k] of used.entries()) result[k] = (u[i] * scale) / norms[k];
  return result;
}

function dot(x: readonly number[], y: readonly number[]): number {
  return x.reduce((total, value, i) => total + value * y[i], 0);
}

function divide(x: readonly number[], by: number): number[] {
  return x.map((value) => value / by);
}
