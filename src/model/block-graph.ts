/** The calibration graph of one block: weights are inputs, so one compiled program serves every block of the same make. */
import { createHash } from 'node:crypto';
import type { Dim } from '../../formats/onnx/model.ts';
import { type AttentionLowering, attention } from '../graph/attention.ts';
import { GraphBuilder, type Value } from '../graph/builder.ts';
import { gradient } from '../graph/gradient/gradient.ts';
import { stop } from '../graph/gradient/straight-through.ts';
import { balanceLoss, ROUTED_TENSORS, type RoutedBranch, routedBranch, routedSizes } from '../graph/routed-branch.ts';
import { positionsFromLengths, positionsFromSlots } from '../graph/token-positions.ts';
import { type BlockParts, renderBlock, renderNorm } from './block-renderer.ts';
import type { BlockDescription, DecoderDescription } from './description.ts';
import { blockSites } from './expected-tensors.ts';
import type { BlockGradient, BlockGraph, BlockLoss, BlockStep, LinearSite, NormGraph, RoutedSites } from './model.ts';
import { rotaryTable } from './rotary.ts';

/** Graph output: the residual stream between attention and MLP. */
const MIDDLE = 'middle';

/** A block in a graph under construction. */
interface RenderedBlock {
  readonly builder: GraphBuilder;
  readonly hidden: Value;
  readonly hiddenOut: Value;
  /** Graph inputs that take tensors of the checkpoint: what each takes, and its place in the graph. */
  readonly weights: Map<string, { readonly source: LinearSite | string; readonly value: Value }>;
  /** By site input, without the block's name. */
  readonly siteInputs: Map<string, Value>;
  readonly residuals: Map<string, string>;
  /** Keys and values of all tokens so far, where the block has a cache. */
  readonly present: { readonly key: Value; readonly value: Value } | undefined;
  /** By site, without the block's name. */
  readonly branches: Map<string, RoutedBranch>;
  /** 1 for real tokens, 0 for pads, (batch, sequence, 1). */
  counts(): Value;
  /** A digest of all that shapes the block. */
  readonly make: string;
}

interface Rendering {
  readonly positions: number;
  readonly batch: Dim;
  readonly sequence: Dim;
  readonly lowering?: AttentionLowering;
  /** Tokens of earlier calls come in as keys and values. */
  readonly cached?: boolean;
  readonly routed?: RoutedSites | undefined;
}

