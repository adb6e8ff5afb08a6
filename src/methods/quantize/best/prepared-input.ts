/** One input made ready for the preset `best`: its Hessian shrunk, transformed and factored. Shared by the sites that read the input. */
import type { CalibrationStats } from '../../../calibration/statistics.ts';
import { NotPositiveDefiniteError } from '../../../compute/blas.ts';
import { Random } from '../../../compute/random.ts';
import { UnsupportedError } from '../../../errors.ts';
import type { LinearSite } from '../../../model/model.ts';
import { columnRange } from '../columns.ts';
import { DampedFactor } from '../damped-factor.ts';
import { largestOrder } from '../hadamard.ts';
import { type InputTransform, rotatedRun, type TransformShape, transformSymmetric } from '../input-transform.ts';
import type { QuantizeContext, TransformKind } from '../quantizer.ts';
import { shrink, shrinkageOf } from './shrinkage.ts';

/** Shrinkage after a failed factorization, and how often it is doubled before correlations are given up (slim-llm, section 9). */
const RETRY_SHRINKAGE = 0.01;
const RETRIES = 8;

/** An input in stored order, and what its columns weigh. */
export interface WeighedInput {
  readonly features: number;
  readonly transform: InputTransform | undefined;
  /** H in stored order, (features, features), shrunk. */
  readonly hessian: Float64Array;
  /** `d_j = 1 / U_jj^2`: energy of stored column j that later ones do not explain, (features). */
  readonly energies: Float32Array;
  readonly shrinkage: number;
}

export interface PreparedInput extends WeighedInput {
  /** U of H; columns are visited in stored order. */
  readonly factor: DampedFactor;
}

/** An input as a transform sees it. */
export interface TransformedInput {
  /** Its name and the seed give the signs of a rotation over the whole input. */
  readonly name: string;
  readonly seed: number;
  /** (features, features). */
  readonly hessian: Float64Array;
  readonly features: number;
}

/** What a transform of that kind consists of. */
export function shapeOfKind(kind: Exclude<TransformKind, 'none'>, groupSize: number, features: number): TransformShape {
  if (kind === 'had') {
    const order = largestOrder(features);
    // A matrix of order 1 does nothing.
    return { permuted: false, signed: true, hadamard: order > 1 ? order : 0 };
  }
  return { permuted: true, signed: false, hadamard: kind === 'perm-had' ? rotatedRun(groupSize, features) : 0 };
}

/** What `kind` means for an input: columns by descending energy, and rotated in runs of `groupSize`; or signs at random, and rotated all together. */
export function transformOf(
  kind: TransformKind,
  { name, seed, hessian, features }: TransformedInput,
  groupSize: number,
): InputTransform | undefined {
  if (kind === 'none') return undefined;
  const { hadamard } = shapeOfKind(kind, groupSize, features);
  if (kind === 'had') {
    const random = new Random(seed, `signs of ${name}`);
    return { signs: Uint8Array.from({ length: features }, () => random.nextUint32() & 1), hadamard };
  }
  const order = columnRange(0, features);
  order.sort((a, b) => hessian[b * features + b] - hessian[a * features + a] || a - b);
  return { order, hadamard };
}

/**
 * Prepares an input. `stats.hessian` is taken over: it is transformed in place, since for 11008 features a copy would be another 969 MB.
 * With `centred`, of statistics less their means: for sites whose bias makes up for the means.
 */
export async function prepareInput(
  context: QuantizeContext,
  site: LinearSite,
  stats: CalibrationStats,
  kind: TransformKind,
  groupSize: number,
  options: { readonly centred: boolean },
): Promise<PreparedInput> {
  const { features: n } = stats;
  const { made: upper, ...input } = await shrunk(context, site, stats, kind, groupSize, {
    ...options,
    factor: (hessian) => context.blas.inverseFactor(hessian, n),
  });
  const factor = new DampedFactor(upper, columnRange(0, n), new Set(), input.shrinkage);
  return { ...input, factor, energies: Float32Array.from(factor.squaredDiagonal(), (value) => 1 / value) };
}

/** As `prepareInput` for one that is only looked at, at half the work: its factor is not inverted. */
export async function weighInput(
  context: QuantizeContext,
  site: LinearSite,
  stats: CalibrationStats,
  kind: TransformKind,
  groupSize: number,
): Promise<WeighedInput> {
  const { made: pivots, ...input } = await shrunk(context, site, stats, kind, groupSize, {
    centred: false,
    factor: (hessian) => context.blas.pivots(hessian, stats.features),
  });
  return { ...input, energies: Float32Array.from(pivots) };
}

/** Shrinks and transforms H, as much as `factor` asks for. */
async function shrunk<T>(
  context: QuantizeContext,
  site: LinearSite,
  stats: CalibrationStats,
  kind: TransformKind,
  groupSize: number,
  { centred, factor }: { readonly centred: boolean; readonly factor: (hessian: Float64Array) => Promise<T> },
): Promise<Omit<WeighedInput, 'energies'> & { readonly made: T }> {
  const { features: n, hessian } = stats;
  checkDiagonal(site, hessian, n);
  const mean = centred ? stats.drift?.means?.actual : undefined;
  if (mean) subtractMean(hessian, mean);
  let rho = shrinkageOf(hessian, n, stats.tokenCount);
  shrink(hessian, n, rho);
  const transform = transformOf(kind, { name: stats.input, seed: context.options.seed ?? 0, hessian, features: n }, groupSize);
  if (transform) transformSymmetric(transform, hessian, n);
  for (let retry = 0; ; retry++) {
    try {
      const made = await factor(hessian);
      return { features: n, transform, hessian, shrinkage: rho, made };
    } catch (error) {
      if (!(error instanceof NotPositiveDefiniteError)) throw error;
      // What is left of the correlations is cut again, so that in all `rho` of them is gone.
      const next = retry >= RETRIES ? 1 : Math.max(2 * rho, RETRY_SHRINKAGE);
      if (rho >= 1) throw new UnsupportedError(`${site.name}: its Hessian cannot be factored: ${error.message}.`);
      context.note(
        site,
        `Hessian of ${stats.input} is not positive definite; shrinkage raised to ${Math.min(1, next).toPrecision(3)}`,
      );
      shrink(hessian, n, 1 - (1 - Math.min(1, next)) / (1 - rho));
      rho = Math.min(1, next);
    }
  }
}

function checkDiagonal(site: LinearSite, hessian: Float64Array, n: number): void {
  for (let j = 0; j < n; j++) {
    const energy = hessian[j * n + j];
    if (Number.isFinite(energy) && energy >= 0) continue;
    throw new UnsupportedError(
      `${site.name}: channel ${j} of its calibration activations has mean square ${energy}; it must be finite.`,
    );
  }
}

function subtractMean(hessian: Float64Array, mean: Float64Array): void {
  const n = mean.length;
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) hessian[i * n + j] -= mean[i] * mean[j];
  for (let j = 0; j < n; j++) hessian[j * n + j] = Math.max(0, hessian[j * n + j]);
}
