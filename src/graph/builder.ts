/** Builds an ONNX graph with typed op helpers; values carry dtype and (symbolic) shape, and misfits are refused when a node is made. */
import type { Dim } from '../../formats/onnx/model.ts';
import { float, int } from './attributes.ts';
import type { Value } from './core.ts';
import { ArithmeticOps } from './ops/arithmetic.ts';
import { describe } from './ops/layout.ts';
import { GraphError, sameShape } from './shape.ts';

export type { Value } from './core.ts';
export { GraphError } from './shape.ts';

/** Domain of the operators that only onnxruntime has. */
export const MICROSOFT = 'com.microsoft';

/** Inputs and attributes of onnxruntime's GroupQueryAttention. */
export interface GroupQueryAttentionOptions {
  readonly headCount: number;
  readonly kvHeadCount: number;
  /** Factor on the scores; 1/sqrt(headDim) when absent. */
  readonly scale?: number;
  /** Tokens a query sees, itself included. */
  readonly window?: number;
  /** F32 (positions, headDim / 2): rotates q and k (half rotation) by their position. */
  readonly rotary?: { readonly cos: Value; readonly sin: Value };
  /** (batch, kvHeadCount, past, headDim). */
  readonly past?: { readonly key: Value; readonly value: Value };
  /** Index of each row's last real token, I32 (batch). */
  readonly lastIndex: Value;
  /** Longest row in tokens, cache included, I32 scalar. */
  readonly totalLength: Value;
  /** Name of the cache's length after this call. */
  readonly totalName: Dim;
}

export class GraphBuilder extends ArithmeticOps {
  /** (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis. */
  layerNorm(x: Value, scale: Value, bias: Value, epsilon: number): Value {
    this.#checkFeatures('LayerNormalization', x, scale, bias);
    return this.node1('LayerNormalization', [x, scale, bias], x, { axis: int(-1), epsilon: float(epsilon) });
  }

  /** RMS norm: x / sqrt(mean(x^2) + epsilon) * scale over the last axis. */
  simplifiedLayerNorm(x: Value, scale: Value, epsilon: number): Value {
    this.#checkFeatures('SimplifiedLayerNormalization', x, scale);
    return this.node1('SimplifiedLayerNormalization', [x, scale], x, {
      axis: int(-1),
      epsilon: float(epsilon),
      stash_type: int(1),
    });
  }

  /** `sum` = x + skip, and its RMS norm, in one node. */
  skipSimplifiedLayerNorm(x: Value, skip: Value, scale: Value, epsilon: number): { normed: Value; sum: Value } {
    this.#checkFeatures('SkipSimplifiedLayerNormalization', x, scale);
    if (!sameShape(x.shape, skip.shape) || x.dtype !== skip.dtype) {
      throw new GraphError(`SkipSimplifiedLayerNormalization: ${describe(x)} and ${describe(skip)} differ`);
    }
    const [normed, sum] = this.node('SkipSimplifiedLayerNormalization', [x, skip, scale], {
      domain: MICROSOFT,
      attributes: { epsilon: float(epsilon) },
      outputs: [x, null, null, x],
    });
    return { normed, sum };
  }

  /**
   * Causal attention with a cache. `q` is (batch, sequence, headCount * headDim), `k` and `v` (batch, sequence,
   * kvHeadCount * headDim). onnxruntime asks for headDim % 8 = 0, and % 16 = 0 when it rotates.
   */
  groupQueryAttention(
    q: Value,
    k: Value,
    v: Value,
    options: GroupQueryAttentionOptions,
  ): { output: Value; presentKey: Value; presentValue: Value } {
    const { headCount, kvHeadCount, scale, window, rotary, past, lastIndex, totalLength, totalName } = options;
    const headDim = Number(q.shape[2]) / headCount;
    const multiple = rotary ? 16 : 8;
    if (headDim % multiple !== 0) {
      throw new GraphError(`GroupQueryAttention: head size ${headDim} is not a multiple of ${multiple}`);
    }
    if (k.shape[2] !== kvHeadCount * headDim || v.shape[2] !== k.shape[2] || headCount % kvHeadCount !== 0) {
      throw new GraphError(
        `GroupQueryAttention: ${headCount} heads in ${describe(q)} and ${kvHeadCount} in ${describe(k)}, ${describe(v)}`,
      );
    }
    const present = { dtype: k.dtype, shape: [q.shape[0], kvHeadCount, totalName, headDim] };
    const [output, presentKey, presentValue] = this.node(
      'GroupQueryAttention',
      [q, k, v, past?.key ?? null, past?.value ?? null, lastIndex, totalLength, rotary?.cos ?? null, rotary?.sin ?? null],
      {
        domain: MICROSOFT,
        attributes: {
          num_heads: int(headCount),
          kv_num_heads: int(kvHeadCount),
          do_rotary: int(rotary ? 1 : 0),
          rotary_interleaved: int(0),
          ...(scale === undefined ? {} : { scale: float(scale) }),
          ...(window === undefined ? {} : { local_window_size: int(window) }),
        },
        outputs: [q, present, present],
      },
    );
    return { output, presentKey, presentValue };
  }

  #checkFeatures(op: string, x: Value, ...vectors: Value[]): void {
    const features = x.shape[x.shape.length - 1];
    const misfit = vectors.find((vector) => vector.dtype !== x.dtype || !sameShape(vector.shape, [features]));
    if (misfit) throw new GraphError(`${op}: ${describe(misfit)} does not scale the last axis of ${describe(x)}`);
  }
}
