import { describe, expect, test } from 'vitest';
import type { NdArray } from '../../src/compute/engine.ts';
import { type AttentionLowering, type AttentionOptions, attention, preferredLowering } from '../../src/graph/attention.ts';
import { GraphBuilder } from '../../src/graph/builder.ts';
import { positionsFromLengths, positionsFromMask } from '../../src/graph/token-positions.ts';
import { randomSource, randomValues } from '../support/random.ts';
import { f32, i32, i64, openGraph } from '../support/run-graph.ts';

/** Absolute, on values of about 1: float32 in two orders of summation. */
const TOLERANCE = 1e-5;
const POSITIONS = 16;

interface Setting {
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly headDim: number;
  readonly rotates: boolean;
  readonly window?: number;
}

/** Real tokens of each row in one call; rows shorter than the longest are padded to the right in the first call only. */
type Call = readonly number[];

/** Attention outputs of the real tokens of every call, with the cache carried along. */
async function attend(setting: Setting, calls: readonly Call[], lowering: AttentionLowering): Promise<number[]> {
  const { headCount, kvHeadCount, headDim, rotates, window } = setting;
  const builder = new GraphBuilder();
  const input = (name: string, heads: number) => builder.input(name, 'F32', ['batch', 'sequence', heads * headDim]);
  const ids = builder.input('ids', 'I64', ['batch', 'sequence']);
  const mask = builder.input('mask', 'I64', ['batch', 'total']);
  const past = (name: string) => builder.input(name, 'F32', ['batch', kvHeadCount, 'past', headDim]);
  const half = headDim / 2;
  const angles = Float32Array.from({ length: POSITIONS * half }, (_, i) => Math.floor(i / half) / (1 + (i % half)));
  const table = (of: (x: number) => number) => builder.constant('F32', angles.map(of), [POSITIONS, half]);
  const options: AttentionOptions = {
    headCount,
    kvHeadCount,
    headDim,
    scale: 0.3,
    past: { key: past('past_key'), value: past('past_value') },
    ...(window === undefined ? {} : { window }),
    ...(rotates ? { rotary: { cos: table(Math.cos), sin: table(Math.sin) } } : {}),
  };
  const positions = positionsFromMask(builder, mask, ids);
  const [q, k, v] = [input('q', headCount), input('k', kvHeadCount), input('v', kvHeadCount)];
  const made = attention(builder, q, k, v, positions, options, lowering);
  builder.output('y', made.output);
  builder.output('present_key', made.presentKey);
  builder.output('present_value', made.presentValue);
  const graph = await openGraph(builder.build());

  const random = randomSource(5);
  const seen: number[] = [];
  const batch = calls[0].length;
  const rows: number[][] = calls[0].map(() => []);
  let cache: NdArray[] = [0, 1].map(() => f32([batch, kvHeadCount, 0, headDim], []));
  for (const lengths of calls) {
    const sequence = Math.max(...lengths);
    lengths.forEach((length, b) => {
      for (let t = 0; t < sequence; t++) rows[b].push(t < length ? 1 : 0);
    });
    const values = (heads: number) =>
      f32([batch, sequence, heads * headDim], randomValues(random, batch * sequence * heads * headDim));
    const results = await graph.run({
      q: values(headCount),
      k: values(kvHeadCount),
      v: values(kvHeadCount),
      ...(graph.inputNames.includes('ids') ? { ids: i64([batch, sequence], new Array(batch * sequence).fill(0)) } : {}),
      mask: i64([batch, rows[0].length], rows.flat()),
      past_key: cache[0],
      past_value: cache[1],
    });
    cache = [results['present_key'], results['present_value']];
    const y = results['y'].data as Float32Array;
    const width = headCount * headDim;
    lengths.forEach((length, b) => {
      seen.push(...y.subarray(b * sequence * width, (b * sequence + length) * width));
    });
  }
  await graph.release();
  return seen;
}

