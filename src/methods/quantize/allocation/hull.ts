/** Lower convex hulls of trade-offs: of one choice, of sets of choices, and the steps down them in order of gain per bit. */
import type { Frontier } from './frontier.ts';

/** One layer in a choice. */
export interface Member {
  readonly name: string;
  readonly frontier: Frontier;
  /** What one unit of this layer's predicted loss costs the model, at least 0. A handicap on a choice is a factor on its members' omegas. */
  readonly omega: number;
}

/** One way to treat a set: for example a transform or a group size. Members then choose their widths on their own. */
export interface Choice {
  readonly label: string;
  /** Paid once for the set: a permutation, signs. Whole bits in the unit of the frontiers' sizes. */
  readonly fixedBits: number;
  readonly members: readonly Member[];
}

/** Layers that must choose together, since they share one input. The same members in every choice; on a tie the first choice wins. */
export interface ChoiceSet {
  readonly name: string;
  readonly choices: readonly Choice[];
}

/** The hull of one choice: vertex v is reached from every member's smallest point by the first v steps. */
export interface ChoiceHull {
  readonly sizes: readonly number[];
  readonly losses: readonly number[];
  /** Which member moves to which point of its frontier. */
  readonly steps: readonly { readonly member: number; readonly point: number }[];
}

/** A vertex of the hull of a set. */
export interface Vertex {
  /** Index of the choice, and of the vertex in its hull. */
  readonly choice: number;
  readonly vertex: number;
  readonly size: number;
  readonly loss: number;
}

export interface SetHull {
  readonly set: ChoiceSet;
  readonly choices: readonly ChoiceHull[];
  /** Size rising, loss falling by less and less per bit. */
  readonly vertices: readonly Vertex[];
}

/** A step from vertex `to - 1` of a set's hull to vertex `to`. */
export interface Segment {
  readonly set: number;
  readonly to: number;
  readonly size: number;
  readonly gain: number;
}

/** Which choice a set takes, and the frontier point of each of its members. */
export interface Position {
  readonly choice: number;
  readonly points: readonly number[];
}

/** Indices of the points on the lower convex hull, from the smallest to the cheapest. Sizes must not fall. */
export function lowerHull(sizes: ArrayLike<number>, losses: ArrayLike<number>): number[] {
  const hull: number[] = [];
  for (let i = 0; i < sizes.length; i++) {
    if (hull.length > 0 && losses[i] >= losses[hull[hull.length - 1]]) continue;
    while (hull.length > 0) {
      const top = hull[hull.length - 1];
      const below = hull[hull.length - 2];
      const slope = (a: number, b: number) => (losses[a] - losses[b]) / (sizes[b] - sizes[a]);
      const dominated = sizes[top] === sizes[i];
      if (!dominated && (below === undefined || slope(below, top) > slope(top, i))) break;
      hull.pop();
    }
    hull.push(i);
  }
  return hull;
}

/** The hull of a set: of all its choices together. Throws RangeError unless omegas and fixed bits are numbers that make sense. */
export function setHull(set: ChoiceSet): SetHull {
  const choices = set.choices.map((choice) => choiceHull(set, choice));
  const all = choices.flatMap(({ sizes, losses }, choice) =>
    sizes.map((size, vertex): Vertex => ({ choice, vertex, size, loss: losses[vertex] })),
  );
  if (all.length === 0) throw new RangeError(`${set.name} has no choice.`);
  all.sort((a, b) => a.size - b.size || a.loss - b.loss || a.choice - b.choice);
  const indices = lowerHull(
    all.map(({ size }) => size),
    all.map(({ loss }) => loss),
  );
  return { set, choices, vertices: indices.map((i) => all[i]) };
}

/** All segments of all hulls, most gain per bit first; those of one set stay in their order. */
export function segmentsByGain(hulls: readonly SetHull[]): Segment[] {
  const segments = hulls.flatMap(({ vertices }, set) =>
    vertices.slice(1).map(({ size, loss }, i): Segment => {
      const before = vertices[i];
      return { set, to: i + 1, size: size - before.size, gain: before.loss - loss };
    }),
  );
  return segments.sort((a, b) => b.gain / b.size - a.gain / a.size || a.set - b.set || a.to - b.to);
}

/** The frontier point of every member at a vertex of a choice's hull. */
export function pointsAt(choice: Choice, hull: ChoiceHull, vertex: number): number[] {
  const points = new Array<number>(choice.members.length).fill(0);
  for (let i = 0; i < vertex; i++) points[hull.steps[i].member] = hull.steps[i].point;
  return points;
}

/** The hull of a sum is the members' hull segments in order of gain per bit. */
function choiceHull(set: ChoiceSet, { label, fixedBits, members }: Choice): ChoiceHull {
  if (!Number.isSafeInteger(fixedBits) || fixedBits < 0) throw new RangeError(`${set.name}, ${label}: ${fixedBits} fixed bits.`);
  let size = fixedBits;
  let loss = 0;
  const segments = members.flatMap(({ name, frontier: { sizes, costs }, omega }, member) => {
    if (!(omega >= 0 && omega < Infinity)) throw new RangeError(`${name}: an omega of ${omega}.`);
    size += sizes[0];
    loss += omega * costs[0];
    const hull = lowerHull(
      sizes,
      costs.map((cost) => omega * cost),
    );
    return hull.slice(1).map((point, i) => {
      const extra = sizes[point] - sizes[hull[i]];
      const gain = omega * (costs[hull[i]] - costs[point]);
      return { member, point, size: extra, gain };
    });
  });
  segments.sort((a, b) => b.gain / b.size - a.gain / a.size || a.member - b.member || a.point - b.point);
  const sizes = [size];
  const losses = [loss];
  for (const segment of segments) {
    size += segment.size;
    loss -= segment.gain;
    sizes.push(size);
    losses.push(loss);
  }
  return { sizes, losses, steps: segments };
}
