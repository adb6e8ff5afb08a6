/**
 * The whole decoder as runtimes run it: token ids and a cache in, logits and the longer cache out. Rows of a batch are
 * padded to the right: GroupQueryAttention is told how many tokens of a row are real, not which.
 */
import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { TensorSource } from '../../formats/tensor.ts';
import { attention, type RotaryTables } from '../graph/attention.ts';
import { GraphBuilder, type Value } from '../graph/builder.ts';
import { positionsFromMask, type TokenPositions } from '../graph/token-positions.ts';
import { addAndNorm, type BlockParts, renderBlock, renderNorm } from './block-renderer.ts';
import type { BlockDescription, DecoderDescription } from './description.ts';
import type { DecoderLowering } from './model.ts';
import { rotaryTable } from './rotary.ts';
import { floatTensor, storedTensor } from './stored-tensor.ts';

/** Dimension names that transformers.js and onnxruntime-genai go by; all but these must be numbers. */
const BATCH = 'batch_size';
const SEQUENCE = 'sequence_length';
const PAST = 'past_sequence_length';
const TOTAL = 'total_sequence_length';

/** See Model.decoderGraph. */
export function buildDecoderGraph(description: DecoderDescription, tensors: TensorSource, lowering: DecoderLowering): OnnxModel {
  const { shape, blocks, finalNorm } = description;
  const builder = new GraphBuilder('decoder');
  const ids = builder.input('input_ids', 'I64', [BATCH, SEQUENCE]);
  const mask = builder.input('attention_mask', 'I64', [BATCH, TOTAL]);
  const positions = positionsFromMask(builder, mask, ids);
  const parts = decoderParts(builder, description, tensors, lowering, positions);

  let hidden = embed(builder, description, tensors, lowering, ids, positions);
  let normed = renderNorm(builder, parts, blocks[0].attentionNorm, hidden);
  blocks.forEach((block, i) => {
    const residual = renderBlock(builder, shape, block, parts, hidden, normed);
    ({ hidden, normed } = addAndNorm(builder, parts, residual, blocks[i + 1]?.attentionNorm ?? finalNorm));
  });
  builder.output('logits', head(builder, description, tensors, lowering, normed), [BATCH, SEQUENCE, shape.vocabSize]);
  parts.outputPresent();
  return builder.build();
}

function embed(
  builder: GraphBuilder,
  description: DecoderDescription,
  tensors: TensorSource,
  lowering: DecoderLowering,
  ids: Value,
  positions: TokenPositions,
): Value {
  const { tokenEmbedding, positionEmbedding } = description;
  const tokens = builder.rootScope(moduleOf(tokenEmbedding), () => {
    const lowered = lowering.embedding?.(builder, ids);
    // Rows are picked before the Cast: the table stays as small as it is stored.
    return lowered ?? builder.cast(builder.gather(storedTensor(builder, tensors, tokenEmbedding), ids), 'F32');
  });
  if (positionEmbedding === undefined) return tokens;
  return builder.rootScope(moduleOf(positionEmbedding), () => {
    const rows = builder.gather(storedTensor(builder, tensors, positionEmbedding), positions.indices());
    return builder.add(tokens, builder.cast(rows, 'F32'));
  });
}

function head(
  builder: GraphBuilder,
  { outputHead, tokenEmbedding }: DecoderDescription,
  tensors: TensorSource,
  lowering: DecoderLowering,
  hidden: Value,
): Value {
  return builder.rootScope(outputHead === tokenEmbedding ? 'lm_head' : moduleOf(outputHead), () => {
    const lowered = lowering.head?.(builder, hidden);
    // The table is shared with the embedding when tied. Cast and Transpose are folded when the model is loaded.
    return lowered ?? builder.matmul(hidden, builder.transpose(floatTensor(builder, tensors, outputHead), [1, 0]));
  });
}

function decoderParts(
  builder: GraphBuilder,
  description: DecoderDescription,
  tensors: TensorSource,
  lowering: DecoderLowering,
  positions: TokenPositions,
): BlockParts & { outputPresent(): void } {
  const { headCount, kvHeadCount, headDim } = description.shape;
  const index = new Map(description.blocks.map((block, i): [BlockDescription, number] => [block, i]));
  const tables = sharedTables(builder, description);
  const present: [string, Value][] = [];
  return {
    tensor: (name) => floatTensor(builder, tensors, name),
    linear: (site, x) =>
      builder.rootScope(site.name, () => {
        const lowered = lowering.linear?.(builder, site, x);
        if (lowered) return lowered;
        const weight = floatTensor(builder, tensors, `${site.name}.weight`);
        const y = builder.matmul(x, site.transposed ? weight : builder.transpose(weight, [1, 0]));
        return site.hasBias ? builder.add(y, floatTensor(builder, tensors, `${site.name}.bias`)) : y;
      }),
    attend(block, q, k, v) {
      const i = index.get(block)!;
      const { window, scale, rotates } = block.attention;
      const past = (part: string): Value =>
        builder.input(`past_key_values.${i}.${part}`, 'F32', [BATCH, kvHeadCount, PAST, headDim]);
      const result = attention(builder, q, k, v, positions, {
        headCount,
        kvHeadCount,
        headDim,
        scale,
        past: { key: past('key'), value: past('value') },
        ...(window === undefined ? {} : { window }),
        ...(rotates && tables ? { rotary: tables() } : {}),
      });
      present.push([`present.${i}.key`, result.presentKey], [`present.${i}.value`, result.presentValue]);
      return result.output;
    },
    outputPresent() {
      for (const [name, value] of present) builder.output(name, value, [BATCH, kvHeadCount, TOTAL, headDim]);
    },
  };
}

/** cos and sin caches, stored once for all blocks, and only if one rotates. */
function sharedTables(builder: GraphBuilder, { rotary }: DecoderDescription): (() => RotaryTables) | undefined {
  if (!rotary) return undefined;
  const cos = rotaryTable('cos_cache', 'cos', rotary);
  const sin = rotaryTable('sin_cache', 'sin', rotary);
  return () => ({ cos: builder.initializer(cos), sin: builder.initializer(sin) });
}

/** `model.embed_tokens.weight` -> `model.embed_tokens` */
function moduleOf(tensor: string): string {
  return tensor.slice(0, tensor.lastIndexOf('.'));
}
