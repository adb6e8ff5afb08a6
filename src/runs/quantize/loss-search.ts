/**
 * The smallest size that loses no more than asked, with few measurements: a predicted rate-distortion curve, corrected by what was measured.
 * A measurement says how wrong the prediction is at its size; the logarithm of that factor is a straight line between two of them.
 */
import type { CurvePoint } from '../../methods/quantize/allocation/allocate.ts';

/** Measurements a search makes at most. */
export const MAX_ROUNDS = 4;
/** Part of the tolerance to aim at before anything met it, by measurements made: the last one is kept for the best there is. */
const CAUTION = [0.9, 0.85, 0.6];
/** The same once something did. */
const AIM = 0.98;
/** A bracket this narrow, as a part of its upper end, is not worth another measurement. */
const NARROW = 0.005;
/** How near an end of the bracket the next measurement may be, as a part of it. */
const MARGIN = 0.1;
/** A measured rise may be noise around nothing; as a part of the tolerance. */
const LEAST_RISE = 0.01;

/** What was measured at a size. */
export interface Measured {
  /** In the unit of the curve. */
  readonly size: number;
  /** In nats per token. */
  readonly rise: number;
}

/** Where to measure next, or what the measurements come to: the index of the smallest that meets the tolerance; absent: none can. */
export type SearchStep = { readonly size: number } | { readonly kept: number | undefined };

/**
 * The next step of a search for the smallest size whose rise is within `tolerance` nats.
 * @param curve sizes ascending, predicted losses descending; its ends are all there is, @param rounds what was measured, in order
 */
export function searchStep(curve: readonly CurvePoint[], tolerance: number, rounds: readonly Measured[]): SearchStep {
  const least = curve[0].size;
  const most = curve[curve.length - 1].size;
  const met = rounds.filter(({ rise }) => rise <= tolerance);
  const high = met.reduce((smallest, { size }) => Math.min(smallest, size), Number.POSITIVE_INFINITY);
  const kept = met.length === 0 ? undefined : rounds.findIndex(({ size, rise }) => size === high && rise <= tolerance);
  // Noise may fail a size above one that met it: only failures below count.
  const low = rounds.reduce((largest, { size }) => (size < high ? Math.max(largest, size) : largest), Number.NEGATIVE_INFINITY);
  const narrow = high - low <= NARROW * Math.min(high, most);
  if (rounds.length === MAX_ROUNDS || low === most || high === least || narrow) return { kept };

  const nothingMet = kept === undefined;
  if (nothingMet && rounds.length === MAX_ROUNDS - 1) return { size: most };
  const aim = tolerance * (nothingMet ? CAUTION[rounds.length] : AIM);
  const predict = corrected(curve, tolerance, rounds);
  const wanted = curve.find((point) => predict(point) <= aim)?.size ?? most;
  const [from, to] = [Math.max(least, low), Math.min(most, high)];
  // The ends of the curve may be measured; ends that were measured are kept away from.
  const bottom = low === Number.NEGATIVE_INFINITY ? from : from + MARGIN * (to - from);
  const top = high === Number.POSITIVE_INFINITY ? to : to - MARGIN * (to - from);
  return { size: Math.min(top, Math.max(bottom, wanted)) };
}

/** The curve times the factors that were measured: constant beyond them, log-linear in between. */
function corrected(curve: readonly CurvePoint[], tolerance: number, rounds: readonly Measured[]): (point: CurvePoint) => number {
  const factors = rounds
    .map(({ size, rise }) => ({ size, log: Math.log(Math.max(rise, LEAST_RISE * tolerance) / predictedAt(curve, size)) }))
    .filter(({ log }) => Number.isFinite(log))
    .sort((a, b) => a.size - b.size);
  return ({ size, loss }) => {
    if (factors.length === 0) return loss;
    const above = factors.findIndex((factor) => factor.size >= size);
    if (above === 0) return loss * Math.exp(factors[0].log);
    if (above === -1) return loss * Math.exp(factors[factors.length - 1].log);
    const [a, b] = [factors[above - 1], factors[above]];
    return loss * Math.exp(a.log + ((size - a.size) / (b.size - a.size)) * (b.log - a.log));
  };
}

/** The predicted loss at any size: losses fall geometrically between points. */
function predictedAt(curve: readonly CurvePoint[], size: number): number {
  const above = curve.findIndex((point) => point.size >= size);
  if (above <= 0) return curve[above === 0 ? 0 : curve.length - 1].loss;
  const [a, b] = [curve[above - 1], curve[above]];
  const part = (size - a.size) / (b.size - a.size);
  return a.loss > 0 && b.loss > 0 ? a.loss * (b.loss / a.loss) ** part : a.loss + part * (b.loss - a.loss);
}
