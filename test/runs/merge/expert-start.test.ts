/** The search of a start's scale. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { valley } from '../../../src/runs/merge/experts/start.ts';

/** Falls to its least value, then rises. */
const oneValley = fc
  .record({
    down: fc.array(fc.integer({ min: 1, max: 9 }), { maxLength: 8 }),
    up: fc.array(fc.integer({ min: 1, max: 9 }), { maxLength: 8 }),
  })
  .map(({ down, up }) => {
    const sums = (steps: readonly number[]) => steps.map((_, i) => steps.slice(0, i + 1).reduce((sum, step) => sum + step, 0));
    return [...sums(down).reverse(), 0, ...sums(up)];
  });

it('finds the least of values with one valley from any place, and asks for each of them once at most', async () => {
  await fc.assert(
    fc.asyncProperty(oneValley, fc.nat(), async (values, place) => {
      const asked: number[] = [];
      const at = async (index: number): Promise<number> => {
        asked.push(index);
        return values[index];
      };
      expect(await valley(values.length, place % values.length, at)).toBe(values.indexOf(0));
      expect(new Set(asked).size).toBe(asked.length);
    }),
  );
});
