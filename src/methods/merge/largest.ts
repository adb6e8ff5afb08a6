/** Sparsifiers that keep a band of the ranks of each task vector's magnitudes, over the whole tensor. */
import type { MergeBlock } from './merger.ts';
import { bitsOf, MagnitudeSelection } from './selection.ts';
import type { Sparsifier } from './task-vectors.ts';

/** Ranks kept, by magnitude from the largest: `drop` are skipped, then `keep` kept, the rest dropped. */
export interface RankBand {
  readonly drop: number;
  readonly keep: number;
}

/** What is above a threshold, and how many ties of it are still free, for one expert in the last pass. */
interface Taking {
  readonly dropBits: number;
  readonly keepBits: number;
  dropTies: number;
  keepTies: number;
}

/** @param length elements of the tensor, @param bands per expert; undefined keeps everything, without a scan */
export function keepRanks(length: number, bands: readonly (RankBand | undefined)[]): Sparsifier {
  const selections = bands.map((band) => (band ? new MagnitudeSelection(length) : undefined));
  const states: (Taking | undefined)[] = [];

  const scanHigh = (block: MergeBlock): void => {
    for (const [k, selection] of selections.entries()) selection?.countHigh(block.taskVectors[k]);
  };
  const scanLow = (block: MergeBlock): void => {
    for (const [k, selection] of selections.entries()) {
      const { drop, keep } = bands[k] ?? { drop: 0, keep: 0 };
      if (block.start === 0) selection?.choose([drop, drop + keep]);
      selection?.countLow(block.taskVectors[k]);
    }
  };
  const stateOf = (k: number): Taking | undefined => {
    const selection = selections[k];
    if (!selection) return undefined;
    if (!states[k]) {
      const [drop, kept] = selection.thresholds();
      states[k] = { dropBits: drop.bits, dropTies: drop.ties, keepBits: kept.bits, keepTies: kept.ties };
    }
    return states[k];
  };

  return {
    scans: selections.some((selection) => selection) ? [scanHigh, scanLow] : [],
    sparsify(k, delta, from, count, _at, out) {
      const state = stateOf(k);
      if (!state) for (let i = 0; i < count; i++) out[i] = delta[from + i];
      else takeBand(state, delta, from, count, out);
    },
  };
}

function takeBand(state: Taking, delta: Float32Array, from: number, count: number, out: Float64Array): void {
  const { dropBits, keepBits } = state;
  const bits = bitsOf(delta);
  for (let i = 0; i < count; i++) {
    const magnitude = bits[from + i] & 0x7fffffff;
    let kept = magnitude > keepBits;
    if (magnitude === keepBits && state.keepTies > 0) {
      state.keepTies--;
      kept = true;
    }
    if (magnitude >= dropBits) {
      if (magnitude > dropBits) kept = false;
      else if (state.dropTies > 0) {
        state.dropTies--;
        kept = false;
      }
    }
    out[i] = kept ? delta[from + i] : 0;
  }
}
