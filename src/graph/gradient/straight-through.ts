/** Steps whose derivative is not what calculus says: straight through a rounding, or none at all (gradients.md, section 4). */
import type { GraphBuilder, Value } from '../builder.ts';
import { only, scalarLike, unbroadcast, type Vjp } from './vjp.ts';

interface CustomRule {
  /** Names of the values that cotangents go to. */
  readonly inputs: readonly string[];
  readonly vjp: Vjp;
}

/** By the name of the first output of a node. */
export type CustomRules = ReadonlyMap<string, CustomRule>;

const RULES = new WeakMap<GraphBuilder, Map<string, CustomRule>>();

export function customRules(builder: GraphBuilder): CustomRules {
  return RULES.get(builder) ?? new Map();
}

/** Gives the node behind `value` a derivative of its own, by `inputs`. */
function derive(builder: GraphBuilder, value: Value, inputs: readonly Value[], vjp: Vjp): Value {
  const rules = RULES.get(builder) ?? new Map<string, CustomRule>();
  RULES.set(builder, rules);
  rules.set(value.name, { inputs: inputs.map(({ name }) => name), vjp });
  return value;
}

/** Rounds to the nearest whole number, halves to even; backward, the identity. */
export function roundStraight(builder: GraphBuilder, x: Value): Value {
  return derive(builder, builder.round(x), [x], (call) => [only(call)]);
}

/** The value, of which nothing is differentiated. */
export function stop(builder: GraphBuilder, x: Value): Value {
  return derive(builder, builder.node1('Identity', [x], x), [], () => []);
}

/** `min(max(x, low), high)` with bounds that are tensors: each gets the cotangents of what it cut off; a bound itself counts as inside. */
export function clip(builder: GraphBuilder, x: Value, low: Value, high: Value): Value {
  return derive(builder, builder.min(builder.max(x, low), high), [x, low, high], (call) => {
    const g = only(call);
    const zero = scalarLike(builder, g, 0);
    const [below, above] = [builder.less(x, low), builder.less(high, x)];
    const inside = builder.where(below, zero, builder.where(above, zero, g));
    return [
      unbroadcast(builder, inside, x),
      unbroadcast(builder, builder.where(below, g, zero), low),
      unbroadcast(builder, builder.where(above, g, zero), high),
    ];
  });
}
