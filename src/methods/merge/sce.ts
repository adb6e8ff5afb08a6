/**
 * SCE (arXiv 2408.07990): select the elements on which the experts differ most, calculate each expert's weight from the energy of what
 * is left of its task vector, erase what disagrees in sign with the majority.
 */
import { defineMerger, type MergeBlock } from './merger.ts';
import { MagnitudeSelection, type Threshold } from './selection.ts';
import { SpanSums } from './span-sum.ts';
import { allocateStretch, readTaskVector, type Stretch, stretchLength } from './stretch.ts';
import { elementCount } from './tensor-size.ts';
import { sum } from './weights.ts';

/** The smallest divisor. */
const FLOOR = 1e-6;
/** mergekit's threshold on the sum of mean squares, below which all experts weigh the same. */
const COMPAT_NEGLIGIBLE = 1e-6;

export const sce = defineMerger({
  name: 'sce',
  formula: 'theta_0 + sum a_k w_k delta_k / sum a_k w_k, w_k = |delta_k|^2 / sum |delta|^2, a_k = agrees in sign with sum delta',
  reference: '2408.07990',
  access: 'selection',
  base: 'required',
  experts: { min: 1 },
  parameters: {
    select_topk: {
      type: 'number',
      summary: 'share of the elements that is merged, by the variance between experts; the rest stays the base; 1: all',
      default: 1,
      min: 0,
    },
  },
  prepare(tensor, { select_topk }, { compat }) {
    const n = elementCount(tensor);
    const length = stretchLength(undefined);
    const deltas = tensor.experts.map(() => allocateStretch(length));
    const variance = allocateStretch(length);
    const selection = select_topk < 1 ? new MagnitudeSelection(n) : undefined;
    const squares = tensor.experts.map(() => new SpanSums());
    let varying = 0;

    const eachStretch = (block: MergeBlock, look: (from: number, count: number) => void): void => {
      for (let from = 0; from < block.length; from += length) {
        const count = Math.min(length, block.length - from);
        for (const [k, delta] of deltas.entries()) readTaskVector(block.experts[k], block.base!, from, count, delta.values);
        if (selection) writeVariance(deltas, count, variance.values);
        look(from, count);
      }
    };
    /** Fresh for each pass: it counts the ties it has let through. */
    const selector = (): ((count: number) => void) => {
      let threshold: Threshold | undefined;
      let ties = 0;
      return (count) => {
        if (!selection) return;
        if (!threshold) {
          threshold = selection.thresholds()[0];
          ties = threshold.ties;
        }
        ties = keepSelected(deltas, variance.bits, threshold.bits, ties, count);
      };
    };

    const scanHigh = (block: MergeBlock): void =>
      eachStretch(block, (_from, count) => {
        for (let i = 0; i < count; i++) if (variance.values[i] > 0) varying++;
        selection?.countHigh(variance, count);
      });
    const scanLow = (block: MergeBlock): void => {
      if (block.start === 0) selection?.choose([Math.floor(select_topk * varying)]);
      eachStretch(block, (_from, count) => selection?.countLow(variance, count));
    };
    const selectForSquares = selector();
    const scanSquares = (block: MergeBlock): void =>
      eachStretch(block, (_from, count) => {
        selectForSquares(count);
        for (const [k, { values }] of deltas.entries())
          squares[k].addProducts(values.subarray(0, count), values.subarray(0, count));
      });

    let weights: readonly number[] | undefined;
    const solve = (): readonly number[] => {
      const energies = squares.map((square) => square.total());
      const total = sum(energies);
      const negligible = compat === 'mergekit' ? total / n < COMPAT_NEGLIGIBLE : total === 0;
      return energies.map((energy) => (negligible ? 1 / energies.length : energy / total));
    };
    const select = selector();
    const merge = (block: MergeBlock): Float32Array => {
      weights ??= solve();
      const shares = weights;
      const result = new Float32Array(block.length);
      eachStretch(block, (from, count) => {
        select(count);
        addElected(result, block.base!, from, deltas, shares, count);
      });
      return result;
    };
    const scans = selection ? [scanHigh, scanLow, scanSquares] : [scanSquares];
    return { scans: scans.map((look) => ({ look })), merge };
  },
});

/** Population variance over the experts, rounded to float32 so that it can be selected by its bits. */
function writeVariance(deltas: readonly Stretch[], count: number, out: Float32Array): void {
  const experts = deltas.length;
  for (let i = 0; i < count; i++) {
    let mean = 0;
    for (let k = 0; k < experts; k++) mean += deltas[k].values[i];
    mean /= experts;
    let squares = 0;
    for (let k = 0; k < experts; k++) squares += (deltas[k].values[i] - mean) ** 2;
    out[i] = squares / experts;
  }
}

/** Zeros what is not selected in all task vectors. Returns how many ties are left to be taken. */
function keepSelected(deltas: readonly Stretch[], bits: Int32Array, threshold: number, ties: number, count: number): number {
  let left = ties;
  for (let i = 0; i < count; i++) {
    if (bits[i] > threshold) continue;
    if (bits[i] === threshold && left > 0) left--;
    else for (let k = 0; k < deltas.length; k++) deltas[k].values[i] = 0;
  }
  return left;
}

function addElected(
  result: Float32Array,
  base: Float32Array,
  from: number,
  deltas: readonly Stretch[],
  weights: readonly number[],
  count: number,
): void {
  for (let i = 0; i < count; i++) {
    let total = 0;
    for (let k = 0; k < deltas.length; k++) total += deltas[k].values[i];
    let agreed = 0;
    let divisor = 0;
    for (let k = 0; k < deltas.length; k++) {
      const value = deltas[k].values[i];
      if (total >= 0 ? value > 0 : value < 0) {
        agreed += weights[k] * value;
        divisor += weights[k];
      }
    }
    result[from + i] = base[from + i] + agreed / Math.max(divisor, FLOOR);
  }
}
