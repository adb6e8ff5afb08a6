/** Sparsifiers that keep a band of the ranks of each task vector's magnitudes, over the whole tensor. */
import { vectors } from '../../compute/kernels/vectors.ts';
import type { MergeBlock } from './merger.ts';
import { MagnitudeSelection } from './selection.ts';
import { type Stretch, scanTaskVectors } from './stretch.ts';
import type { Sparsifier } from './task-vectors.ts';

/** One block in so many tells where the thresholds are likely to be. */
const LOOKED_AT = 16;
/** Bits of the largest magnitude, of a NaN. */
const MOST_BITS = 0x7fffffff;

/** Ranks kept, by magnitude from the largest: `drop` are skipped, then `keep` kept, the rest dropped. */
export interface RankBand {
  readonly drop: number;
  readonly keep: number;
}

/** What lies above each threshold, and how many ties of it are still free, for one expert in the last pass. */
interface Taking {
  readonly dropBits: number;
  readonly keepBits: number;
  dropTies: number;
  keepTies: number;
}

/** @param length elements of the tensor, @param bands per expert; undefined keeps everything, without a scan */
export function keepRanks(length: number, bands: readonly (RankBand | undefined)[]): Sparsifier {
  const which = bands.flatMap((band, k) => (band ? [k] : []));
  const selections = bands.map((band) => (band ? new MagnitudeSelection(length) : undefined));
  const takings: (Taking | undefined)[] = [];

  const each = (act: (selection: MagnitudeSelection, ends: readonly number[]) => void): void => {
    for (const k of which) act(selections[k]!, [bands[k]!.drop, bands[k]!.drop + bands[k]!.keep]);
  };
  const countHigh = scanTaskVectors(which, undefined, (k, stretch, count) => selections[k]!.countHigh(stretch, count));
  const countLow = scanTaskVectors(which, undefined, (k, stretch, count) => selections[k]!.countLow(stretch, count));
  const scanHigh = (block: MergeBlock): void => {
    if (block.start === 0) each((selection, ends) => selection.guess(ends));
    countHigh(block);
  };
  let chosen = false;
  const choose = (): boolean => {
    if (!chosen) each((selection, ends) => selection.choose(ends));
    chosen = true;
    return which.some((k) => !selections[k]!.complete);
  };
  const begin = (selection: MagnitudeSelection): Taking => {
    const [drop, kept] = selection.thresholds();
    return { dropBits: drop.bits, dropTies: drop.ties, keepBits: kept.bits, keepTies: kept.ties };
  };

  return {
    scans:
      which.length > 0 ? [{ every: LOOKED_AT, look: countHigh }, { look: scanHigh }, { needed: choose, look: countLow }] : [],
    sparsify(k, stretch, count) {
      const selection = selections[k];
      if (!selection) return;
      takings[k] ??= begin(selection);
      takeBand(takings[k], stretch, count);
    },
    scale: () => 1,
  };
}

/** Keeps what is in the band; ties are taken by the stretch, except where they run out in it. */
function takeBand(taking: Taking, stretch: Stretch, count: number): void {
  const { keepBits, dropBits } = taking;
  const values = stretch.values.subarray(0, count);
  const keepTies = taking.keepTies > 0 ? vectors().countEqual(values, keepBits) : 0;
  const dropTies = taking.dropTies > 0 ? vectors().countEqual(values, dropBits) : 0;
  if (keepTies > taking.keepTies || dropTies > taking.dropTies) {
    takeOneByOne(taking, stretch, count);
    return;
  }
  // Ties that are kept are not above the threshold, ties that are dropped not below it.
  const above = taking.keepTies > 0 ? keepBits - 1 : keepBits;
  const below = taking.dropTies > 0 ? dropBits : Math.min(dropBits + 1, MOST_BITS);
  vectors().keepBetween(values, above, below);
  taking.keepTies -= keepTies;
  taking.dropTies -= dropTies;
}

function takeOneByOne(taking: Taking, stretch: Stretch, count: number): void {
  const { bits } = stretch;
  const { dropBits, keepBits } = taking;
  for (let i = 0; i < count; i++) {
    const pattern = bits[i];
    const magnitude = pattern & 0x7fffffff;
    // All ones where the magnitude is above the threshold, without a branch.
    let kept = (keepBits - magnitude) >> 31;
    if (magnitude === keepBits && taking.keepTies > 0) {
      taking.keepTies--;
      kept = -1;
    }
    if (magnitude >= dropBits) {
      if (magnitude > dropBits) kept = 0;
      else if (taking.dropTies > 0) {
        taking.dropTies--;
        kept = 0;
      }
    }
    bits[i] = pattern & kept;
  }
}
