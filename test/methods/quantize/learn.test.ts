/** The loop that learns a block, on one linear layer whose loss is computed in plain loops. */
import { describe, expect, test } from 'vitest';
import type { BlockObjective, SiteWeights } from '../../../src/calibration/block-objective.ts';
import { type LearningSchedule, learnBlock } from '../../../src/methods/quantize/learned/learn.ts';
import { dequantize } from '../../../src/methods/quantize/quantized-linear.ts';
import { rtn } from '../../../src/methods/quantize/rtn.ts';
import { contextOf, randomTokens, randomWeight, siteOf } from './support.ts';

const [ROWS, COLUMNS, TOKENS] = [16, 64, 24];
const site = siteOf(ROWS, COLUMNS);
const weight = randomWeight(ROWS, COLUMNS, 5);
const SIGN = { rule: 'sign', batch: 4, gridRate: 1 / 400, roundingRate: 1 / 100, decays: true, steps: 60 } as const;

/** `|X (Wq - W)^T|^2` a token; every window has tokens of its own. */
function layerObjective(windowCount = 16): BlockObjective {
  const windows = Array.from({ length: windowCount }, (_, w) => randomTokens(TOKENS, COLUMNS, 100 + w).data);
  const measure = (weights: SiteWeights, chosen: readonly number[]) => {
    const difference = weights.get(site.name)!.map((w, i) => w - weight[i]);
    const gradient = new Float32Array(difference.length);
    let loss = 0;
    const count = TOKENS * chosen.length;
    for (const window of chosen) {
      for (let t = 0; t < TOKENS; t++) {
        const x = windows[window].subarray(t * COLUMNS, (t + 1) * COLUMNS);
        for (let r = 0; r < ROWS; r++) {
          let y = 0;
          for (let j = 0; j < COLUMNS; j++) y += difference[r * COLUMNS + j] * x[j];
          loss += y ** 2 / count;
          for (let j = 0; j < COLUMNS; j++) gradient[r * COLUMNS + j] += (2 * y * x[j]) / count;
        }
      }
    }
    return { loss, gradients: new Map([[site.name, gradient]]) };
  };
  return {
    windowCount,
    firstHeldOut: windowCount - 4,
    loss: async (weights, chosen) => measure(weights, chosen).loss,
    gradient: async (weights, chosen) => measure(weights, chosen),
  };
}

async function startOf(bits: readonly number[]) {
  const plan = { groupSize: 16, bits };
  return (await rtn.apply(contextOf(), site, weight, undefined, plan)).quantized;
}

const learn = async (schedule: LearningSchedule, objective = layerObjective(), seed = 1, bits = [2, 3, 1, 2]) => {
  const quantized = await startOf(bits);
  const steps: number[] = [];
  const learned = await learnBlock([{ site, weight, quantized }], objective, schedule, seed, (done) => steps.push(done));
  return { learned, start: quantized, result: learned.quantized.get(site.name)!, steps };
};

describe('learning a layer', () => {
  test.each<[string, LearningSchedule, number]>([
    ['roundings and ends of ranges by signs', { ...SIGN, grid: 'ends', rounding: true }, 0.95],
    ['roundings and scales by AdamW', { ...SIGN, rule: 'adam', gridRate: 2e-3, grid: 'scale', rounding: true }, 0.95],
    ['scales alone', { ...SIGN, rule: 'adam', gridRate: 1e-2, grid: 'scale', rounding: false }, 0.99],
    ['clipping', { ...SIGN, rule: 'adam', gridRate: 3e-2, grid: 'clipping', rounding: false }, 0.99],
  ])('of %s lowers the error on windows that it did not see', async (_, schedule, most) => {
    const { learned, start, result, steps } = await learn(schedule);
    const objective = layerObjective();
    const heldOut = [12, 13, 14, 15];
    const loss = (q: typeof start) => objective.loss(new Map([[site.name, dequantize(q)]]), heldOut);
    expect(learned.lossBefore).toBeCloseTo(await loss(start), 8);
    expect(learned.lossAfter).toBeCloseTo(await loss(result), 8);
    expect(learned.lossAfter / learned.lossBefore).toBeLessThan(most);
    expect(steps).toEqual(Array.from({ length: 60 }, (_, i) => i + 1));
    expect(result.bits).toEqual(start.bits);
    result.codes.forEach((code, i) => {
      expect(code).toBeLessThan(2 ** start.bits[Math.floor((i % COLUMNS) / 16)]);
    });
  });

  test('gives the start back when nothing helps on windows it did not see', async () => {
    const objective = layerObjective();
    // Held out, whatever is learned is worse: the first answer is the start's.
    let asked = 0;
    const { learned, start, result } = await learn(
      { ...SIGN, grid: 'ends', rounding: true, steps: 5 },
      { ...objective, loss: async () => ++asked },
    );
    expect(learned).toMatchObject({ step: 0, lossBefore: 1, lossAfter: 1 });
    expect(result).toBe(start);
  });

  test('stops, with the best so far, where the loss is no longer a number', async () => {
    const objective = layerObjective();
    let calls = 0;
    const broken: BlockObjective = {
      ...objective,
      gradient: async (weights, windows) => ({
        ...(await objective.gradient(weights, windows)),
        ...(++calls > 30 ? { loss: Number.NaN } : {}),
      }),
    };
    const { learned } = await learn({ ...SIGN, grid: 'ends', rounding: true }, broken);
    expect(calls).toBe(31);
    expect(learned.step).toBeLessThanOrEqual(30);
    expect(learned.lossAfter).toBeLessThanOrEqual(learned.lossBefore);
  });

  test('is the same for the same seed and another for another', async () => {
    const schedule = { ...SIGN, grid: 'ends', rounding: true } as const;
    const once = await learn(schedule);
    expect((await learn(schedule)).learned).toEqual(once.learned);
    expect((await learn(schedule, layerObjective(), 2)).result.codes).not.toEqual(once.result.codes);
  });

  test('sees every window once before it sees one again', async () => {
    const objective = layerObjective();
    const seen: number[] = [];
    const watched: BlockObjective = {
      ...objective,
      gradient: (weights, windows) => {
        seen.push(...windows);
        return objective.gradient(weights, windows);
      },
    };
    await learn({ ...SIGN, grid: 'ends', rounding: true, steps: 6 }, watched);
    const all = Array.from({ length: 12 }, (_, i) => i);
    expect(seen.slice(0, 12).toSorted((a, b) => a - b)).toEqual(all);
    expect(seen.slice(12).toSorted((a, b) => a - b)).toEqual(all);
    expect(seen.slice(0, 12)).not.toEqual(seen.slice(12));
  });
});
