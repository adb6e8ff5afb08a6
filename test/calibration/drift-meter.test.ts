/** What is measured between two models on one text, against plain sums. */
import { expect, it } from 'vitest';
import { DriftMeter } from '../../src/calibration/drift-meter.ts';
import { Spool } from '../../src/calibration/state-store.ts';
import { naiveBlas } from '../support/naive-blas.ts';

const [TOKENS, FEATURES] = [19, 3];
const HELD_OUT = 3;
const value = (i: number) => Math.sin(12.9898 * (i + 1));
const actual = Float32Array.from({ length: TOKENS * FEATURES }, (_, i) => value(i));
const float = actual.map((x, i) => x + 0.1 * value(i + 777));

async function metered(batchRows: readonly number[], means: boolean) {
  await using spool = new Spool();
  await using meter = new DriftMeter(naiveBlas(), FEATURES, TOKENS, spool, means);
  let row = 0;
  for (const rows of batchRows) {
    const [start, end] = [row * FEATURES, (row + rows) * FEATURES];
    await meter.add(actual.slice(start, end), float.slice(start, end));
    row += rows;
  }
  const drift = meter.finish(2);
  const heldOut: number[][] = [];
  for await (const batch of drift.heldOut()) heldOut.push([...batch.actual.data], [...batch.difference.data]);
  return { drift, heldOut };
}

it.each([[[19]], [[7, 7, 5]], [[16, 1, 2]]])(
  'the cross moment leaves the held-out tokens to judge it: batches of %j',
  async (rows) => {
    const { drift, heldOut } = await metered(rows, true);
    for (let i = 0; i < FEATURES; i++) {
      for (let j = 0; j < FEATURES; j++) {
        let sum = 0;
        for (let t = 0; t < TOKENS - HELD_OUT; t++) {
          sum += (float[t * FEATURES + i] - actual[t * FEATURES + i]) * actual[t * FEATURES + j];
        }
        expect(drift.cross[i * FEATURES + j]).toBeCloseTo(sum / (TOKENS - HELD_OUT), 6);
      }
      const mean = (values: Float32Array) => values.reduce((sum, x, k) => sum + (k % FEATURES === i ? x / TOKENS : 0), 0);
      expect(drift.means!.actual[i]).toBeCloseTo(mean(actual), 6);
      expect(drift.means!.float[i]).toBeCloseTo(mean(float), 6);
    }
    const first = (TOKENS - HELD_OUT) * FEATURES;
    const difference = float.map((x, i) => x - actual[i]);
    const wanted = [
      [...actual.slice(first, first + 2 * FEATURES)],
      [...difference.slice(first, first + 2 * FEATURES)],
      [...actual.slice(first + 2 * FEATURES)],
      [...difference.slice(first + 2 * FEATURES)],
    ];
    expect(heldOut).toEqual(wanted);
  },
);

it('means are not taken unless they are wanted', async () => {
  expect((await metered([19], false)).drift.means).toBeUndefined();
});
