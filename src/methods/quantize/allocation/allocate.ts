/** One budget over all layers: descend every hull in order of gain per bit, then spend what is left (slim-llm 5.6). */
import { fillRoom } from './fill.ts';
import { BudgetError, type LayerPlan, solveWithin } from './frontier.ts';
import { type ChoiceSet, type Position, pointsAt, type Segment, type SetHull, segmentsByGain, setHull } from './hull.ts';

/** How far a set may move to use up what is left, in sizes of the first segment that did not fit: 2 found more optima than 1, 3 few more. */
const WINDOW = 2;

/** What one layer of a set was given. */
export interface MemberPlan extends LayerPlan {
  readonly name: string;
  /** Of its branch, which `size` does not count; 0: none. */
  readonly rank: number;
}

/** What a set was given. */
export interface SetPlan {
  readonly name: string;
  /** Label of the choice taken. */
  readonly label: string;
  readonly fixedBits: number;
  /** Fixed bits and members together, branches included. */
  readonly size: number;
  /** In the order of the choice. */
  readonly members: readonly MemberPlan[];
}

/** How a budget is spent. */
export interface Allocation {
  /** Bits used, never above the budget. */
  readonly size: number;
  /** Sum of omega times predicted loss. */
  readonly loss: number;
  /** No plan within the budget can have a loss below this: the linear relaxation's. `loss - bound` is at most the gain of one segment. */
  readonly bound: number;
  /** Smallest reachable total. */
  readonly least: number;
  /** Total beyond which nothing is gained; a larger budget is not used up. */
  readonly most: number;
  /** In the order given. */
  readonly sets: readonly SetPlan[];
}

/** A total size and the least sum of losses for it. */
export interface CurvePoint {
  readonly size: number;
  readonly loss: number;
}

/**
 * Least sum of losses within `budget` bits, up to one segment of the hulls. A larger budget never gives a larger loss.
 * Throws BudgetError when even the smallest plan exceeds the budget.
 */
export function allocate(sets: readonly ChoiceSet[], budget: number): Allocation {
  const hulls = sets.map(setHull);
  const segments = segmentsByGain(hulls);
  const start = startOf(hulls);
  const most = segments.reduce((total, { size }) => total + size, start.size);
  if (!(budget >= start.size)) throw new BudgetError(budget, start.size, most);
  const vertices = hulls.map(() => 0);
  let { size, loss } = start;
  let blocked: Segment | undefined;
  for (const segment of segments) {
    if (size + segment.size > budget) {
      blocked = segment;
      break;
    }
    vertices[segment.set] = segment.to;
    size += segment.size;
    loss -= segment.gain;
  }
  const room = budget - size;
  let positions = hulls.map((hull, i) => positionAt(hull, vertices[i]));
  if (blocked) positions = fillRoom(hulls, vertices, positions, WINDOW * blocked.size, room);
  const plans = sets.map((set, i) => planOf(set, positions[i]));
  return {
    size: plans.reduce((total, plan) => total + plan.size, 0),
    loss: sets.reduce((total, set, i) => total + lossOf(set, positions[i]), 0),
    bound: blocked ? loss - (blocked.gain * room) / blocked.size : loss,
    least: start.size,
    most,
    sets: plans,
  };
}

/**
 * The vertices of the hull of the whole model, from the smallest plan to the best: a rate-distortion curve on which a caller can search
 * with few real evaluations. `allocate(sets, size)` gives the plan of a point.
 */
export function lossCurve(sets: readonly ChoiceSet[]): CurvePoint[] {
  const hulls = sets.map(setHull);
  let point = startOf(hulls);
  const curve = [point];
  for (const { size, gain } of segmentsByGain(hulls)) {
    point = { size: point.size + size, loss: point.loss - gain };
    curve.push(point);
  }
  return curve;
}

function startOf(hulls: readonly SetHull[]): CurvePoint {
  let size = 0;
  let loss = 0;
  for (const { vertices } of hulls) {
    size += vertices[0].size;
    loss += vertices[0].loss;
  }
  return { size, loss };
}

function positionAt({ set, choices, vertices }: SetHull, index: number): Position {
  const { choice, vertex } = vertices[index];
  return { choice, points: pointsAt(set.choices[choice], choices[choice], vertex) };
}

function planOf({ name, choices }: ChoiceSet, { choice, points }: Position): SetPlan {
  const { label, fixedBits, members } = choices[choice];
  const plans = members.map(({ name, frontier: { layer, sizes, branches } }, i) => {
    const { codeSize, rank } = branches?.[points[i]] ?? { codeSize: sizes[points[i]], rank: 0 };
    return { name, rank, ...solveWithin(layer, codeSize) };
  });
  const size = members.reduce((total, { frontier }, i) => total + frontier.sizes[points[i]], fixedBits);
  return { name, label, fixedBits, size, members: plans };
}

function lossOf({ choices }: ChoiceSet, { choice, points }: Position): number {
  const { members } = choices[choice];
  return members.reduce((total, { frontier, omega }, i) => total + omega * frontier.costs[points[i]], 0);
}
