/** What a learned merge decided: small plain data, saved in pcomp.json, reusable with --plan. */
import { addScaled } from './expert-merging/coefficients.ts';
import type { MergeBlock, Merger } from './merger.ts';
import { trimming } from './trim.ts';

/** Coefficients of one tensor. */
export interface TensorCoefficients {
  /** Chunk s is elements `[bounds[s], bounds[s + 1])` of the (out, in) tensor. */
  readonly bounds: readonly number[];
  /** By expert, a coefficient for each chunk. */
  readonly coefficients: readonly (readonly number[])[];
  /** They are of task vectors trimmed to this part of the tensor; absent: of whole ones. */
  readonly trim?: number;
}

/** What is added to the base before any coefficient: `scale` times what a method makes of the task vectors. */
export interface Start {
  readonly method: string;
  readonly scale: number;
  /** Where the method measures the experts on the calibration text: windows of each, their longest, and the seed they are drawn by. */
  readonly measured?: MeasuredText;
}

/** Samples of each expert's text: how many, how long, which. */
export interface MeasuredText {
  readonly samples: number;
  readonly length: number;
  readonly seed: number;
  /** Whether an eighth was left out, to judge by. */
  readonly heldOut: boolean;
}

export interface MergePlan {
  readonly method: string;
  /** Labels, in the order that coefficients follow. */
  readonly experts: readonly string[];
  /** Where coefficients start from, on the base. */
  readonly start: Start;
  /** What is not learned: as in the base, or moved by the mean task vector. */
  readonly passive: 'base' | 'mean';
  /** By tensor name. */
  readonly tensors: Readonly<Record<string, TensorCoefficients>>;
}

/** `merger`, and then every expert's task vector by its coefficients. */
export function withCoefficients(merger: Merger, { bounds, coefficients, trim }: TensorCoefficients): Merger {
  return {
    ...merger,
    prepare(tensor, values, context) {
      const inner = merger.prepare(tensor, values, context);
      const trims = trim === undefined ? undefined : trimming(bounds[bounds.length - 1], coefficients.length, trim);
      const merge = async (block: MergeBlock): Promise<Float32Array> => {
        const merged = await inner.merge(block);
        const result = merged === block.base || block.experts.includes(merged) ? merged.slice() : merged;
        // A block is some rows of the tensor; its part of every chunk.
        const own = bounds.map((bound) => Math.min(Math.max(bound - block.start, 0), block.length));
        block.taskVectors.forEach((taskVector, k) => {
          addScaled(result, own, coefficients[k], trims?.trimmed(k, block) ?? taskVector);
        });
        return result;
      };
      return { scans: [...inner.scans, ...(trims?.scans ?? [])], merge };
    },
  };
}