function render(description: DecoderDescription, named: BlockDescription, rendering: Rendering): RenderedBlock {
  const { shape } = description;
  const { positions, batch, sequence, lowering, cached = false, routed } = rendering;
  // The tables are part of the graph: for a context of a million tokens they would be 512 MB of it, whatever the text's length.
  const rotary = description.rotary && { ...description.rotary, positions: Math.min(positions, description.rotary.positions) };
  const { headCount, kvHeadCount, headDim, hiddenSize } = shape;
  const prefix = `${named.name}.`;
  const block = withoutPrefix(named, prefix);
  const sites = new Map(blockSites(named).map((site) => [site.name, site]));

  const builder = new GraphBuilder('block');
  const hidden = builder.input('hidden', 'F32', [batch, sequence, hiddenSize]);
  const tokens = cached
    ? positionsFromSlots(
        builder,
        builder.input('query_positions', 'I64', [batch, sequence]),
        builder.input('key_positions', 'I64', [batch, 'total']),
      )
    : positionsFromLengths(builder, builder.input('lengths', 'I32', [batch]), hidden);
  const past = cached
    ? {
        key: builder.input('past_key', 'F32', [batch, kvHeadCount, 'past', headDim]),
        value: builder.input('past_value', 'F32', [batch, kvHeadCount, 'past', headDim]),
      }
    : undefined;
  let present: RenderedBlock['present'];
  const tables =
    rotary && block.attention.rotates
      ? {
          cos: builder.initializer(rotaryTable('cos_cache', 'cos', rotary)),
          sin: builder.initializer(rotaryTable('sin_cache', 'sin', rotary)),
        }
      : undefined;
  const weights: RenderedBlock['weights'] = new Map();
  const siteInputs = new Map<string, Value>();
  const residuals = new Map<string, string>();
  const branches: RenderedBlock['branches'] = new Map();
  let residual = 'hidden';
  const input = (name: string, dims: readonly number[], source: LinearSite | string): Value => {
    const value = builder.input(name, 'F32', dims);
    weights.set(name, { source, value });
    return value;
  };
  const tensor = (name: string, dims: readonly number[]): Value => input(name, dims, prefix + name);
  const parts: BlockParts = {
    tensor,
    linear(site, x) {
      const full = sites.get(prefix + site.name)!;
      const weight = input(`${site.name}.weight`, [site.outFeatures, site.inFeatures], full);
      const experts = routed?.(full);
      return builder.rootScope(site.name, () => {
        // onnxruntime makes one product of the two, without moving the weight.
        const product = builder.matmul(x, builder.transpose(weight, [1, 0]));
        const y = site.hasBias ? builder.add(product, tensor(`${site.name}.bias`, [site.outFeatures])) : product;
        if (!experts) return y;
        const sizes = routedSizes(experts, site);
        const [router, expertsA, expertsB] = ROUTED_TENSORS.map((key) => tensor(`${site.name}.${key}`, sizes[key]));
        const branch = routedBranch(builder, x, experts, { router, expertsA, expertsB });
        branches.set(site.name, branch);
        return builder.add(y, branch.output);
      });
    },
    attend: (_, q, k, v) => {
      const { window, scale } = block.attention;
      const options = {
        headCount,
        kvHeadCount,
        headDim,
        scale,
        ...(window === undefined ? {} : { window }),
        ...(tables ? { rotary: tables } : {}),
        ...(past ? { past } : {}),
      };
      const { output, presentKey, presentValue } = attention(builder, q, k, v, tokens, options, lowering);
      if (past) present = { key: presentKey, value: presentValue };
      return output;
    },
    observeMiddle(value) {
      residual = MIDDLE;
      builder.output(MIDDLE, value);
    },
    observe(name, value) {
      siteInputs.set(name, value);
      residuals.set(prefix + name, residual);
    },
  };
  const normed = renderNorm(builder, parts, block.attentionNorm, hidden);
  const last = renderBlock(builder, shape, block, parts, hidden, normed);
  const hiddenOut = builder.add(last.hidden, last.branch);
  const experts = routed && [...sites.values()].map(routed);
  const make = graphKey({ headCount, kvHeadCount, headDim, rotary, block, ...(experts?.some(Boolean) ? { experts } : {}) });
  const counts = () => {
    const real = builder.less(tokens.indices(), builder.unsqueeze(builder.cast(builder.valueNamed('lengths'), 'I64'), [1]));
    return stop(builder, builder.unsqueeze(builder.cast(real, 'F32'), [2]));
  };
  return { builder, hidden, hiddenOut, weights, siteInputs, residuals, branches, counts, present, make };
}

/** See BlockGraph in model.ts for inputs and outputs; names in the graph are the checkpoint's without the block's own. */
export function buildBlockGraph(
  description: DecoderDescription,
  named: BlockDescription,
  positions: number,
  lowering?: AttentionLowering,
  routed?: RoutedSites,
): BlockGraph {
  const rendering: Rendering = { positions, batch: 'batch', sequence: 'sequence', routed, ...(lowering && { lowering }) };
  const { builder, hiddenOut, weights, siteInputs, residuals, make } = render(description, named, rendering);
  builder.output('hidden_out', hiddenOut);
  for (const [name, value] of siteInputs) builder.output(name, value);
  return {
    model: builder.build(),
    key: lowering ? `${make} ${lowering}` : make,
    weights: sourcesOf(weights),
    siteInputs: new Map([...siteInputs.keys()].map((input) => [`${named.name}.${input}`, input])),
    residuals,
  };
}

/** See BlockStep in model.ts. Attention is made of plain operators: what onnxruntime fuses wants a row's tokens side by side. */
export function buildBlockStep(
  description: DecoderDescription,
  named: BlockDescription,
  positions: number,
  routed?: RoutedSites,
): BlockStep {
  const rendering: Rendering = { positions, batch: 'batch', sequence: 'sequence', lowering: 'plain', cached: true, routed };
  const { builder, hiddenOut, weights, present, make } = render(description, named, rendering);
  builder.output('hidden_out', hiddenOut);
  builder.output('present_key', present!.key);
  builder.output('present_value', present!.value);
  return { model: builder.build(), key: `${make} step`, weights: sourcesOf(weights) };
}

