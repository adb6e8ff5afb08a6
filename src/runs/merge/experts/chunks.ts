/** The second stage's chunks: more of them in tensors that the first stage found to matter (merging.md 6.6). */

import { evenChunks, floorChunks } from '../../../methods/merge/expert-merging/chunk-budget.ts';
import { type ChunkBounds, flatChunks, rowChunks } from '../../../methods/merge/expert-merging/chunks.ts';
import { type Coefficients, effectiveCoefficient } from '../../../methods/merge/expert-merging/coefficients.ts';
import type { LearnedValues } from '../../../methods/merge/learned.ts';
import type { Block, LinearSite, Model } from '../../../model/model.ts';
import type { MergeWeights } from '../weights.ts';
import type { LearnedWeights } from './learned-weights.ts';
import { chunksPerTensor } from './rules.ts';

export interface ChunkSearch {
  readonly model: Model;
  readonly weights: MergeWeights;
  readonly expertCount: number;
  /** Of the first stage, a chunk per tensor, and the model that they make. */
  readonly coefficients: Coefficients;
  readonly learned: LearnedWeights;
  readonly values: LearnedValues;
  readonly paper: boolean;
  /** Of each expert. */
  readonly samples: number;
}

/** Bounds of every site's chunks, in the order of the model's sites. */
export async function findChunks(search: ChunkSearch): Promise<ChunkBounds[]> {
  const { model, weights, expertCount, coefficients, learned, values, paper, samples } = search;
  const tensors = [];
  for (const [l, { block, site }] of sitesOf(model).entries()) {
    const update = paper ? undefined : await learned.update(site);
    const vectors = Array.from({ length: expertCount }, (_, k) => weights.taskVector(k, site));
    tensors.push({
      coefficients: vectors.map((vector, k) => (update ? effectiveCoefficient(update, vector) : coefficients.of(l, k)[0])),
      magnitudes: vectors.map(meanMagnitude),
      elements: sizeOf(site),
      limit: paper ? sizeOf(site) : Math.floor(site.outFeatures / headUnit(model, block, site)),
    });
  }
  const budget = { perTensor: chunksPerTensor(values, samples), sharpness: values.sharpness };
  const chunks = paper ? floorChunks(tensors, budget) : evenChunks(tensors, budget);
  return sitesOf(model).map(({ block, site }, l) => {
    if (paper) return chunks[l] === 0 ? [0] : flatChunks(sizeOf(site), chunks[l]);
    return rowChunks(site.outFeatures, site.inFeatures, chunks[l], headUnit(model, block, site));
  });
}

/** All sites with their blocks, the order of a learned merge's coefficients. */
export function sitesOf({ blocks }: Model): { readonly block: Block; readonly site: LinearSite }[] {
  return blocks.flatMap((block) => block.sites.map((site) => ({ block, site })));
}

export function sizeOf({ outFeatures, inFeatures }: LinearSite): number {
  return outFeatures * inFeatures;
}

/** Rows that stay together: a head's, where rows are heads. */
function headUnit({ shape }: Model, block: Block, site: LinearSite): number {
  return site.input === block.inputs[0] && site.outFeatures % shape.headDim === 0 ? shape.headDim : 1;
}

function meanMagnitude(values: Float32Array): number {
  let sum = 0;
  for (const value of values) sum += Math.abs(value);
  return sum / Math.max(1, values.length);
}
