/** Every vector of merging.md 4.1 and fisher's of 5.1: what is asked, what comes out. */
import { describe, expect, test } from 'vitest';
import { mergerOf } from '../../../src/methods/merge/index.ts';
import { ALL, BASE, type MergeCase, merged, moved, ONE, THREE, TOLERANCE, TWO } from './support.ts';

const W = [0.5, 0.3, 0.2];
const HALF = { density: 0.5 };

/** With the base and all three experts, unless `given` says otherwise. */
const all = (parameters: MergeCase['parameters'] = {}, given: Partial<MergeCase> = {}): MergeCase => ({
  base: BASE,
  experts: ALL,
  parameters,
  ...given,
});
const one = (expert: readonly number[], parameters: MergeCase['parameters'] = {}): MergeCase => ({
  base: BASE,
  experts: [expert],
  parameters,
});
const bare = (experts: readonly (readonly number[])[], parameters: MergeCase['parameters'] = {}): MergeCase => ({
  experts,
  parameters,
});
const differences = ALL.map((expert) => expert.map((value, i) => value - BASE[i]));
const apart = [moved([0.5, 0, 0, 0, 0.25, 0]), moved([0, 0, -0.5, 0, 0.75, 0])];
const overlapping = [moved([0.5, 0.25, 0, 0, 0, 1]), moved([0, 0.75, 0, 0, 0, 0])];
const fisher = (
  parameters: NonNullable<MergeCase['parameters']>,
  statistics = [
    [0.4, 0, 0.1],
    [0.1, 0.2, 0],
  ],
): MergeCase => ({
  experts: [
    [1, 2, -1],
    [2, 0, 1],
  ],
  shape: [3],
  statistics,
  parameters,
});

const regmean = (
  reduce: number,
  grams = [
    [2, 0.5, 0.5, 1],
    [1, -0.5, -0.5, 3],
  ],
): MergeCase => ({
  base: [0, 0, 0, 0],
  experts: [
    [1, 0, 0, 2],
    [0, 1, 1, 1],
  ],
  shape: [2, 2],
  statistics: grams,
  parameters: { reduce },
});