/** See BlockGradient in model.ts. Attention is made of plain operators: what onnxruntime fuses has no derivative. */
export function buildBlockGradient(
  description: DecoderDescription,
  named: BlockDescription,
  { batch, sequence }: { readonly batch: number; readonly sequence: number },
  routed?: RoutedSites,
): BlockGradient {
  const rendering: Rendering = { positions: sequence, batch, sequence, lowering: 'plain', routed };
  const rendered = render(description, named, rendering);
  const { builder, hidden, hiddenOut, weights, branches, make } = rendered;
  const cotangent = builder.input('cotangent', 'F32', hiddenOut.shape);
  const balance = blockBalance(rendered);
  const trained = [...weights].filter(([name, { source }]) =>
    typeof source === 'string' ? branches.has(siteOf(name)) && !/\.(weight|bias)$/.test(name) : !branches.has(siteOf(name)),
  );
  const wrt = [hidden, ...trained.map(([, { value }]) => value)];
  const outputs = balance ? [hiddenOut, balance] : [hiddenOut];
  const cotangents = balance ? [cotangent, builder.input('balance', 'F32', [1])] : [cotangent];
  const [ofHidden, ...ofTrained] = gradient(builder, outputs, cotangents, wrt);
  builder.output('hidden_cotangent', ofHidden);
  if (balance) builder.output('balance_loss', balance);
  const sites = new Map<string, string>();
  const experts = new Map<string, string>();
  ofTrained.forEach((value, i) => {
    const [name, { source }] = trained[i];
    builder.output(`${name} cotangent`, value);
    if (typeof source === 'string') experts.set(source, `${name} cotangent`);
    else sites.set(source.name, `${name} cotangent`);
  });
  return {
    model: builder.build(),
    key: `${make} gradient ${batch} ${sequence}`,
    weights: sourcesOf(weights),
    sites,
    experts,
  };
}

/** The site that a graph input belongs to. */
function siteOf(input: string): string {
  return input.slice(0, input.lastIndexOf('.'));
}

/** How evenly the block's routers pick, those of equally many experts together; absent where none picks. */
function blockBalance({ builder, branches, counts }: RenderedBlock): Value | undefined {
  const groups = new Map<unknown, Required<RoutedBranch>[]>();
  for (const branch of branches.values()) {
    const { logits, picks } = branch;
    const experts = logits.shape[2];
    if (picks) groups.set(experts, [...(groups.get(experts) ?? []), { ...branch, picks }]);
  }
  if (groups.size === 0) return undefined;
  return builder.rootScope('balance', () => {
    const real = counts();
    return [...groups.values()].map((routers) => balanceLoss(builder, routers, real)).reduce((sum, one) => builder.add(sum, one));
  });
}

/** See BlockLoss in model.ts. */
export function buildBlockLoss(
  description: DecoderDescription,
  named: BlockDescription,
  { batch, sequence }: { readonly batch: number; readonly sequence: number },
): BlockLoss {
  const rendering: Rendering = { positions: sequence, batch, sequence, lowering: 'plain' };
  const { builder, hiddenOut, weights, make } = render(description, named, rendering);
  const target = builder.input('target', 'F32', hiddenOut.shape);
  const weight = builder.input('weight', 'F32', [batch, sequence, 1]);
  const error = builder.sub(hiddenOut, target);
  const weighted = builder.mul(error, weight);
  const loss = builder.reduceSum(builder.mul(weighted, error), [0, 1, 2], false);
  builder.output('loss', builder.reshape(loss, [1]));
  const linear = [...weights].filter(([, { source }]) => typeof source !== 'string');
  const slope = builder.mul(weighted, builder.scalar('F32', 2));
  const gradients = gradient(
    builder,
    [hiddenOut],
    [slope],
    linear.map(([, { value }]) => value),
  );
  const sites = new Map<string, string>();
  gradients.forEach((value, i) => {
    const [name, { source }] = linear[i];
    builder.output(`${name} cotangent`, value);
    sites.set((source as LinearSite).name, `${name} cotangent`);
  });
  return { model: builder.build(), key: `${make} loss ${batch} ${sequence}`, weights: sourcesOf(weights), sites };
}

function sourcesOf(weights: RenderedBlock['weights']): Map<string, LinearSite | string> {
  return new Map([...weights].map(([name, { source }]) => [name, source]));
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
export function graphKey(made: unknown): string {
  return createHash('sha256').update(JSON.stringify(made)).digest('hex');
}
