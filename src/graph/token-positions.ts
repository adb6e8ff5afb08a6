/** Where the tokens of a call stand in their rows: derived once in the graph, from a mask or from lengths, and only if asked for. */
import type { Dim } from '../../formats/onnx/model.ts';
import type { GraphBuilder, Value } from './builder.ts';

export interface TokenPositions {
  /** Name of the length of the longest row, cache included. */
  readonly totalName: Dim;
  /** Index of each row's last real token, I32 (batch). */
  lastIndex(): Value;
  /** Length of the longest row, cache included, I32 scalar. */
  totalLength(): Value;
  /** Position of each token of this call in its row, I64 (batch or 1, sequence). */
  indices(): Value;
  /**
   * F32 (batch or 1, 1, sequence, total), to be added to scores: 0 where a token of this call may see a token of the row. To choose score by score would
   * take longer than their softmax, and as long again on the way back.
   */
  mask(window: number | undefined): Value;
}

/**
 * From `mask`, I64 (batch, total): 1 for a real token, 0 for a pad. The call's tokens, `ids` (batch, sequence), are the
 * last ones of each row. A token's position is the number of real tokens before it.
 */
export function positionsFromMask(builder: GraphBuilder, mask: Value, ids: Value): TokenPositions {
  const [, total] = mask.shape;
  const [batch, sequence] = ids.shape;
  const once = memoize(builder);
  const zero = () => builder.scalar('I64', 0);
  const firstColumn = once('first column', () => builder.sub(builder.shapeOf(mask, 1, 2), builder.shapeOf(ids, 1, 2)));
  const rowPositions = once('row positions', () =>
    // A pad before the first real token would stand at -1.
    builder.max(builder.sub(builder.cumSum(mask, 1), builder.scalar('I64', 1)), zero()),
  );
  const indices = once('indices', () => builder.slice(rowPositions(), firstColumn(), builder.shapeOf(mask, 1, 2), 1, sequence));
  return {
    totalName: total,
    lastIndex: once('last index', () =>
      builder.cast(builder.sub(builder.reduceSum(mask, [1], false), builder.scalar('I64', 1)), 'I32'),
    ),
    totalLength: once('total length', () => builder.cast(builder.dimOf(mask, 1), 'I32')),
    indices,
    mask: memoizeMasks(builder, once, (window) => {
      const columns = builder.range(builder.dimOf(mask, 1), total);
      const callColumns = builder.slice(columns, firstColumn(), builder.shapeOf(mask, 1, 2), 0, sequence);
      const causal = builder.lessOrEqual(builder.unsqueeze(columns, [0]), builder.unsqueeze(callColumns, [1]));
      const real = builder.less(zero(), mask);
      const seen = builder.and(builder.unsqueeze(causal, [0, 1]), builder.unsqueeze(real, [1, 2]));
      if (window === undefined) return seen;
      const near = withinWindow(builder, indices(), rowPositions(), window);
      return builder.assume(builder.and(seen, near), [batch, 1, sequence, total]);
    }),
  };
}

/**
 * From `lengths`, I32 (batch): the real tokens of right-padded rows that start here, as many columns as `hidden`
 * (batch, sequence, features) has. A pad sees what a token in its place would.
 */
export function positionsFromLengths(builder: GraphBuilder, lengths: Value, hidden: Value): TokenPositions {
  const [, sequence] = hidden.shape;
  const once = memoize(builder);
  const columns = once('columns', () => builder.unsqueeze(builder.range(builder.dimOf(hidden, 1), sequence), [0]));
  return {
    totalName: sequence,
    lastIndex: once('last index', () => builder.sub(lengths, builder.scalar('I32', 1))),
    totalLength: once('total length', () => builder.cast(builder.dimOf(hidden, 1), 'I32')),
    indices: columns,
    mask: memoizeMasks(builder, once, (window) => {
      // Pads are to the right, so causality alone hides them from every real token.
      const rows = builder.transpose(columns(), [1, 0]);
      const causal = builder.unsqueeze(builder.lessOrEqual(columns(), rows), [0, 1]);
      return window === undefined ? causal : builder.and(causal, withinWindow(builder, columns(), columns(), window));
    }),
  };
}

/**
 * From positions that are given: of the call's tokens, `queries` I64 (batch, sequence), and of everything in the cache, the call's tokens last,
 * `keys` I64 (batch, total); -1 is a hole. Rows of different lengths may grow side by side, with holes between.
 */
export function positionsFromSlots(builder: GraphBuilder, queries: Value, keys: Value): TokenPositions {
  const [batch, sequence] = queries.shape;
  const [, total] = keys.shape;
  const once = memoize(builder);
  const whole = (): never => {
    throw new Error('rows with holes have no last index that says which tokens are real');
  };
  return {
    totalName: total,
    lastIndex: whole,
    totalLength: whole,
    indices: () => queries,
    mask: memoizeMasks(builder, once, (window) => {
      const earlier = builder.lessOrEqual(builder.unsqueeze(keys, [1, 2]), builder.unsqueeze(queries, [1, 3]));
      const real = builder.lessOrEqual(builder.scalar('I64', 0), builder.unsqueeze(keys, [1, 2]));
      const seen = builder.and(earlier, real);
      const near = window === undefined ? seen : builder.and(seen, withinWindow(builder, queries, keys, window));
      return builder.assume(near, [batch, 1, sequence, total]);
    }),
  };
}

/** BOOL (batch, 1, queries, keys): position of the query - position of the key < window. */
function withinWindow(builder: GraphBuilder, queries: Value, keys: Value, window: number): Value {
  const distance = builder.sub(builder.unsqueeze(queries, [1, 3]), builder.unsqueeze(keys, [1, 2]));
  return builder.less(distance, builder.scalar('I64', window));
}

type Once = (key: string, make: () => Value) => () => Value;

/** Makes each value when it is first asked for, outside whatever scope asks. */
function memoize(builder: GraphBuilder): Once {
  const made = new Map<string, Value>();
  return (key, make) => () => {
    let value = made.get(key);
    if (value === undefined) {
      value = builder.rootScope('positions', make);
      made.set(key, value);
    }
    return value;
  };
}

/** Of pairs of tokens that must not meet. Finite, so that a row of nothing else still has a softmax. */
const MASKED = -1e9;

/** @param visible BOOL of the mask's shape: whether the two may meet */
function memoizeMasks(
  builder: GraphBuilder,
  once: Once,
  visible: (window: number | undefined) => Value,
): (window: number | undefined) => Value {
  const make = (window: number | undefined) =>
    builder.where(visible(window), builder.scalar('F32', 0), builder.scalar('F32', MASKED));
  return (window) => once(`mask ${window ?? 'all'}`, () => make(window))();
}
