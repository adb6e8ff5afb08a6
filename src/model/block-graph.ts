/** The calibration graph of one block: weights are inputs, so one compiled program serves every block of the same make. */
import { createHash } from 'node:crypto';
import { attention } from '../graph/attention.ts';
import { GraphBuilder, type Value } from '../graph/builder.ts';
import { positionsFromLengths } from '../graph/token-positions.ts';
import { type BlockParts, renderBlock, renderNorm } from './block-renderer.ts';
import type { BlockDescription, DecoderDescription } from './description.ts';
import type { BlockGraph, LinearSite, NormGraph } from './model.ts';
import { rotaryTable } from './rotary.ts';

/** See BlockGraph in model.ts for inputs and outputs; names in the graph are the checkpoint's without the block's own. */
export function buildBlockGraph(description: DecoderDescription, block: BlockDescription): BlockGraph {
  const { shape, rotary } = description;
  const { headCount, kvHeadCount, headDim, hiddenSize } = shape;
  const prefix = `${block.name}.`;
  const local = (name: string): string => name.slice(prefix.length);
  const builder = new GraphBuilder('block');
  const hidden = builder.input('hidden', 'F32', ['batch', 'sequence', hiddenSize]);
  const lengths = builder.input('lengths', 'I32', ['batch']);
  const positions = positionsFromLengths(builder, lengths, hidden);
  const tables =
    rotary && block.attention.rotates
      ? {
          cos: builder.initializer(rotaryTable('cos_cache', 'cos', rotary)),
          sin: builder.initializer(rotaryTable('sin_cache', 'sin', rotary)),
        }
      : undefined;

  const weights = new Map<string, LinearSite | string>();
  const siteInputs = new Map<string, string>();
  const observed = new Map<string, Value>();
  const weightInput = (name: string, source: LinearSite | string, dims: readonly number[]): Value => {
    weights.set(local(name), source);
    return builder.input(local(name), 'F32', dims);
  };
  const parts: BlockParts = {
    tensor: (name, dims) => weightInput(name, name, dims),
    linear(site, x) {
      const weight = weightInput(`${site.name}.weight`, site, [site.outFeatures, site.inFeatures]);
      return builder.rootScope(local(site.name), () => {
        // onnxruntime makes one product of the two, without moving the weight.
        const y = builder.matmul(x, builder.transpose(weight, [1, 0]));
        if (!site.hasBias) return y;
        return builder.add(y, weightInput(`${site.name}.bias`, `${site.name}.bias`, [site.outFeatures]));
      });
    },
    attend: (_, q, k, v) => {
      const { window, scale } = block.attention;
      return attention(builder, q, k, v, positions, {
        headCount,
        kvHeadCount,
        headDim,
        scale,
        ...(window === undefined ? {} : { window }),
        ...(tables ? { rotary: tables } : {}),
      }).output;
    },
    observe(input, value) {
      siteInputs.set(input, local(input));
      observed.set(local(input), value);
    },
  };
  const normed = renderNorm(builder, parts, block.attentionNorm, hidden);
  const residual = renderBlock(builder, shape, block, parts, hidden, normed);
  builder.output('hidden_out', builder.add(residual.hidden, residual.branch));
  for (const [name, value] of observed) builder.output(name, value);
  return {
    model: builder.build(),
    key: graphKey('block', { headCount, kvHeadCount, headDim, rotary, block }, prefix),
    weights,
    siteInputs,
  };
}

/** `hidden` (rows, hiddenSize) -> `hidden_out`, the norm before the output head. */
export function buildNormGraph(description: DecoderDescription): NormGraph {
  const { finalNorm, shape } = description;
  const builder = new GraphBuilder('final_norm');
  const hidden = builder.input('hidden', 'F32', ['rows', shape.hiddenSize]);
  const weights = new Map<string, string>();
  const tensor = (name: string, dims: readonly number[]): Value => {
    const input = name.slice(finalNorm.name.length + 1);
    weights.set(input, name);
    return builder.input(input, 'F32', dims);
  };
  builder.output('hidden_out', renderNorm(builder, { tensor }, finalNorm, hidden));
  return { model: builder.build(), key: graphKey('norm', { finalNorm }, `${finalNorm.name}.`), weights };
}

/** A digest of all that shapes the graph; what only names the block is left out. */
function graphKey(kind: string, made: unknown, prefix: string): string {
  const name = prefix.slice(0, -1);
  const json = JSON.stringify(made, (_, value: unknown) => {
    if (typeof value !== 'string') return value;
    return value.startsWith(prefix) ? value.slice(prefix.length) : value === name ? '' : value;
  });
  return `${kind}-${createHash('sha256').update(json).digest('hex')}`;
}
