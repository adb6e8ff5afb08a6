/** Methods on matrices against the specification's vectors (merging.md 5.1), and what must hold for any of them. */
import { describe, expect, it } from 'vitest';
import { mergeBlock, mergeTensor } from '../../../src/methods/merge/drive.ts';
import { isoC } from '../../../src/methods/merge/iso-c.ts';
import { isoCts } from '../../../src/methods/merge/iso-cts.ts';
import type { Merger, TensorRole } from '../../../src/methods/merge/merger.ts';
import { resolveParameters } from '../../../src/methods/merge/parameters.ts';
import { tsvM } from '../../../src/methods/merge/tsv-m.ts';
import { wudi } from '../../../src/methods/merge/wudi.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const P1 = [4, 0, 2, 0, 2, 2, 1, 1, -1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, -1];
const P2 = [3, 1, 2, 0, 1, -2, 0, -1, 1, 0, 0, 1, -1, 0, 1, 1, 0, 0, 0, 1];
const outer = (a: number[], b: number[]) => a.flatMap((x) => b.map((y) => x * y));
const Q = [outer([1, 2, 0, -1], [1, 0, 1, 0, 2]), outer([0, 1, 1, 0], [1, 1, 0, -1, 0])];
const INPUTS = { P: [P1, P2], Q, I: [P1, P1] };

async function merged(
  merger: Merger,
  taskVectors: readonly (readonly number[])[],
  settings: Record<string, unknown> = {},
  preset: 'best' | 'paper' = 'best',
  role: TensorRole = 'matrix',
): Promise<number[]> {
  const experts = taskVectors.map((_, k) => `e${k}`);
  const tensor = { name: 'w', shape: role === 'vector' ? [20] : [4, 5], role, experts };
  const block = mergeBlock(0, { base: new Float32Array(20), experts: taskVectors.map((values) => Float32Array.from(values)) });
  const values = resolveParameters(merger, { shared: settings }, experts, preset);
  const context = { seed: 0, blas: naiveBlas(), note: () => undefined };
  const rows: number[] = [];
  for await (const part of mergeTensor(merger, tensor, () => [block], values, context)) rows.push(...part);
  return rows;
}

const close = (actual: readonly number[], expected: readonly number[]) => {
  for (const [i, value] of expected.entries()) expect(Math.abs(actual[i] - value), `element ${i}`).toBeLessThan(3e-6);
};

/** Merger, settings, preset, input, first row or all, Frobenius norm. */
type Vector = readonly [
  string,
  Merger,
  Record<string, unknown>,
  'best' | 'paper',
  keyof typeof INPUTS,
  readonly number[],
  number | undefined,
];

