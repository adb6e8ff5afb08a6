/** What one activation looked like on the calibration text. */
import type { Matrix } from '../compute/blas.ts';

/** Statistics of one site input. Shared, read-only, by all sites that read the input; `batches()` replays the activations. */
export interface CalibrationStats {
  /** The input's name (`LinearSite.input`). */
  readonly input: string;
  readonly features: number;
  /** Tokens measured, pads excluded. */
  readonly tokenCount: number;
  /** `(1/T) sum x x^T`, (features, features), undamped. */
  readonly hessian: Float64Array;
  /** How it differs from what the float model makes of the same text; absent unless that runs along. */
  readonly drift?: Drift;
  /** The activations again, (tokens, features) a batch, pads removed, in a fixed order. */
  batches(): AsyncIterable<Matrix>;
}

/** One input in the float model (x') and in the model quantized so far (x). */
export interface Drift {
  /** `(1/T) sum (x' - x) x^T` over the tokens that are not held out, (features, features). */
  readonly cross: Float32Array;
  /** Mean of x and of x' over all tokens, (features); only for an input of a layer with a bias. */
  readonly means?: { readonly actual: Float64Array; readonly float: Float64Array };
  /** The last eighth of the tokens, x and x' - x, (tokens, features) a batch: to tell whether a correction carries over. */
  heldOut(): AsyncIterable<{ readonly actual: Matrix; readonly difference: Matrix }>;
}
