/** Sites, options and contexts for tests of quantizers. */
import type { Blas } from '../../../src/compute/blas.ts';
import type { QuantizeContext, QuantizeOptions } from '../../../src/methods/quantize/quantizer.ts';
import type { LinearSite } from '../../../src/model/model.ts';
import { naiveBlas } from '../../support/naive-blas.ts';
import { normals } from '../../support/reference-layer.ts';

export function siteOf(outFeatures: number, inFeatures: number, name = 'layer'): LinearSite {
  return { name, outFeatures, inFeatures, hasBias: false, transposed: false, input: 'x' };
}

const DEFAULTS: QuantizeOptions = {
  preset: 'paper',
  bits: 2,
  groupSize: 32,
  dampening: 0.01,
  actOrder: false,
  staticGroups: false,
  symmetric: false,
  lambdaSalience: 1,
  salience: 'code',
};

/** A context that keeps its notes. */
export function contextOf(
  options: Partial<QuantizeOptions> = {},
  blas: Blas = naiveBlas(),
): QuantizeContext & { readonly notes: string[] } {
  const notes: string[] = [];
  return { blas, options: { ...DEFAULTS, ...options }, notes, note: (site, message) => notes.push(`${site.name}: ${message}`) };
}

/** Normal weights, (outFeatures, inFeatures). */
export function randomWeight(outFeatures: number, inFeatures: number, seed = 1, deviation = 0.05): Float32Array {
  return Float32Array.from(normals(seed, outFeatures * inFeatures), (z) => deviation * z);
}

/** Correlated tokens: each channel has some of the one before it, and every fifth is four times as loud. */
export function randomTokens(count: number, features: number, seed = 50): { rows: number; columns: number; data: Float32Array } {
  const data = Float32Array.from(normals(seed, count * features));
  for (let t = 0; t < count; t++) {
    for (let j = 1; j < features; j++) data[t * features + j] += 0.7 * data[t * features + j - 1];
    for (let j = 0; j < features; j += 5) data[t * features + j] *= 4;
  }
  return { rows: count, columns: features, data };
}
