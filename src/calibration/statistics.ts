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
  /** The activations again, (tokens, features) a batch, pads removed, in a fixed order. */
  batches(): AsyncIterable<Matrix>;
}
