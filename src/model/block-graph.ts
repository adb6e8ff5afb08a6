/** The calibration graph of one block: weights are inputs, so one compiled program serves every block of the same make. */
import { createHash } from 'node:crypto';
import { attention } from '../graph/attention.ts';
import { GraphBuilder, type Value } from '../graph/builder.ts';
import { positionsFromLengths } from '../graph/token-positions.ts';
import { type BlockParts, renderBlock, renderNorm } from './block-renderer.ts';
import type { BlockDescription, DecoderDescription } from './description.ts';
import { blockSites } from './expected-tensors.ts';
import type { BlockGraph, LinearSite, NormGraph } from './model.ts';
import { rotaryTable } from './rotary.ts';

/** Graph output: the residual stream between attention and MLP. */
const MIDDLE = 'middle';

/** See BlockGraph in model.ts for inputs and outputs; names in the graph are the checkpoint's without the block's own. */
export function buildBlockGraph(description: DecoderDescription, named: BlockDescription, positions: number): BlockGraph {
  const { shape } = description;
  // The tables are part of the graph: for a context of a million tokens they would be 512 MB of it, whatever the text's length.
  const rotary = description.rotary && { ...description.rotary, positions: Math.min(positions, description.rotary.positions) };
  const { headCount, kvHeadCount, headDim, hiddenSize } = shape;
  const prefix = `${named.name}.`;
  const block = withoutPrefix(named, prefix);
  const sites = new Map(blockSites(named).map((site) => [site.name, site]));

  const builder = new GraphBuilder('block');
  const hidden = builder.input('hidden', 'F32', ['batch', 'sequence', hiddenSize]);
  const lengths = builder.input('lengths', 'I32', ['batch']);
  const tokens = positionsFromLengths(builder, lengths, hidden);
  const tables =
    rotary && block.attention.rotates
      ? {
          cos: builder.initializer(rotaryTable('cos_cache', 'cos', rotary)),
          sin: builder.initializer(rotaryTable('sin_cache', 'sin', rotary)),
        }
      : undefined;
  const weights = new Map<string, LinearSite | string>();
  const siteInputs = new Map<string, Value>();
  const residuals = new Map<string, string>();
  let residual = 'hidden';
  const tensor = (name: string, dims: readonly number[]): Value => {
    weights.set(name, prefix + name);
    return builder.input(name, 'F32', dims);
  };
  const parts: BlockParts = {
    tensor,
    linear(site, x) {
      const input = `${site.name}.weight`;
      weights.set(input, sites.get(prefix + site.name)!);
      const weight = builder.input(input, 'F32', [site.outFeatures, site.inFeatures]);
      return builder.rootScope(site.name, () => {
        // onnxruntime makes one product of the two, without moving the weight.
        const y = builder.matmul(x, builder.transpose(weight, [1, 0]));
        return site.hasBias ? builder.add(y, tensor(`${site.name}.bias`, [site.outFeatures])) : y;
      });
    },
    attend: (_, q, k, v) => {
      const { window, scale } = block.attention;
      return attention(builder, q, k, v, tokens, {
        headCount,
        kvHeadCount,
        headDim,
        scale,
        ...(window === undefined ? {} : { window }),
        ...(tables ? { rotary: tables } : {}),
      }).output;
    },
    observeMiddle(value) {
      residual = MIDDLE;
      builder.output(MIDDLE, value);
    },
    observe(input, value) {
      siteInputs.set(input, value);
      residuals.set(prefix + input, residual);
    },
  };
  const normed = renderNorm(builder, parts, block.attentionNorm, hidden);
  const last = renderBlock(builder, shape, block, parts, hidden, normed);
  builder.output('hidden_out', builder.add(last.hidden, last.branch));
  for (const [name, value] of siteInputs) builder.output(name, value);
  return {
    model: builder.build(),
    key: graphKey({ headCount, kvHeadCount, headDim, rotary, block }),
    weights,
    siteInputs: new Map([...siteInputs.keys()].map((input) => [prefix + input, input])),
    residuals,
  };
}

/** `hidden` (rows, hiddenSize) -> `hidden_out`, the norm before the output head. */
export function buildNormGraph(description: DecoderDescription): NormGraph {
  const { name } = description.finalNorm;
  const norm = { ...description.finalNorm, name: 'norm' };
  const builder = new GraphBuilder('final_norm');
  const hidden = builder.input('hidden', 'F32', ['rows', description.shape.hiddenSize]);
  const weights = new Map<string, string>();
  const tensor = (input: string, dims: readonly number[]): Value => {
    weights.set(input, name + input.slice(norm.name.length));
    return builder.input(input, 'F32', dims);
  };
  builder.output('hidden_out', renderNorm(builder, { tensor }, norm, hidden));
  return { model: builder.build(), key: graphKey({ norm }), weights };
}

/** The block as if it had no name: blocks of one make become equal. */
function withoutPrefix(block: BlockDescription, prefix: string): BlockDescription {
  const json = JSON.stringify({ ...block, name: '' }, (_, value: unknown) =>
    typeof value === 'string' && value.startsWith(prefix) ? value.slice(prefix.length) : value,
  );
  return JSON.parse(json) as BlockDescription;
}

/** A digest of all that shapes a graph. */
function graphKey(made: unknown): string {
  return createHash('sha256').update(JSON.stringify(made)).digest('hex');
}
