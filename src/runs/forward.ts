/** Where forward passes run: what those of one run share. */
import type { Spool } from '../calibration/state-store.ts';
import type { Blas } from '../compute/blas.ts';
import type { Engine } from '../compute/engine.ts';
import type { Model } from '../model/model.ts';

export interface Forward {
  readonly model: Model;
  readonly engine: Engine;
  readonly blas: Blas;
  readonly spool: Spool;
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  readonly signal?: AbortSignal | undefined;
}
