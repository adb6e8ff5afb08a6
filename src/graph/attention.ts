/**
 * Causal attention as one composite operator with two lowerings that agree: onnxruntime's GroupQueryAttention, and
 * plain matrix products and a softmax for what that operator refuses.
 */
import type { Dim } from '../../formats/onnx/model.ts';
import type { GraphBuilder, Value } from './builder.ts';
import { multiplyDims } from './shape.ts';
import type { TokenPositions } from './token-positions.ts';

/** 'grouped': GroupQueryAttention. 'plain': MatMul and Softmax over a concatenated cache. */
export type AttentionLowering = 'grouped' | 'plain';

export interface AttentionOptions {
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  /** Factor on the scores. */
  readonly scale: number;
  /** Tokens a query sees, itself included; all earlier ones when absent. */
  readonly window?: number;
  /** cos and sin of every position's angles, F32 (positions, headDim / 2), when q and k are rotated (half rotation). */
  readonly rotary?: RotaryTables;
  /** Keys and values of earlier calls, (batch, kvHeadCount, past, headDim). */
  readonly past?: { readonly key: Value; readonly value: Value };
}

export interface RotaryTables {
  readonly cos: Value;
  readonly sin: Value;
}

export interface AttentionResult {
  /** (batch, sequence, headCount * headDim) */
  readonly output: Value;
  /** Keys and values of all tokens so far, (batch, kvHeadCount, total, headDim). */
  readonly presentKey: Value;
  readonly presentValue: Value;
}

/** The fastest lowering onnxruntime accepts: GroupQueryAttention wants heads of a multiple of 8. */
export function preferredLowering(headDim: number): AttentionLowering {
  return headDim % 8 === 0 ? 'grouped' : 'plain';
}

/** `q` is (batch, sequence, headCount * headDim); `k` and `v` are (batch, sequence, kvHeadCount * headDim). */
export function attention(
  builder: GraphBuilder,
  q: Value,
  k: Value,
  v: Value,
  positions: TokenPositions,
  options: AttentionOptions,
  lowering: AttentionLowering = preferredLowering(options.headDim),
): AttentionResult {
  return lowering === 'grouped'
    ? groupedAttention(builder, q, k, v, positions, options)
    : plainAttention(builder, q, k, v, positions, options);
}

function groupedAttention(
  builder: GraphBuilder,
  q: Value,
  k: Value,
  v: Value,
  positions: TokenPositions,
  options: AttentionOptions,
): AttentionResult {
  const { headCount, kvHeadCount, headDim, scale, window, rotary, past } = options;
  // The operator rotates by itself only when a head is a multiple of 16.
  const fused = rotary !== undefined && headDim % 16 === 0;
  const rotate = (x: Value, heads: number): Value => {
    if (rotary === undefined || fused) return x;
    const turned = rotateHalves(builder, splitHeads(builder, x, heads, headDim), rotary, positions);
    return builder.reshape(turned, x.shape);
  };
  return builder.groupQueryAttention(rotate(q, headCount), rotate(k, kvHeadCount), v, {
    headCount,
    kvHeadCount,
    scale,
    ...(window === undefined ? {} : { window }),
    ...(fused ? { rotary } : {}),
    ...(past === undefined ? {} : { past }),
    lastIndex: positions.lastIndex(),
    totalLength: positions.totalLength(),
    totalName: positions.totalName,
  });
}

function plainAttention(
  builder: GraphBuilder,
  q: Value,
  k: Value,
  v: Value,
  positions: TokenPositions,
  options: AttentionOptions,
): AttentionResult {
  const { headCount, kvHeadCount, headDim, scale, window, rotary, past } = options;
  const [batch, sequence] = q.shape;
  const total = positions.totalName;
  const toHeads = (x: Value, heads: number, rotates: boolean): Value => {
    const split = splitHeads(builder, x, heads, headDim);
    return builder.transpose(rotates && rotary ? rotateHalves(builder, split, rotary, positions) : split, [0, 2, 1, 3]);
  };
  const extend = (cache: Value | undefined, x: Value): Value =>
    builder.assume(cache ? builder.concat([cache, x], 2) : x, [batch, kvHeadCount, total, headDim]);

  const presentKey = extend(past?.key, toHeads(k, kvHeadCount, true));
  const presentValue = extend(past?.value, toHeads(v, kvHeadCount, false));
  // Heads that share keys are laid end to end along the sequence: (batch, kvHeadCount, group * sequence, headDim).
  const rows: Dim = multiplyDims(headCount / kvHeadCount, sequence);
  const queries = builder.reshape(toHeads(q, headCount, true), [batch, kvHeadCount, rows, headDim]);
  const scores = builder.mul(builder.matmul(queries, builder.transpose(presentKey, [0, 1, 3, 2])), builder.scalar('F32', scale));
  const masked = builder.add(builder.reshape(scores, [batch, headCount, sequence, total]), positions.mask(window));
  const weights = builder.reshape(builder.softmax(masked), [batch, kvHeadCount, rows, total]);
  const mixed = builder.reshape(builder.matmul(weights, presentValue), [batch, headCount, sequence, headDim]);
  const output = builder.reshape(builder.transpose(mixed, [0, 2, 1, 3]), [batch, sequence, headCount * headDim]);
  return { output, presentKey, presentValue };
}

function splitHeads(builder: GraphBuilder, x: Value, heads: number, headDim: number): Value {
  return builder.reshape(x, [x.shape[0], x.shape[1], heads, headDim]);
}

/** Turns each pair (x1[i], x2[i]) of a head's two halves by its position's angle i; `x` is (batch, sequence, heads, headDim). */
function rotateHalves(builder: GraphBuilder, x: Value, tables: RotaryTables, positions: TokenPositions): Value {
  const half = Number(x.shape[3]) / 2;
  const at = positions.indices();
  const cos = builder.unsqueeze(builder.gather(tables.cos, at), [2]);
  const sin = builder.unsqueeze(builder.gather(tables.sin, at), [2]);
  const [first, second] = builder.split(x, [half, half], -1);
  return builder.concat(
    [
      builder.sub(builder.mul(first, cos), builder.mul(second, sin)),
      builder.add(builder.mul(second, cos), builder.mul(first, sin)),
    ],
    -1,
  );
}
