/** The forward pass of one block, rendered once for calibration and export; only where weights and caches come from differs. */
import type { GraphBuilder, Value } from '../graph/builder.ts';
import type { Activation, AttentionDescription, BlockDescription, MlpDescription, NormDescription } from './description.ts';
import type { LinearSite, ModelShape } from './model.ts';

/** What a graph supplies to the blocks in it. */
export interface BlockParts {
  /** A site applied to `x` (batch, sequence, inFeatures), bias included. */
  linear(site: LinearSite, x: Value): Value;
  /** A checkpoint tensor as F32. */
  tensor(name: string, shape: readonly number[]): Value;
  /** Attention of `block`: q, k and v in, (batch, sequence, headCount * headDim) out. */
  attend(block: BlockDescription, q: Value, k: Value, v: Value): Value;
  /** Told of the residual stream between attention and MLP. */
  observeMiddle?(value: Value): void;
  /** Told of each site input when it is made. */
  observe?(input: string, value: Value): void;
}

/** Hidden states between two residual additions: `hidden + branch` is what the next norm reads. */
export interface Residual {
  readonly hidden: Value;
  readonly branch: Value;
}

/** Renders a block that reads `hidden` (batch, sequence, hiddenSize) and its attention norm, `normed`. The last addition is left to the caller. */
export function renderBlock(
  builder: GraphBuilder,
  shape: ModelShape,
  block: BlockDescription,
  parts: BlockParts,
  hidden: Value,
  normed: Value,
): Residual {
  const attended = builder.rootScope(block.attentionName, () => renderAttention(builder, shape, block, parts, normed));
  const middle = addAndNorm(builder, parts, { hidden, branch: attended }, block.mlpNorm);
  parts.observeMiddle?.(middle.hidden);
  const branch = builder.rootScope(block.mlpName, () => renderMlp(builder, block.mlp, parts, middle.normed));
  return { hidden: middle.hidden, branch };
}

/** A norm over the last axis. */
export function renderNorm(builder: GraphBuilder, parts: Pick<BlockParts, 'tensor'>, norm: NormDescription, x: Value): Value {
  return builder.rootScope(norm.name, () => {
    const weight = parts.tensor(`${norm.name}.weight`, [norm.features]);
    if (norm.kind === 'rms') return builder.simplifiedLayerNorm(x, weight, norm.epsilon);
    return builder.layerNorm(x, weight, parts.tensor(`${norm.name}.bias`, [norm.features]), norm.epsilon);
  });
}

/** The residual addition and the norm of its sum. */
export function addAndNorm(
  builder: GraphBuilder,
  parts: Pick<BlockParts, 'tensor'>,
  { hidden, branch }: Residual,
  norm: NormDescription,
): { readonly hidden: Value; readonly normed: Value } {
  if (norm.kind === 'layer') {
    const sum = builder.rootScope(norm.name, () => builder.add(hidden, branch));
    return { hidden: sum, normed: renderNorm(builder, parts, norm, sum) };
  }
  const { sum, normed } = builder.rootScope(norm.name, () =>
    builder.skipSimplifiedLayerNorm(hidden, branch, parts.tensor(`${norm.name}.weight`, [norm.features]), norm.epsilon),
  );
  return { hidden: sum, normed };
}

function renderAttention(builder: GraphBuilder, shape: ModelShape, block: BlockDescription, parts: BlockParts, x: Value): Value {
  const { projections, headNorms, output }: AttentionDescription = block.attention;
  const { headCount, kvHeadCount, headDim } = shape;
  let q: Value;
  let k: Value;
  let v: Value;
  if ('fused' in projections) {
    const widths = [headCount, kvHeadCount, kvHeadCount].map((heads) => heads * headDim);
    [q, k, v] = builder.split(applySite(parts, projections.fused, x), widths, -1);
  } else {
    q = applySite(parts, projections.q, x);
    k = applySite(parts, projections.k, x);
    v = applySite(parts, projections.v, x);
  }
  if (headNorms) {
    q = normHeads(builder, parts, headNorms.q, q);
    k = normHeads(builder, parts, headNorms.k, k);
  }
  return applySite(parts, output, parts.attend(block, q, k, v));
}

function renderMlp(builder: GraphBuilder, mlp: MlpDescription, parts: BlockParts, x: Value): Value {
  const { gate, up, down, activation } = mlp;
  const bent = activate(builder, activation, applySite(parts, gate ?? up, x));
  return applySite(parts, down, gate ? builder.mul(bent, applySite(parts, up, x)) : bent);
}

function applySite(parts: BlockParts, site: LinearSite, x: Value): Value {
  parts.observe?.(site.input, x);
  return parts.linear(site, x);
}

/** Norms each head by itself: the last axis is cut into heads and put together again. */
function normHeads(builder: GraphBuilder, parts: BlockParts, norm: NormDescription, x: Value): Value {
  const [batch, sequence, features] = x.shape;
  const heads = builder.reshape(x, [batch, sequence, Number(features) / norm.features, norm.features]);
  return builder.reshape(renderNorm(builder, parts, norm, heads), x.shape);
}

function activate(builder: GraphBuilder, activation: Activation, x: Value): Value {
  switch (activation) {
    case 'silu':
      return builder.silu(x);
    case 'gelu':
      return builder.gelu(x);
    case 'gelu-tanh':
      return builder.gelu(x, 'tanh');
    case 'relu':
      return builder.relu(x);
    default:
      return activation satisfies never;
  }
}
