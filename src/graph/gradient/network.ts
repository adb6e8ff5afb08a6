/** Derivatives of operators that are one node and many steps: norms, softmax, activations (gradients.md, section 3). */
import type { GraphBuilder, Value } from '../builder.ts';
import { floatAttribute, intAttribute, only, scalarLike, unbroadcast, type Vjp } from './vjp.ts';

const softmax: Vjp = (call) => {
  const { builder, node, outputs } = call;
  const p = outputs[0]!;
  const axis = intAttribute(node, 'axis', p.shape.length - 1);
  const weighted = builder.mul(only(call), p);
  return [builder.sub(weighted, builder.mul(p, builder.reduceSum(weighted, [axis])))];
};

/** x / sqrt(mean(x^2) + epsilon): the factor, and the product. */
function rms(builder: GraphBuilder, x: Value, epsilon: number): { factor: Value; normed: Value } {
  const mean = builder.reduceMean(builder.mul(x, x), [x.shape.length - 1]);
  const root = builder.sqrt(builder.add(mean, scalarLike(builder, x, epsilon)));
  const factor = builder.div(scalarLike(builder, x, 1), root);
  return { factor, normed: builder.mul(x, factor) };
}

/** Cotangents of x and the scale of an RMS norm. */
function rmsBack(builder: GraphBuilder, g: Value, x: Value, scale: Value, epsilon: number): { x: Value; scale: () => Value } {
  const { factor, normed } = rms(builder, x, epsilon);
  const u = builder.mul(g, scale);
  const along = builder.reduceMean(builder.mul(u, normed), [x.shape.length - 1]);
  return {
    x: builder.mul(factor, builder.sub(u, builder.mul(normed, along))),
    scale: () => unbroadcast(builder, builder.mul(g, normed), scale),
  };
}

const simplifiedLayerNorm: Vjp = (call) => {
  const { builder, node, inputs, wanted } = call;
  const [x, scale] = [inputs[0]!, inputs[1]!];
  const back = rmsBack(builder, only(call), x, scale, floatAttribute(node, 'epsilon', 1e-5));
  return [wanted[0] ? back.x : undefined, wanted[1] ? back.scale() : undefined];
};

/** Outputs are the norm and, in place 3, the sum that it is of. */
const skipSimplifiedLayerNorm: Vjp = ({ builder, node, inputs, outputs, cotangents, wanted }) => {
  const [x, skip, scale] = [inputs[0]!, inputs[1]!, inputs[2]!];
  const [ofNorm, , , ofSum] = cotangents;
  const sum = outputs[3] ?? builder.add(x, skip);
  const back = ofNorm && rmsBack(builder, ofNorm, sum, scale, floatAttribute(node, 'epsilon', 1e-5));
  const through = back && ofSum ? builder.add(back.x, ofSum) : (back?.x ?? ofSum);
  return [wanted[0] ? through : undefined, wanted[1] ? through : undefined, wanted[2] ? back?.scale() : undefined];
};

const layerNorm: Vjp = (call) => {
  const { builder, node, inputs, wanted } = call;
  const [x, scale, bias] = [inputs[0]!, inputs[1]!, inputs[2]];
  const g = only(call);
  const last = x.shape.length - 1;
  const centred = builder.sub(x, builder.reduceMean(x, [last]));
  const { factor, normed } = rms(builder, centred, floatAttribute(node, 'epsilon', 1e-5));
  const u = builder.mul(g, scale);
  const along = builder.reduceMean(builder.mul(u, normed), [last]);
  const flat = builder.sub(builder.sub(u, builder.reduceMean(u, [last])), builder.mul(normed, along));
  return [
    wanted[0] ? builder.mul(factor, flat) : undefined,
    wanted[1] ? unbroadcast(builder, builder.mul(g, normed), scale) : undefined,
    bias && wanted[2] ? unbroadcast(builder, g, bias) : undefined,
  ];
};

const gelu: Vjp = (call) => {
  const { builder, node, inputs } = call;
  const x = inputs[0]!;
  const c = (value: number) => scalarLike(builder, x, value);
  const attribute = node.attributes['approximate'];
  const slope = attribute?.kind === 'string' && attribute.value === 'tanh' ? tanhSlope(builder, x, c) : erfSlope(builder, x, c);
  return [builder.mul(only(call), slope)];
};

/** Phi(x) + x phi(x). */
function erfSlope(builder: GraphBuilder, x: Value, c: (value: number) => Value): Value {
  const cdf = builder.mul(c(0.5), builder.add(c(1), builder.erf(builder.mul(x, c(Math.SQRT1_2)))));
  const density = builder.mul(c(1 / Math.sqrt(2 * Math.PI)), builder.exp(builder.mul(c(-0.5), builder.mul(x, x))));
  return builder.add(cdf, builder.mul(x, density));
}

/** (1 + t) / 2 + x (1 - t^2) k (1 + 3 * 0.044715 x^2) / 2, with t = tanh(k (x + 0.044715 x^3)) and k = sqrt(2 / pi). */
function tanhSlope(builder: GraphBuilder, x: Value, c: (value: number) => Value): Value {
  const k = Math.sqrt(2 / Math.PI);
  const square = builder.mul(x, x);
  const t = builder.tanh(builder.mul(builder.mul(c(k), x), builder.add(c(1), builder.mul(c(0.044715), square))));
  const flat = builder.sub(c(1), builder.mul(t, t));
  const steep = builder.mul(c(k), builder.add(c(1), builder.mul(c(3 * 0.044715), square)));
  return builder.mul(c(0.5), builder.add(builder.add(c(1), t), builder.mul(x, builder.mul(flat, steep))));
}

export const NETWORK: Readonly<Record<string, Vjp>> = {
  Softmax: softmax,
  SimplifiedLayerNormalization: simplifiedLayerNorm,
  SkipSimplifiedLayerNormalization: skipSimplifiedLayerNorm,
  LayerNormalization: layerNorm,
  Gelu: gelu,
};