const VECTORS: Record<string, [string, MergeCase, number[]][]> = {
  regmean: [
    ['all of the Gram matrices', regmean(1), [0.5, 0.875, 0.5, 1.125]],
    ['the usual part', regmean(0.6), [0.566667, 0.825, 0.433333, 1.175]],
    ['the diagonal alone', regmean(0), [0.666667, 0.75, 0.333333, 1.25]],
    [
      'an input that no text shows',
      regmean(0.6, [
        [2, 0, 0, 0],
        [1, 0, 0, 0],
      ]),
      [0.666667, 0.5, 0.333333, 1.5],
    ],
  ],
  linear: [
    ['weighted', bare(ALL, { weight: W }), [1.175, -1.825, 0.55, 0.725, 2.6, -1.45]],
    ['equal', bare(ALL), [1.083333, -1.75, 0.5, 0.75, 2.833333, -1.333333]],
    ['not normalized', bare(ALL, { weight: [2, -1, 0.5], normalize: false }), [2.75, -4.5, 0, 1.5, 2.75, -1.25]],
  ],
  slerp: [
    ['t .3', one(ONE, { t: 0.3 }), [1.168722, -2.107437, 0.507692, 0.230008, 2.739474, -1.168722]],
    ['t .5', one(TWO, { t: 0.5 }), [0.893589, -1.531867, 0.765933, 0.255311, 3.063733, -1.531867]],
    [
      'parallel',
      one(
        BASE.map((x) => 2 * x),
        { t: 0.25 },
      ),
      [1.25, -2.5, 0.625, 0, 3.75, -1.25],
    ],
  ],
  nuslerp: [
    ['weights', bare([ONE, TWO], { weight: [1, 3] }), [0.962786, -1.3487, 0.893802, 0.576872, 2.811378, -1.917576]],
    [
      'with base',
      { base: BASE, experts: [ONE, TWO], parameters: { weight: [1, 3] } },
      [0.952514, -1.214749, 0.935147, 0.690278, 2.659826, -2.040381],
    ],
    [
      'by row',
      bare([ONE, TWO], { weight: [1, 3], flatten: false }),
      [0.962478, -1.348259, 0.893574, 0.564008, 2.756445, -1.87947],
    ],
    [
      'by column',
      bare([ONE, TWO], { weight: [1, 3], flatten: false, row_wise: true }),
      [0.939043, -1.352546, 0.876497, 0.563377, 2.817886, -1.878389],
    ],
  ],
  multislerp: [
    ['weighted', bare(ALL, { weight: W }), [1.235458, -1.909927, 0.580503, 0.75191, 2.680472, -1.527203]],
    ['with base', all({ weight: W }), [1.280086, -1.771568, 0.540697, 1.128325, 2.399132, -1.636619]],
    ['the base thrice', all({}, { experts: [BASE, BASE, BASE] }), BASE],
  ],
  karcher: [
    ['three', bare(ALL), [1.142741, -1.832802, 0.536788, 0.778186, 2.933923, -1.420614]],
    ['two', bare([BASE, ONE]), [1.276943, -2.166289, 0.509272, 0.387596, 2.53884, -1.276943]],
    ['task vectors', bare(differences), [0.145855, 0.372786, -0.065682, 1.305247, -0.226028, -0.462213]],
  ],
  'task-arithmetic': [
    ['lambda .4', all({ lambda: 0.4 }), [1.1, -1.7, 0.5, 0.9, 2.8, -1.4]],
    ['weighted', all({ weight: W }), [1.175, -1.825, 0.55, 0.725, 2.6, -1.45]],
    ['lambda 2, normalized', all({ weight: W, lambda: 2, normalize: true }), [1.35, -1.65, 0.6, 1.45, 2.2, -1.9]],
  ],
  ties: [
    ['density .5', all(HALF), [1.5, -1, 1, 0.875, 2, -2]],
    ['density .5, weighted, lambda .8', all({ ...HALF, weight: W, lambda: 0.8 }), [1.4, -1.2, 0.9, 0.657143, 2.2, -1.8]],
    ['density 1', all({ density: 1 }), [1.5, -1, 1, 0.75, 2, -1.75]],
  ],
  'dare-linear': [
    ['l1', all(HALF), [0.535714, -2.375, 0.595238, 1.125, 2.333333, -2.02381]],
    ['inverse', all({ ...HALF, rescale: 'inverse' }), [0.5, -2.5, 0.5, 1.5, 2, -2]],
    ['paper', all(HALF, { preset: 'paper' }), [0.5, -2.5, 0.5, 1.5, 2, -2]],
  ],
  'dare-ties': [
    ['l1', all(HALF), [0.535714, -2.375, 1.428571, 1.125, 1.5, -2.857143]],
    ['inverse', all({ ...HALF, rescale: 'inverse' }), [0.5, -2.5, 1.5, 1.5, 1, -3]],
  ],
  'della-linear': [
    ['l1', all(HALF), [0.704545, -1.193182, 0.590909, 2.125, 2, -1.681818]],
    ['inverse', all({ ...HALF, rescale: 'inverse' }), [0.285714, -0.961538, 0.730769, 3.038462, 2.461538, -1.10989]],
  ],
  della: [
    ['l1', all(HALF), [0.704545, -0.818182, 1.090909, 1.0625, 1.5, -2.181818]],
    ['inverse', all({ ...HALF, rescale: 'inverse' }), [0.285714, -0.461538, 1.5, 1.519231, 1.461538, -2.538462]],
  ],
  breadcrumbs: [
    ['gamma .2', all({ ...HALF, gamma: 0.2 }), [1.5, -2, 0.5, 1.25, 3.5, -2]],
    ['gamma .2, one expert', one(ONE, { ...HALF, gamma: 0.2 }), [1.5, -2, 0.5, 0.75, 3, -1.5]],
    ['gamma .01, too small for an outlier', all({ ...HALF, gamma: 0.01 }), [1.5, -1, 0.5, 1.75, 2.5, -2]],
  ],
  'breadcrumbs-ties': [
    ['gamma .2', all({ ...HALF, gamma: 0.2 }), [1.5, -2, 1, 1.25, 3.5, -2.5]],
    ['gamma .01', all({ ...HALF, gamma: 0.01 }), [1.5, -1, 1, 1.75, 2, -2]],
  ],
  sce: [
    ['all', all(), [1.5, -1, 1, 0.718447, 2, -1.773333]],
    ['half', all({ select_topk: 0.5 }), [1, -1, 0.5, 0, 2, -1.801887]],
  ],
  'model-stock': [
    ['three', all(), [1.007534, -1.977397, 0.5, 0.06781, 2.984931, -1.030138]],
    ['two', all({}, { experts: [ONE, TWO] }), [1.044115, -1.867656, 0.58823, 0.220574, 2.823541, -1.264689]],
    ['two, by row', all({ filter_wise: true }, { experts: [ONE, TWO] }), [1, -2, 0.5, 0.45952, 2.632384, -1.551424]],
    ['more than a right angle apart', all({}, { experts: [TWO, THREE] }), BASE],
  ],
  nearswap: [
    ['t .4', one(ONE, { t: 0.4 }), [1.4, -2.25, 0.5, 0.4, 2.6, -1.4]],
    ['t .6', one(TWO, { t: 0.6 }), [0.75, -1.4, 1, 0.5, 3, -1.6]],
  ],
  'arcee-fusion': [
    ['one', one(ONE), [1, -2, 0.5, 0, 2, -1]],
    ['two', one(TWO), [1, -1, 1, 0, 3, -1]],
  ],
  ram: [
    ['three', all(), [1.125, -1.625, 0.5, 0.75, 2.75, -1.333333]],
    ['two', all({}, { experts: apart }), [1.5, -2, 0, 0, 3.5, -1]],
  ],
  ramplus: [
    ['shared and unique', all({}, { experts: apart }), [1.51, -2, -0.01, 0, 3.5, -1]],
    ['alpha 1', all({ alpha: 1 }, { experts: overlapping }), [1.525, -1.5, 0.5, 0, 3, 0.05]],
  ],
  passthrough: [
    ['scale .5', bare([ONE], { scale: 0.5 }), [0.75, -1.125, 0.25, 0.375, 1, -0.75]],
    ['scale 1', bare([ONE]), ONE],
  ],
  fisher: [
    ['normalized', fisher({}), [1.315528, 0.000005, -0.999963]],
    ['not normalized', fisher({ normalize: false }), [1.200001, 0.00001, -0.99998]],
    [
      'no information',
      fisher({}, [
        [0, 0, 0],
        [0, 0, 0],
      ]),
      [1.5, 1, 0],
    ],
  ],
};

describe.each(Object.entries(VECTORS))('%s', (method, vectors) => {
  test.each(vectors)('%s', async (_name, given, expected) => {
    // Methods on matrices take them whole.
    for (const rows of mergerOf(method).access === 'matrix' ? [undefined] : [2, 1]) {
      const { values } = await merged(method, { ...given, ...(rows ? { rows } : {}) });
      expect(values).toHaveLength(expected.length);
      for (const [i, value] of values.entries()) expect(Math.abs(value - expected[i]), `element ${i}`).toBeLessThan(TOLERANCE);
    }
  });
});
