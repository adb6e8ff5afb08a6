/** The end of a network, differentiated: final norm, output head, and the divergence from a teacher's logits (gradients.md, section 3). */
import { GraphBuilder, type Value } from '../graph/builder.ts';
import { gradient } from '../graph/gradient/gradient.ts';
import { graphKey } from './block-graph.ts';
import { renderNorm } from './block-renderer.ts';
import type { DecoderDescription } from './description.ts';
import type { HeadGradient } from './model.ts';

/** See HeadGradient in model.ts. */
export function buildHeadGradient({ finalNorm, shape }: DecoderDescription, rows: number, temperature: number): HeadGradient {
  const { hiddenSize, vocabSize } = shape;
  const norm = { ...finalNorm, name: 'norm' };
  const builder = new GraphBuilder('head');
  const hidden = builder.input('hidden', 'F32', [rows, hiddenSize]);
  const head = builder.input('head', 'F32', [vocabSize, hiddenSize]);
  const teacher = builder.input('teacher', 'F32', [rows, vocabSize]);
  const weight = builder.input('weight', 'F32', [rows, 1]);
  const weights = new Map<string, string>();
  const tensor = (input: string, dims: readonly number[]): Value => {
    weights.set(input, finalNorm.name + input.slice(norm.name.length));
    return builder.input(input, 'F32', dims);
  };
  const normed = renderNorm(builder, { tensor }, norm, hidden);
  const logits = builder.matmul(normed, builder.transpose(head, [1, 0]));

  const softened = builder.scalar('F32', 1 / temperature);
  const target = logSoftmax(builder, builder.mul(teacher, softened));
  const own = logSoftmax(builder, builder.mul(logits, softened));
  const p = builder.exp(target);
  const divergence = builder.reduceSum(builder.mul(p, builder.sub(target, own)), [1]);
  const loss = builder.reduceSum(builder.mul(divergence, weight), [0, 1], false);
  // d KL / d z = (q - p) / T; with the factor T^2 of the loss, T (q - p).
  const slope = builder.mul(builder.sub(builder.exp(own), p), builder.mul(weight, builder.scalar('F32', temperature)));
  const [cotangent] = gradient(builder, [logits], [slope], [hidden]);
  builder.output('loss', builder.reshape(builder.mul(loss, builder.scalar('F32', temperature ** 2)), [1]));
  builder.output('hidden_cotangent', cotangent);
  return { model: builder.build(), key: graphKey({ norm, shape, rows, temperature }), weights };
}

/** Over the last axis, from its definition: no term overflows. */
function logSoftmax(builder: GraphBuilder, z: Value): Value {
  const shifted = builder.sub(z, builder.reduceMax(z, [z.shape.length - 1]));
  return builder.sub(shifted, builder.log(builder.reduceSum(builder.exp(shifted), [z.shape.length - 1])));
}
