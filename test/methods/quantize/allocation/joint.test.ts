/** Ranks and widths from one budget, against all combinations. */
import { describe, expect, test } from 'vitest';
import { Random } from '../../../../src/compute/random.ts';
import { allocate } from '../../../../src/methods/quantize/allocation/allocate.ts';
import { frontier } from '../../../../src/methods/quantize/allocation/frontier.ts';
import { withRanks } from '../../../../src/methods/quantize/allocation/joint.ts';

const WIDTHS = [2, 3, 4];

/** A layer of one group: `spectrum` at 2 bits, a quarter of it a bit more; a bit is as large as `bit` ranks. */
function layerOf(name: string, spectrum: readonly number[], bit: number) {
  const total = spectrum.reduce((sum, value) => sum + value, 0);
  const codes = frontier({
    widths: WIDTHS,
    costs: [WIDTHS.map((width) => total * 4 ** (2 - width))],
    sizes: [WIDTHS.map((width) => bit * width)],
    monotone: false,
  });
  const left = [1];
  for (const value of spectrum) left.push(left[left.length - 1] - value / total);
  return { name, frontier: withRanks(codes, { left, rankSize: 1 }), omega: 1 };
}

function solve(layers: readonly ReturnType<typeof layerOf>[], budget: number) {
  const sets = layers.map((member) => ({ name: member.name, choices: [{ label: 'none', fixedBits: 0, members: [member] }] }));
  return allocate(sets, budget);
}

function bruteForce(spectra: readonly (readonly number[])[], bit: number, budget: number): number {
  let best = Infinity;
  const visit = (index: number, spent: number, loss: number): void => {
    if (spent > budget) return;
    if (index === spectra.length) {
      best = Math.min(best, loss);
      return;
    }
    for (const width of WIDTHS) {
      for (let rank = 0; rank <= spectra[index].length; rank++) {
        const rest = spectra[index].slice(rank).reduce((sum, value) => sum + value, 0);
        visit(index + 1, spent + bit * width + rank, loss + rest * 4 ** (2 - width));
      }
    }
  };
  visit(0, 0, 0);
  return best;
}

describe('one budget for ranks and widths', () => {
  const a = [40, 20, 10, 5, 4, 3, 2, 1];
  const b = [6, 6, 5, 5, 5, 5, 4, 4];

  test('gives ranks to the layer whose error is of low rank, and a bit to the other (adapters.md, vector 6)', () => {
    const { sets, loss, size } = solve([layerOf('a', a, 4), layerOf('b', b, 4)], 16 + 9);
    expect(sets.map(({ members }) => [members[0].bits, members[0].rank])).toEqual([
      [[2], 5],
      [[3], 0],
    ]);
    expect(loss).toBeCloseTo(16, 9);
    expect(size).toBe(25);
  });

  test.each([
    [4, 49, 50],
    [6, 35, 43],
  ])('with room for %i ranks loses between the optimum %i and the greedy %i', (room, optimum, greedy) => {
    const { loss } = solve([layerOf('a', a, 4), layerOf('b', b, 4)], 16 + room);
    expect(bruteForce([a, b], 4, 16 + room)).toBe(optimum);
    expect(loss).toBeGreaterThanOrEqual(optimum - 1e-9);
    expect(loss).toBeLessThanOrEqual(greedy + 1e-9);
  });

  test('is never exceeded, loses no less than the optimum, and little more', () => {
    const random = new Random(3, 'joint');
    let lost = 0;
    let optimal = 0;
    for (let round = 0; round < 60; round++) {
      const spectra = Array.from({ length: 3 }, () =>
        Array.from({ length: 6 }, () => 100 * random.nextFloat() ** 3 + 0.1).sort((x, y) => y - x),
      );
      const budget = 3 * 2 * 5 + Math.floor(random.nextFloat() * 30);
      const { loss, size, bound } = solve(
        spectra.map((spectrum, i) => layerOf(`layer ${i}`, spectrum, 5)),
        budget,
      );
      const best = bruteForce(spectra, 5, budget);
      expect(size).toBeLessThanOrEqual(budget);
      expect(loss).toBeGreaterThanOrEqual(best - 1e-9);
      expect(bound).toBeLessThanOrEqual(best + 1e-9);
      lost += loss;
      optimal += best;
    }
    expect(lost / optimal).toBeLessThan(1.02);
  });
});
