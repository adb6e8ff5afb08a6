/** The end of a network, differentiated: final norm, output head, and a loss of the logits (gradients.md, section 3). */
import { GraphBuilder, type Value } from '../graph/builder.ts';
import { gradient } from '../graph/gradient/gradient.ts';
import { graphKey } from './block-graph.ts';
import { renderNorm } from './block-renderer.ts';
import type { DecoderDescription } from './description.ts';
import type { HeadGradient, HeadObjective } from './model.ts';

/** See HeadGradient in model.ts. */
export function buildHeadGradient(
  { finalNorm, shape }: DecoderDescription,
  rows: number,
  objective: HeadObjective,
): HeadGradient {
  const { hiddenSize, vocabSize } = shape;
  const norm = { ...finalNorm, name: 'norm' };
  const builder = new GraphBuilder('head');
  const hidden = builder.input('hidden', 'F32', [rows, hiddenSize]);
  const head = builder.input('head', 'F32', [vocabSize, hiddenSize]);
  const weight = builder.input('weight', 'F32', [rows, 1]);
  const weights = new Map<string, string>();
  const tensor = (input: string, dims: readonly number[]): Value => {
    weights.set(input, finalNorm.name + input.slice(norm.name.length));
    return builder.input(input, 'F32', dims);
  };
  const normed = renderNorm(builder, { tensor }, norm, hidden);
  const logits = builder.matmul(normed, builder.transpose(head, [1, 0]));

  const { losses, slopes } = LOSSES[objective.kind](builder, logits, objective as never);
  const loss = builder.reduceSum(builder.mul(losses, weight), [0, 1], false);
  const [cotangent] = gradient(builder, [logits], [builder.mul(slopes, weight)], [hidden]);
  builder.output('loss', builder.reshape(loss, [1]));
  builder.output('hidden_cotangent', cotangent);
  return { model: builder.build(), key: graphKey({ norm, shape, rows, objective }), weights };
}

/** Of each row of logits (rows, vocabSize): its loss (rows, 1), and the derivative of that by the logits (rows, vocabSize). */
interface RowLosses {
  readonly losses: Value;
  readonly slopes: Value;
}

const LOSSES: {
  readonly [K in HeadObjective['kind']]: (
    builder: GraphBuilder,
    logits: Value,
    objective: Extract<HeadObjective, { kind: K }>,
  ) => RowLosses;
} = {
  divergence(builder, logits, { temperature }) {
    const teacher = builder.input('teacher', 'F32', logits.shape);
    const softened = builder.scalar('F32', 1 / temperature);
    const target = logSoftmax(builder, builder.mul(teacher, softened));
    const own = logSoftmax(builder, builder.mul(logits, softened));
    const p = builder.exp(target);
    const divergence = builder.reduceSum(builder.mul(p, builder.sub(target, own)), [1]);
    // d KL / d z = (q - p) / T; with the factor T^2 of the loss, T (q - p).
    return {
      losses: builder.mul(divergence, builder.scalar('F32', temperature ** 2)),
      slopes: builder.mul(builder.sub(builder.exp(own), p), builder.scalar('F32', temperature)),
    };
  },
  label(builder, logits) {
    const [rows, vocabSize] = logits.shape;
    // Tokens are whole numbers that float32 holds.
    const label = builder.input('label', 'F32', [rows, 1]);
    const tokens = builder.cast(builder.range(builder.scalar('I64', Number(vocabSize)), vocabSize), 'F32');
    const same = builder.and(builder.lessOrEqual(label, tokens), builder.lessOrEqual(tokens, label));
    const target = builder.where(same, builder.scalar('F32', 1), builder.scalar('F32', 0));
    const own = logSoftmax(builder, logits);
    return {
      losses: builder.neg(builder.reduceSum(builder.mul(target, own), [1])),
      slopes: builder.sub(builder.exp(own), target),
    };
  },
  entropy(builder, logits) {
    const own = logSoftmax(builder, logits);
    const q = builder.exp(own);
    const losses = builder.neg(builder.reduceSum(builder.mul(q, own), [1]));
    return { losses, slopes: builder.neg(builder.mul(q, builder.add(own, losses))) };
  },
};

/** Over the last axis, from its definition: no term overflows. */
function logSoftmax(builder: GraphBuilder, z: Value): Value {
  const shifted = builder.sub(z, builder.reduceMax(z, [z.shape.length - 1]));
  return builder.sub(shifted, builder.log(builder.reduceSum(builder.exp(shifted), [z.shape.length - 1])));
}
