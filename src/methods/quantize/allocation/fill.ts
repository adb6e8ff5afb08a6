/**
 * Spends what hull segments leave over. The first segment that did not fit sets how far they may move, up and down, from where they stand;
 * among all such moves the best total within the room is found by the same dynamic programme as a layer's frontier.
 */
import { type Choice, type Position, pointsAt, type SetHull } from './hull.ts';
import { follow, lastWithin, type ParetoProblem, paretoFront, type Trail } from './pareto.ts';

/** Options of all sets together, and labels of the search over them: what bounds its time. */
const OPTIONS = 1 << 13;
const LABELS = 1 << 23;

/** Somewhere else a set may go. Size and loss are relative to where it stands. */
interface Move {
  readonly size: number;
  readonly loss: number;
  position(): Position;
}

/**
 * Better positions, or the given ones where none is found.
 * @param vertices where each set stands on its hull, and `positions` the same as points of frontiers
 * @param window no set, and no total on the way, moves by more bits than this. The moves looked at do not depend on `room`, so that more
 *   room is never worse.
 * @param room bits that may be added in total
 */
export function fillRoom(
  hulls: readonly SetHull[],
  vertices: readonly number[],
  positions: Position[],
  window: number,
  room: number,
): Position[] {
  const most = Math.max(32, Math.floor(OPTIONS / hulls.length));
  const moves = hulls.map((hull, i) => [
    { size: 0, loss: 0, position: () => positions[i] },
    ...movesOf(hull, vertices[i], window, most),
  ]);
  const count = moves.reduce((total, { length }) => total + length, 0);
  const problem: ParetoProblem = {
    stages: moves.map((options) => ({ sizes: options.map(({ size }) => size), costs: options.map(({ loss }) => loss) })),
    monotone: false,
    maxLabels: Math.max(64, Math.floor(LABELS / count)),
    band: window,
  };
  const trail: Trail = [];
  const { sizes, costs } = paretoFront(problem, trail);
  const index = lastWithin(sizes, room);
  if (index < 0 || !(costs[index] < 0)) return positions;
  return follow(problem, trail, index).map((option, i) => moves[i][option].position());
}

/** What lies within the window of where a set stands, in any of its choices. */
function movesOf({ set, choices, vertices }: SetHull, at: number, window: number, most: number): Move[] {
  const here = vertices[at];
  return set.choices.flatMap((choice, index) => {
    const hull = choices[index];
    const near = Math.max(0, lastWithin(hull.sizes, here.size));
    const size = hull.sizes[near] - here.size;
    if (Math.abs(size) > window) return [];
    const loss = hull.losses[near] - here.loss;
    return neighbours(choice, pointsAt(choice, hull, near), window, most)
      .filter((move) => Math.abs(size + move.size) <= window)
      .map((move) => ({
        size: size + move.size,
        loss: loss + move.loss,
        position: () => ({ choice: index, points: move.points() }),
      }));
  });
}

/** The Pareto front of a choice around given points of its members; sizes and losses relative to them. */
function neighbours({ members }: Choice, points: readonly number[], window: number, maxLabels: number) {
  const firsts: number[] = [];
  const stages = members.map(({ frontier: { sizes, costs }, omega }, i) => {
    const base = points[i];
    const first = lastWithin(sizes, sizes[base] - window - 1) + 1;
    const end = lastWithin(sizes, sizes[base] + window) + 1;
    firsts.push(first);
    return {
      sizes: sizes.subarray(first, end).map((size) => size - sizes[base]),
      costs: costs.subarray(first, end).map((cost) => omega * (cost - costs[base])),
    };
  });
  const problem: ParetoProblem = { stages, monotone: false, maxLabels, band: window };
  const trail: Trail = [];
  const { sizes, costs } = paretoFront(problem, trail);
  return Array.from(sizes, (size, index) => ({
    size,
    loss: costs[index],
    points: () => follow(problem, trail, index).map((option, i) => firsts[i] + option),
  }));
}