function largestDifference(a: readonly number[], b: readonly number[]): number {
  expect(a.length).toBe(b.length);
  return Math.max(...a.map((value, i) => Math.abs(value - b[i])));
}

const SETTINGS: readonly Setting[] = [
  { headCount: 2, kvHeadCount: 2, headDim: 8, rotates: false },
  { headCount: 4, kvHeadCount: 2, headDim: 8, rotates: true },
  { headCount: 6, kvHeadCount: 2, headDim: 16, rotates: true },
  { headCount: 4, kvHeadCount: 1, headDim: 16, rotates: true, window: 3 },
  { headCount: 2, kvHeadCount: 2, headDim: 24, rotates: true, window: 1 },
];

const CALLS: Readonly<Record<string, readonly Call[]>> = {
  'a prompt': [[6]],
  'a prompt, a second piece and single tokens': [[4], [3], [1], [1]],
  'a padded batch that goes on': [
    [5, 2, 4],
    [1, 1, 1],
    [1, 1, 1],
  ],
};

describe.each(SETTINGS)('attention of $headCount/$kvHeadCount heads of $headDim, rotated $rotates, window $window', (setting) => {
  test.each(Object.entries(CALLS))('both lowerings agree on %s', async (_, calls) => {
    const [grouped, plain] = [await attend(setting, calls, 'grouped'), await attend(setting, calls, 'plain')];
    expect(largestDifference(grouped, plain)).toBeLessThan(TOLERANCE);
  });

  test('both lowerings agree on rows that begin here and are given by their lengths', async () => {
    const { headCount, kvHeadCount, headDim, window } = setting;
    const outputs = [];
    for (const lowering of ['grouped', 'plain'] as const) {
      const builder = new GraphBuilder();
      const hidden = builder.input('hidden', 'F32', ['batch', 'sequence', headCount * headDim]);
      const keys = builder.input('keys', 'F32', ['batch', 'sequence', kvHeadCount * headDim]);
      const positions = positionsFromLengths(builder, builder.input('lengths', 'I32', ['batch']), hidden);
      const options = { headCount, kvHeadCount, headDim, scale: 0.3, ...(window === undefined ? {} : { window }) };
      builder.output('y', attention(builder, hidden, keys, keys, positions, options, lowering).output);
      const graph = await openGraph(builder.build());
      const random = randomSource(9);
      const results = await graph.run({
        hidden: f32([2, 5, headCount * headDim], randomValues(random, 2 * 5 * headCount * headDim)),
        keys: f32([2, 5, kvHeadCount * headDim], randomValues(random, 2 * 5 * kvHeadCount * headDim)),
        ...(graph.inputNames.includes('lengths') ? { lengths: i32([2], [5, 3]) } : {}),
      });
      await graph.release();
      const y = results['y'].data as Float32Array;
      const width = headCount * headDim;
      outputs.push([...y.subarray(0, 5 * width), ...y.subarray(5 * width, 8 * width)]);
    }
    expect(largestDifference(outputs[0], outputs[1])).toBeLessThan(TOLERANCE);
  });
});

test('a window changes what is attended to, so that agreement says something', async () => {
  const setting = { headCount: 2, kvHeadCount: 2, headDim: 8, rotates: true };
  const all = await attend(setting, [[6]], 'plain');
  const near = await attend({ ...setting, window: 3 }, [[6]], 'plain');
  const width = 2 * 8;
  expect(near.slice(0, 3 * width)).toEqual(all.slice(0, 3 * width));
  expect(largestDifference(near.slice(3 * width), all.slice(3 * width))).toBeGreaterThan(0.01);
});

test('heads that GroupQueryAttention refuses are lowered to plain operators', () => {
  expect([4, 8, 12, 16, 64, 80, 100].map(preferredLowering)).toEqual([
    'plain',
    'grouped',
    'plain',
    'grouped',
    'grouped',
    'grouped',
    'plain',
  ]);
});
