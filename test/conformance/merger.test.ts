/** What holds for every merge method, from its declaration (merging.md 4.2). */
import { describe, expect, test } from 'vitest';
import { RecipeError, UnsupportedError } from '../../src/errors.ts';
import { MERGERS, mergerOf } from '../../src/methods/merge/index.ts';
import type { Merger } from '../../src/methods/merge/merger.ts';
import { resolveParameters } from '../../src/methods/merge/parameters.ts';
import { type MergeCase, merged } from '../methods/merge/support.ts';
import { randomSource, randomValues } from '../support/random.ts';

const TOLERANCE = 1e-6;

/** What a method must be given, and settings under which it leaves something out, where it can. */
function settings(merger: Merger): Record<string, unknown> {
  const given: Record<string, unknown> = {};
  for (const [name, parameter] of Object.entries(merger.parameters)) {
    if (parameter.type === 'number' && parameter.default === undefined) given[name] = 0.3;
    if (name === 'density' || name === 'select_topk') given[name] = 0.5;
  }
  return given;
}

/** Experts around a base, as many as the method takes up to three. `grid` puts many equal magnitudes among the task vectors. */
function random(
  merger: Merger,
  shape: readonly number[],
  seed = 1,
  grid = 0,
): MergeCase & { base: number[]; experts: number[][] } {
  const source = randomSource(seed);
  const n = shape.reduce((a, b) => a * b, 1);
  const onGrid = (x: number) => (grid ? Math.round(x / grid) * grid : x);
  const draw = (spread: number) => Array.from(randomValues(source, n, spread), onGrid);
  const base = draw(1);
  const count = Math.min(3, merger.experts.max ?? 3);
  const experts = Array.from({ length: count }, () => draw(0.5).map((delta, i) => Math.fround(base[i] + delta)));
  return asked(merger, { base, experts, shape });
}

function asked<T extends MergeCase>(merger: Merger, given: T): T {
  const information = () => given.experts.map((expert) => expert.map(Math.abs));
  const columns = given.shape?.length === 2 ? given.shape[1] : undefined;
  const grams = () =>
    columns && given.experts.map(([own]) => Array.from({ length: columns ** 2 }, (_, i) => gramEntry(columns, i, Math.abs(own))));
  const statistics = { fisher: information, gram: grams, none: () => undefined }[merger.statistics ?? 'none']();
  return { ...given, parameters: settings(merger), ...(statistics ? { statistics } : {}) };
}

/** Positive definite, another for every expert, and without a direction that only one of them sees. */
function gramEntry(columns: number, i: number, own: number): number {
  const [row, column] = [Math.floor(i / columns), i % columns];
  return row === column ? 1 + own + 0.1 * row : 0.3 / columns;
}

function expectClose(actual: readonly number[], expected: readonly number[]): void {
  expect(actual).toHaveLength(expected.length);
  for (const [i, value] of actual.entries()) expect(Math.abs(value - expected[i]), `element ${i}`).toBeLessThan(TOLERANCE);
}

/** Indices at which two lists differ by a bit; `toEqual` is slow on lists this long. */
function differing(actual: readonly number[], expected: readonly number[]): number[] {
  return Array.from(expected, (_, i) => i).filter((i) => !Object.is(actual[i], expected[i]));
}

describe.each(Object.entries<Merger>(MERGERS))('%s', (name, merger) => {
  test('goes by its name in the list, in either spelling, and says what it does in a line', () => {
    expect(merger.name).toBe(name);
    expect(mergerOf(name.replaceAll('-', '_'))).toBe(merger);
    expect(merger.formula).toMatch(/^.{5,160}$/);
    for (const parameter of Object.values(merger.parameters)) expect(parameter.summary).toMatch(/^.{5,160}$/);
  });

  test('keeps what all inputs agree on', async () => {
    const { base, experts, shape } = random(merger, [5, 7]);
    const { values } = await merged(name, asked(merger, { base, experts: experts.map(() => base), shape: shape! }));
    expectClose(values, base);
  });

  test.skipIf(merger.experts.max === 1)('gives the same whatever the order of the experts', async () => {
    const given = random(merger, [6, 9]);
    const labels = given.experts.map((_, k) => `expert ${k}`);
    const turned = asked(merger, { ...given, experts: given.experts.toReversed() });
    const { values } = await merged(name, { ...given, labels });
    expectClose((await merged(name, { ...turned, labels: labels.toReversed() })).values, values);
  });

  test.skipIf(merger.access === 'matrix')('gives the same bits wherever blocks end', async () => {
    for (const grid of [0, 0.125]) {
      const given = random(merger, [300, 257], 3, grid); // more elements than a span of the sums
      const { values } = await merged(name, given);
      for (const rows of [1, [2, 255, 1, 7]] as const)
        expect(differing((await merged(name, { ...given, rows })).values, values)).toEqual([]);
    }
  });

  test.each([[[7]], [[1]], [[]], [[1, 6]], [[6, 1]], [[2, 3, 4]]])(
    'gives finite numbers for shape %j, zeros included',
    async (shape) => {
      const given = random(merger, shape);
      const zeros = given.base.map(() => 0);
      const fewest = given.experts.slice(0, Math.max(1, merger.experts.min));
      const cases = [given, { ...given, experts: given.experts.map(() => zeros) }, { ...given, experts: fewest }];
      for (const one of [...cases, { ...given, base: zeros }]) {
        const { values } = await merged(name, asked(merger, one));
        expect(values).toHaveLength(zeros.length);
        expect(values.filter((value) => !Number.isFinite(value))).toEqual([]);
      }
    },
  );

  test.skipIf(!Object.hasOwn(merger.parameters, 'lambda')).each([[[5, 7]], [[7]]])(
    'moves from the base in proportion to lambda, shape %j: the search of it merges once',
    async (shape) => {
      const given = random(merger, shape);
      const at = async (lambda: number) =>
        (await merged(name, { ...given, parameters: { ...given.parameters!, lambda } })).values;
      const whole = await at(1);
      expect(differing(whole, given.base).length).toBeGreaterThan(0);
      for (const lambda of [0, 0.3, 1.3])
        expectClose(
          await at(lambda),
          given.base.map((value, i) => value + lambda * (whole[i] - value)),
        );
    },
  );

  test('refuses a number that is not finite, naming tensor, expert and place', async () => {
    const given = random(merger, [2, 3]);
    given.experts[0][4] = Number.NaN;
    await expect(merged(name, given)).rejects.toThrow(UnsupportedError);
    await expect(merged(name, given)).rejects.toThrow(/tensor "w": expert "a" holds NaN at flat index 4/);
  });

  test('refuses unknown parameters, missing ones and numbers out of range', () => {
    const resolve = (shared: Record<string, unknown>) => resolveParameters(merger, { shared }, ['a'], 'best');
    expect(() => resolve({ ...settings(merger), nonsense: 1 })).toThrow(RecipeError);
    for (const [key, parameter] of Object.entries(merger.parameters)) {
      const refused: unknown[] = ['nonsense', {}];
      if (parameter.type === 'number') {
        if (parameter.min !== undefined) refused.push(parameter.min - 1);
        if (parameter.above !== undefined) refused.push(parameter.above);
        if (parameter.max !== undefined) refused.push(parameter.max + 1);
        if (parameter.default === undefined) refused.push(undefined);
      }
      for (const value of refused) expect(() => resolve({ ...settings(merger), [key]: value }), `${key} ${value}`).toThrow(key);
    }
  });
});