const VECTORS: readonly Vector[] = [
  [
    'tsv-m',
    tsvM,
    {},
    'best',
    'P',
    [
      4.135163, -0.27623, 2.183289, -0.427633, 2.052379, -0.090311, -1.787905, -0.379219, -1.564585, 2.886239, -0.109856,
      -0.544743, -1.104279, 0.992897, 1.406088, 0.481074, 3.364995, 0.01405, 0.446881, -1.148243,
    ],
    undefined,
  ],
  ['tsv-m', tsvM, {}, 'best', 'Q', [0.790616, -0.420438, 1.211054, 0.420438, 2.422107], 6.480741],
  ['tsv-m', tsvM, {}, 'best', 'I', [4.084071, 0.227361, 1.894534, 0.067643, 1.894534], 5.786685],
  [
    'iso-c',
    isoC,
    {},
    'best',
    'P',
    [
      2.509991, 0.000956, 1.319286, -0.330668, 1.235651, -1.196265, 2.220039, 0.611161, -0.475129, 1.648593, 1.004894, 1.123707,
      -1.862108, 1.929504, 0.46237, 0.119301, 1.188221, 1.78148, 1.390069, -1.773325,
    ],
    undefined,
  ],
  ['iso-c', isoC, {}, 'best', 'Q', [0.242752, -0.600245, 0.842997, 0.600245, 1.685994], 5.887436],
  ['iso-c', isoC, {}, 'best', 'I', [3.042427, -1.655177, 2.169274, 0.359056, 2.169274], 9.281464],
  [
    'iso-cts',
    isoCts,
    { common: 0.5 },
    'best',
    'P',
    [
      2.444926, 0.032835, 2.50141, 1.333854, 1.24933, -2.502355, 1.685801, 0.799897, 0.976312, 2.208859, 1.264796, 1.026305,
      -2.761063, 2.200241, 0.676941, -1.308714, -1.829164, 0.575749, 2.799513, -1.532466,
    ],
    undefined,
  ],
  ['iso-cts', isoCts, { common: 0.5 }, 'best', 'Q', [0.242752, -0.600245, 0.842997, 0.600245, 1.685994], 5.887436],
  ['iso-cts', isoCts, { common: 0.5 }, 'best', 'I', [3.309362, -0.169663, 1.371899, 0.735226, 1.371899], 7.41693],
  ['iso-cts, as iso-c', isoCts, {}, 'best', 'P', [2.509991, 0.000956, 1.319286, -0.330668, 1.235651], undefined],
  [
    'wudi, published',
    wudi,
    {},
    'paper',
    'P',
    [
      3.154068, -0.547271, 2.343997, 0.148258, 2.648046, -2.843734, -3.787728, 2.368411, -0.342313, 6.39238, 0.595665, 0.239769,
      -0.864515, 1.125265, 1.000541, 0.735027, 1.649957, 0.066238, 0.241718, -0.991043,
    ],
    undefined,
  ],
  ['wudi, published', wudi, {}, 'paper', 'Q', [0.705882, -0.352941, 1.058824, 0.352941, 2.117647], 6.34313],
  ['wudi, published', wudi, {}, 'paper', 'I', [4, 0, 2, 0, 2], 6],
  [
    'wudi',
    wudi,
    {},
    'best',
    'P',
    [
      3.651746, 0.308181, 1.865501, 0.599858, 1.786238, 0.26, 0.156062, -0.791888, 1.694515, 1.636371, 0.584842, 0.358439,
      -0.836723, 1.192365, 0.958244, 0.328444, 0.295234, 0.37409, -0.494729, 0.004649,
    ],
    undefined,
  ],
  ['wudi', wudi, {}, 'best', 'Q', [0.705882, -0.352941, 1.058824, 0.352941, 2.117647], 6.34313],
  ['wudi', wudi, {}, 'best', 'I', [4, 0, 2, 0, 2], 6],
  [
    'wudi, exponential',
    wudi,
    { filter: 'exponential' },
    'best',
    'P',
    [3.774684, -0.415099, 1.628938, 0.187713, 1.988925],
    6.856892,
  ],
];

describe('the specification’s vectors', () => {
  it.each(VECTORS)('%s', async (_name, merger, settings, preset, input, expected, norm) => {
    const result = await merged(merger, INPUTS[input], settings, preset);
    close(result, expected);
    if (norm !== undefined) expect(Math.abs(Math.hypot(...result) - norm)).toBeLessThan(3e-6);
  });
});

describe.each([
  ['tsv-m', tsvM],
  ['wudi', wudi],
] as const)('%s', (_name, merger) => {
  it('gives one expert alone back', async () => {
    close(await merged(merger, [P1]), P1);
  });
});

describe.each([
  ['tsv-m', tsvM],
  ['iso-c', isoC],
  ['iso-cts', isoCts],
  ['wudi', wudi],
] as const)('%s', (_name, merger) => {
  it('leaves what is no matrix to the mean, and gives zeros for task vectors of zeros', async () => {
    close(
      await merged(merger, [P1, P2], {}, 'best', 'vector'),
      P1.map((value, i) => (value + P2[i]) / 2),
    );
    close(
      await merged(merger, [P1, P2], {}, 'best', 'embedding'),
      P1.map((value, i) => (value + P2[i]) / 2),
    );
    const zeros = new Array<number>(20).fill(0);
    expect(await merged(merger, [zeros, zeros])).toEqual(zeros);
    expect((await merged(merger, [P1, zeros])).every(Number.isFinite)).toBe(true);
  });
});
