/** How the exporter renders what is quantized: linears as MatMulNBits, embeddings as GatherBlockQuantized; everything else stays float. */
import type { TensorSource } from '../../../formats/tensor.ts';
import { int } from '../../graph/attributes.ts';
import { type GraphBuilder, MICROSOFT, type Value } from '../../graph/builder.ts';
import type { DecoderLowering, LinearSite, Model } from '../../model/model.ts';
import { floatTensor } from '../../model/stored-tensor.ts';
import { type AccuracyLevel, LinearRenderer } from './linear-graph.ts';
import type { QuantizedInitializers } from './linear-initializers.ts';
import { type OnnxLinearLayout, partRowBytes } from './linear-layout.ts';

export interface LoweringOptions {
  readonly model: Model;
  /** Biases come from here, in their own dtype. */
  readonly tensors: TensorSource;
  readonly quantized: QuantizedInitializers;
  readonly accuracyLevel: AccuracyLevel;
}

/** Makes the lowering of one graph. */
export function quantizedLowering({ model, tensors, quantized, accuracyLevel }: LoweringOptions): DecoderLowering {
  const renderers = new WeakMap<GraphBuilder, LinearRenderer>();
  const rendererOf = (builder: GraphBuilder): LinearRenderer => {
    const renderer = renderers.get(builder) ?? new LinearRenderer(builder, accuracyLevel);
    renderers.set(builder, renderer);
    return renderer;
  };
  const embedding = moduleOf(model.tokenEmbedding);
  const head = moduleOf(model.outputHead);
  return {
    linear(builder: GraphBuilder, site: LinearSite, x: Value): Value | undefined {
      const layout = quantized.layouts.get(site.name);
      if (!layout) return undefined;
      const bias = site.hasBias ? floatTensor(builder, tensors, `${site.name}.bias`) : null;
      return rendererOf(builder).render(site.name, layout, quantized.of(site.name), x, bias);
    },
    embedding(builder: GraphBuilder, ids: Value): Value | undefined {
      const layout = quantized.layouts.get(embedding);
      return layout && gatherRows(builder, rendererOf(builder).operands(layout, quantized.of(embedding), 0), layout, ids);
    },
    head(builder: GraphBuilder, hidden: Value): Value | undefined {
      const layout = quantized.layouts.get(head);
      return layout && rendererOf(builder).render(head, layout, quantized.of(head), hidden, null);
    },
  };
}

/** Rows of a quantized table by token id. The table is the operand a tied output head multiplies with; here its blocks lie end to end. */
function gatherRows(
  builder: GraphBuilder,
  [operand, scales, qzeros]: readonly [Value, Value, Value],
  layout: OnnxLinearLayout,
  ids: Value,
): Value {
  const { parts, blockSize, inFeatures, outFeatures } = layout;
  const table = builder.reshape(operand, [outFeatures, partRowBytes(parts[0], blockSize).qweight]);
  const attributes = { bits: int(parts[0].bits), block_size: int(blockSize), gather_axis: int(0), quantize_axis: int(1) };
  const output = { dtype: 'F32', shape: [...ids.shape, inFeatures] } as const;
  const inputs = [table, ids, scales, qzeros];
  return builder.node('GatherBlockQuantized', inputs, { domain: MICROSOFT, attributes, outputs: [output] })[0];
}

/**
 * Group size for quantized embeddings: the largest power of two, at most `groupSize`, that divides the hidden size (GatherBlockQuantized takes
 * whole blocks only). Undefined when that is less than 16: such a table must stay float.
 */
export function embeddingGroupSize(hiddenSize: number, groupSize: number): number | undefined {
  let size = 1;
  while (size * 2 <= groupSize && hiddenSize % (size * 2) === 0) size *= 2;
  return size >= 16 ? size : undefined;
}

function moduleOf(tensor: string): string {
  return tensor.slice(0, tensor.lastIndexOf('.'));
}
