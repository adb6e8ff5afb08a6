/** The corners of merging.md 2.4, 4 and 4.4, and the fast loops beside slow twins. */
import { describe, expect, test } from 'vitest';
import { RecipeError } from '../../../src/errors.ts';
import { mergerOf } from '../../../src/methods/merge/index.ts';
import { resolveParameters } from '../../../src/methods/merge/parameters.ts';
import { fillUniform, randomKey } from '../../../src/methods/merge/random-mask.ts';
import { randomSource, randomValues } from '../../support/random.ts';
import { BASE, merged, ONE, THREE, TWO } from './support.ts';

const COMPAT = { compat: 'mergekit' } as const;

describe('random masks', () => {
  test('have the key and the words of the specification, wherever a stretch begins', () => {
    const key = randomKey(42, 'model.layers.0.mlp.up_proj.weight', 'math');
    expect([...key]).toEqual([0xef4af86d, 0x0ce353ec]);
    const words = [0x3db88f3b, 0xa3163490, 0xc71515b8, 0x347db5f8, 0x0f8d94a6, 0x81ac18f3, 0xf3f9a2f9, 0xb7ec376a];
    for (let at = 0; at < 8; at++) {
      const out = new Uint32Array(8 - at);
      fillUniform(key, at, out);
      expect([...out]).toEqual(words.slice(at).map((word) => word >>> 8));
    }
  });
});

describe('selection', () => {
  test('takes exactly the elements a full sort would, the first of equals first', async () => {
    const n = 5000;
    const delta = Array.from(randomValues(randomSource(7), n), (x) => Math.round(x * 40) / 64);
    const order = delta.map((_, i) => i).sort((a, b) => Math.abs(delta[b]) - Math.abs(delta[a]) || a - b);
    for (const [density, gamma] of [
      [0.3, 0],
      [0.25, 0.1],
      [0.95, 0.2],
    ]) {
      const keep = Math.floor(density * n);
      const drop = Math.min(Math.floor(gamma * n), n - keep);
      const kept = new Set(order.slice(drop, drop + keep));
      const given = { base: delta.map(() => 0), experts: [delta], shape: [50, 100], parameters: { density, gamma } };
      const { values } = await merged('breadcrumbs', { ...given, rows: 7 });
      expect(values).toEqual(delta.map((x, i) => (kept.has(i) ? x + 0 : 0)));
    }
  });

  test('keeps one element at least in ties', async () => {
    const { values } = await merged('ties', { base: BASE, experts: [ONE], parameters: { density: 0.01 } });
    expect(values).toEqual([1, -2, 0.5, 0, 2, -1]);
  });
});

describe('compatibility with mergekit', () => {
  test('sce weighs small task vectors equally; otherwise their scale does not matter', async () => {
    const experts = [ONE, TWO, THREE].map((expert) => expert.map((x, i) => (x - BASE[i]) * 1e-4));
    const given = { base: BASE.map(() => 0), experts };
    expect((await merged('sce', given)).values[5]).toBeCloseTo(-0.773333e-4, 9);
    expect((await merged('sce', { ...given, context: COMPAT })).values[5]).toBeCloseTo(-0.75e-4, 9);
  });

  test('model-stock steps away from experts more than a right angle apart; otherwise it keeps the base and says so', async () => {
    const given = { base: BASE, experts: [TWO, THREE] };
    expect((await merged('model-stock', given)).notes).toEqual([expect.stringContaining('-0.118')]);
    const { values, notes } = await merged('model-stock', { ...given, context: COMPAT });
    expect(values[1]).toBeLessThan(-2);
    expect(notes).toEqual([]);
  });

  test('slerp from a zero vector takes a sine for its share; otherwise a straight line', async () => {
    const given = { base: BASE.map(() => 0), experts: [ONE], parameters: { t: 0.5 } };
    expect((await merged('slerp', given)).values[0]).toBe(0.75);
    expect((await merged('slerp', { ...given, context: COMPAT })).values[0]).toBeCloseTo(1.5 * Math.SQRT1_2, 6);
  });
});

describe('values that are wrong together', () => {
  test.each([
    ['linear', { weight: [1, -1] }, /weight 1,-1/],
    ['della', { density: 0.1 }, /density 0.1 with epsilon 0.15/],
    ['fisher', { scale: 0 }, /scale 0,0/],
  ])('%s refuses %j', async (method, parameters, message) => {
    await expect(merged(method, { base: BASE, experts: [ONE, TWO], parameters })).rejects.toThrow(message);
  });
});

test('a value for one expert wins over the shared one, and preset paper over the default', () => {
  const raw = { shared: { density: '0.5' }, byExpert: { b: { density: 0.25 } } };
  expect(resolveParameters(mergerOf('dare_ties'), raw, ['a', 'b'], 'paper')).toMatchObject({
    density: [0.5, 0.25],
    weight: [1, 1],
    rescale: 'inverse',
  });
  expect(() => mergerOf('nonsense')).toThrow(RecipeError);
});

describe('regmean', () => {
  test('singular Gram matrices, rounded to float32, get a larger ridge, and a note', async () => {
    const n = 192;
    // A few inputs far stronger than the others, and always together: what float32 loses of them is more than the least ridge.
    const strong = randomValues(randomSource(3), n).map((value, i) => value * (i < 6 ? 1 : 1e-4));
    const gram = Array.from({ length: n * n }, (_, i) => strong[Math.floor(i / n)] * strong[i % n]);
    const zeros = new Array<number>(2 * n).fill(0);
    const experts = [5, 6].map((seed) => Array.from(randomValues(randomSource(seed), 2 * n)));
    const given = { base: zeros, experts, statistics: [gram, gram], shape: [2, n], parameters: { reduce: 1 } };
    const { values, notes } = await merged('regmean', given);
    expect(notes).toEqual([expect.stringMatching(/Gram matrices of its inputs are singular; 0\.0*1 of their mean diagonal/)]);
    // Equal Gram matrices, whatever the ridge: the mean.
    values.forEach((value, i) => {
      expect(value).toBeCloseTo((experts[0][i] + experts[1][i]) / 2, 4);
    });
  });
});

describe('iso-cts', () => {
  test('three experts share what no three can share evenly, and have nothing in common', async () => {
    // 8 directions are 3 each, rounded: one more than there are.
    const shape = [8, 8];
    const experts = [1, 2, 3].map((seed) => Array.from(randomValues(randomSource(seed), 64)));
    const given = { base: new Array<number>(64).fill(0), experts, shape, parameters: { common: 0 } };
    const { values } = await merged('iso-cts', given);
    expect(values.every(Number.isFinite)).toBe(true);
    expect(values.some((value) => value !== 0)).toBe(true);
  });
});
