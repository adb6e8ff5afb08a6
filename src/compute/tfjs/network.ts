/** Operators made for networks: norms and attention, spelled out in tfjs's own. */
import type { Call, Operator } from './operator.ts';
import type { TfTensor, TfValue } from './values.ts';

/** Score of a pair of tokens that must not meet. Finite, so that a row of nothing else still has a softmax. */
const MASKED = -1e9;

function f32(tensor: TfTensor): TfValue {
  return { dtype: 'F32', tensor };
}

function assertLastAxis(call: Call, x: TfTensor): void {
  const axis = call.int('axis', -1);
  if (call.axis(axis, x.rank) !== x.rank - 1) call.refuse(`norm from axis ${axis} on`);
}

function layerNormalization(call: Call): ReturnType<Operator> {
  const x = call.tensor(0);
  assertLastAxis(call, x);
  const centered = x.sub(x.mean(-1, true));
  const variance = centered.mul(centered).mean(-1, true);
  const normed = centered.mul(variance.add(call.float('epsilon', 1e-5)).rsqrt()).mul(call.tensor(1));
  return [f32(call.has(2) ? normed.add(call.tensor(2)) : normed)];
}

function rmsNorm(call: Call, x: TfTensor, scale: TfTensor): TfTensor {
  const meanSquare = x.mul(x).mean(-1, true);
  return x.mul(meanSquare.add(call.float('epsilon', 1e-5)).rsqrt()).mul(scale);
}

function simplifiedLayerNormalization(call: Call): ReturnType<Operator> {
  const x = call.tensor(0);
  assertLastAxis(call, x);
  return [f32(rmsNorm(call, x, call.tensor(1)))];
}

function skipSimplifiedLayerNormalization(call: Call): ReturnType<Operator> {
  if (call.has(3)) call.refuse('bias of the skipped addition');
  const sum = call.tensor(0).add(call.tensor(1));
  return [f32(rmsNorm(call, sum, call.tensor(2))), undefined, undefined, f32(sum)];
}

/** Attributes of GroupQueryAttention that are read below; any other must be at its default, 0. */
const ATTENTION_ATTRIBUTES = new Set(['num_heads', 'kv_num_heads', 'scale', 'local_window_size', 'do_rotary']);

/**
 * Causal attention of whole rows. Pads stand to the right of the tokens, so causality hides them; the lengths (inputs 5 and 6)
 * say nothing more.
 */
function groupQueryAttention(call: Call): ReturnType<Operator> {
  const { tf, node } = call;
  for (const [name, { value }] of Object.entries(node.attributes)) {
    if (!ATTENTION_ATTRIBUTES.has(name) && Number(value) !== 0) call.refuse(`attribute ${name}`);
  }
  if (call.has(3) || call.has(4)) call.refuse('cache of keys and values');
  if (!call.has(1) || !call.has(2)) call.refuse('packed q, k and v');
  const [heads, kvHeads] = [call.int('num_heads', 0), call.int('kv_num_heads', 0)];
  const [batch, sequence, width] = call.tensor(0).shape;
  const headDim = width / heads;
  const rotates = call.int('do_rotary', 0) === 1;
  const toHeads = (x: TfTensor, count: number, rotary: boolean): TfTensor => {
    const split = x.reshape([batch, sequence, count, headDim]);
    return (rotary ? rotateHalves(call, split) : split).transpose([0, 2, 1, 3]);
  };
  const key = toHeads(call.tensor(1), kvHeads, rotates);
  const value = toHeads(call.tensor(2), kvHeads, false);
  // Heads that share keys are laid end to end along the sequence.
  const rows = (heads / kvHeads) * sequence;
  const queries = toHeads(call.tensor(0), heads, rotates).reshape([batch, kvHeads, rows, headDim]);
  const scale = call.float('scale', 0) || 1 / Math.sqrt(headDim);
  const scores = tf.matMul(queries, key, false, true).mul(scale).reshape([batch, heads, sequence, sequence]);
  const seen = visible(call, sequence, call.int('local_window_size', -1));
  const weights = tf.softmax(tf.where(seen, scores, tf.scalar(MASKED)));
  const mixed = tf.matMul(weights.reshape([batch, kvHeads, rows, sequence]), value);
  const output = mixed.reshape([batch, heads, sequence, headDim]).transpose([0, 2, 1, 3]).reshape([batch, sequence, width]);
  return [f32(output), f32(key), f32(value)];
}

/** bool (sequence, sequence): whether the query of a row may see the key of a column; of the last `window` only, unless negative. */
function visible({ tf }: Call, sequence: number, window: number): TfTensor {
  const columns = tf.range(0, sequence, 1, 'int32');
  const distance = columns.expandDims(1).sub(columns.expandDims(0));
  const causal = distance.greaterEqual(tf.scalar(0, 'int32'));
  return window < 0 ? causal : causal.logicalAnd(distance.less(tf.scalar(window, 'int32')));
}

/** Turns the pairs of each head's two halves by their position's angles; `x` is (batch, sequence, heads, headDim). */
function rotateHalves(call: Call, x: TfTensor): TfTensor {
  const { tf } = call;
  const [, sequence, , headDim] = x.shape;
  const half = headDim / 2;
  const [cos, sin] = [7, 8].map((index) => call.tensor(index).slice([0, 0], [sequence, half]).reshape([1, sequence, 1, half]));
  const [first, second] = tf.split(x, 2, 3);
  return tf.concat([first.mul(cos).sub(second.mul(sin)), second.mul(cos).add(first.mul(sin))], 3);
}

export const NETWORK: Readonly<Record<string, Operator>> = {
  LayerNormalization: layerNormalization,
  SimplifiedLayerNormalization: simplifiedLayerNormalization,
  SkipSimplifiedLayerNormalization: skipSimplifiedLayerNormalization,
  GroupQueryAttention: groupQueryAttention,
};
