/** Low-rank experts beside a linear layer, and the router that weighs them token by token (adapters.md 8.5 and 9.4). */
import type { GraphBuilder, Value } from './builder.ts';
import { scalarLike } from './gradient/vjp.ts';

/** How many experts a layer has, and how a token is shared among them. */
export interface RoutedShape {
  /** `topk`: a softmax over the largest logits, the other experts are left out (MoLA, arXiv 2402.08562). `soft`: over all of them (TMoE, arXiv 2503.18338). */
  readonly routing: 'topk' | 'soft';
  /** N */
  readonly experts: number;
  /** Experts that a token goes through; all of them under `soft`. */
  readonly topK: number;
  /** r, of each expert. */
  readonly rank: number;
  /** One A for all experts. */
  readonly sharedA: boolean;
  /** One more B, on the shared A, that every token goes through at full weight. */
  readonly sharedExpert: boolean;
}

/** What a routed branch is computed from, by the names that its tensors have beside those of the layer. */
export const ROUTED_TENSORS = ['router', 'expertsA', 'expertsB'] as const;
export type RoutedTensor = (typeof ROUTED_TENSORS)[number];

/** Shapes of the tensors beside a layer of n inputs and m outputs: router (N, n), A (r or N r, n), B (m, N r, or r more); expert j has rows and columns j r and on. */
export function routedSizes(
  { experts, rank, sharedA, sharedExpert }: RoutedShape,
  { inFeatures: n, outFeatures: m }: { readonly inFeatures: number; readonly outFeatures: number },
): Readonly<Record<RoutedTensor, readonly [number, number]>> {
  return {
    router: [experts, n],
    expertsA: [sharedA ? rank : experts * rank, n],
    expertsB: [m, (experts + (sharedExpert ? 1 : 0)) * rank],
  };
}

/** Numbers of the branch beside a layer. */
export function routedParameters(
  shape: RoutedShape,
  layer: { readonly inFeatures: number; readonly outFeatures: number },
): number {
  return Object.values(routedSizes(shape, layer)).reduce((sum, [rows, columns]) => sum + rows * columns, 0);
}

/** The branch's output, and what the router made of each token. */
export interface RoutedBranch {
  /** `sum_j w_j B_j A_j x`, (batch, sequence, m) */
  readonly output: Value;
  readonly logits: Value;
  /** w, like the logits. */
  readonly gate: Value;
  /** 1 for the experts that a token goes through, else 0, like the logits; absent where it goes through all. */
  readonly picks?: Value;
}

/** @param x (batch, sequence, n) */
export function routedBranch(
  builder: GraphBuilder,
  x: Value,
  { routing, experts, topK, rank, sharedA, sharedExpert }: RoutedShape,
  { router, expertsA, expertsB }: Readonly<Record<RoutedTensor, Value>>,
): RoutedBranch {
  const turned = (weight: Value) => builder.transpose(weight, [1, 0]);
  const [batch, sequence] = x.shape;
  const logits = builder.matmul(x, turned(router));
  const down = builder.matmul(x, turned(expertsA));
  let gate: Value;
  let picks: Value | undefined;
  if (routing === 'soft' || topK >= experts) gate = builder.softmax(logits);
  else {
    const { values, indices } = builder.topK(logits, topK);
    const nothing = builder.expand(scalarLike(builder, logits, 0), builder.shapeOf(logits), logits.shape);
    gate = builder.scatterElements(nothing, indices, builder.softmax(values));
    const ones = builder.expand(scalarLike(builder, logits, 1), builder.shapeOf(values), values.shape);
    picks = builder.scatterElements(nothing, indices, ones);
  }
  const each = builder.reshape(down, [batch, sequence, sharedA ? 1 : experts, rank]);
  const weighed = builder.mul(each, builder.unsqueeze(gate, [3]));
  const routed = builder.reshape(weighed, [batch, sequence, experts * rank]);
  const all = sharedExpert ? builder.concat([routed, down], 2) : routed;
  return { output: builder.matmul(all, turned(expertsB)), logits, gate, ...(picks ? { picks } : {}) };
}

/**
 * `N sum_j f_j P_j`, (1): 1 where all experts of the routers get the same. f is the share of picks, P the mean of the softmax over all logits, both over all
 * tokens that count and all routers together; f counts as a constant (Fedus et al., arXiv 2101.03961, eq. 4 to 6).
 * @param routers of equally many experts @param counts 1 for tokens that count, 0 for pads, (batch, sequence, 1)
 */
export function balanceLoss(builder: GraphBuilder, routers: readonly Required<RoutedBranch>[], counts: Value): Value {
  const experts = Number(routers[0].logits.shape[2]);
  const overTokens = (values: readonly Value[]): Value =>
    values.map((value) => builder.reduceSum(builder.mul(value, counts), [0, 1])).reduce((all, one) => builder.add(all, one));
  const picked = overTokens(routers.map(({ picks }) => picks));
  const shares = builder.div(picked, builder.reduceSum(picked, [2]));
  const tokens = builder.mul(builder.reduceSum(counts, [0, 1]), scalarLike(builder, counts, routers.length));
  const means = builder.div(overTokens(routers.map(({ logits }) => builder.softmax(logits))), tokens);
  const loss = builder.mul(builder.reduceSum(builder.mul(shares, means), [0, 1, 2], false), scalarLike(builder, counts, experts));
  return builder.reshape(loss, [1]);
}
