/** One Llama block written for tfjs as its documentation would have it, and its gradients by tfjs itself: the rival of bench/gradient.ts. */
import * as tf from '@tensorflow/tfjs';

export interface BlockSizes {
  readonly hidden: number;
  readonly heads: number;
  readonly context: number;
}

/** By the names that the graph of the block has for them: (outFeatures, inFeatures), norms (hidden). */
export type BlockValues = Readonly<Record<string, Float32Array>>;

export interface TfjsBlock {
  /** Gradients of `sum(output * cotangent)` by the hidden states and by every matrix, in the order of `names`. */
  gradients(): Float32Array[];
  readonly names: readonly string[];
}

const MATRICES = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'] as const;

/** @param weightOf values of a tensor by the end of its name, and its shape */
export function tfjsBlock(
  { hidden, heads, context }: BlockSizes,
  weightOf: (suffix: string) => { readonly data: Float32Array; readonly shape: readonly number[] },
  states: Float32Array,
  cotangent: Float32Array,
): TfjsBlock {
  const headDim = hidden / heads;
  const half = headDim / 2;
  const tensor = (suffix: string): tf.Tensor => {
    const { data, shape } = weightOf(suffix);
    return tf.tensor(data, [...shape]);
  };
  const norms = ['input_layernorm', 'post_attention_layernorm'].map(tensor);
  const matrices = MATRICES.map(tensor);
  const x = tf.tensor2d(states, [context, hidden]);
  const dy = tf.tensor2d(cotangent, [context, hidden]);
  const angle = (f: (a: number) => number) =>
    tf.tensor(
      Array.from({ length: context }, (_, p) => Array.from({ length: half }, (_, i) => f(p * 10000 ** ((-2 * i) / headDim)))),
      [context, 1, half],
    );
  const [cos, sin] = [angle(Math.cos), angle(Math.sin)];
  const mask = tf.tensor(
    Array.from({ length: context }, (_, q) => Array.from({ length: context }, (_, k) => (k <= q ? 0 : -1e9))),
  ) as tf.Tensor2D;

  const rms = (value: tf.Tensor, weight: tf.Tensor) => value.mul(tf.rsqrt(value.square().mean(-1, true).add(1e-5))).mul(weight);
  const linear = (value: tf.Tensor, weight: tf.Tensor) => tf.matMul(value as tf.Tensor2D, weight as tf.Tensor2D, false, true);
  const split = (value: tf.Tensor) => value.reshape([context, heads, headDim]);
  const rotate = (value: tf.Tensor) => {
    const [a, b] = tf.split(value, 2, -1);
    return tf.concat([a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin))], -1);
  };
  const block = (h: tf.Tensor, ...w: tf.Tensor[]): tf.Tensor => {
    const [q, k, v, o, gate, up, down] = w;
    const normed = rms(h, norms[0]);
    const byHead = (value: tf.Tensor) => value.transpose([1, 0, 2]);
    const [queries, keys, contents] = [
      byHead(rotate(split(linear(normed, q)))),
      byHead(rotate(split(linear(normed, k)))),
      byHead(split(linear(normed, v))),
    ];
    const scores = tf.matMul(queries, keys, false, true).div(Math.sqrt(headDim)).add(mask);
    const mixed = tf.matMul(tf.softmax(scores), contents).transpose([1, 0, 2]).reshape([context, hidden]);
    const middle = h.add(linear(mixed, o));
    const inner = rms(middle, norms[1]);
    const bent = linear(inner, gate);
    return middle.add(linear(bent.mul(tf.sigmoid(bent)).mul(linear(inner, up)), down));
  };
  const gradients = tf.grads(block);
  return {
    names: ['hidden', ...MATRICES],
    gradients: () => tf.tidy(() => gradients([x, ...matrices], dy).map((value) => value.dataSync() as Float32Array)),
  };
}
