/** The error of a block's output, and its derivative by the block's weights, on the real engine. */
import { tmpdir } from 'node:os';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Calibration } from '../../src/calibration/calibration.ts';
import type { Engine } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { LinearSite, WeightReader } from '../../src/model/model.ts';
import { normals } from '../support/reference-layer.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

const WINDOWS = [9, 4, 9, 1, 7, 9].map((length, w) => Int32Array.from({ length }, (_, i) => (w * 13 + i * 7 + 3) % 41));

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

function readerOf({ source }: TinyModel): WeightReader {
  const info = (name: string) => source.tensors.get(name);
  return {
    load: async (name) => source.values(name)!,
    loadRows: async (name, start, end) => {
      const columns = info(name)!.shape[1];
      return source.values(name)!.slice(start * columns, end * columns);
    },
    loadSite: async ({ name, transposed, outFeatures, inFeatures }: LinearSite) => {
      const stored = source.values(`${name}.weight`)!;
      if (!transposed) return stored;
      const at = (i: number) => (i % inFeatures) * outFeatures + Math.floor(i / inFeatures);
      return Float32Array.from({ length: stored.length }, (_, i) => stored[at(i)]);
    },
    info,
  };
}

/** The second block, behind a first one whose weights are off by a tenth. */
async function secondBlock(tiny: TinyModel, dual: boolean) {
  const model = createModel(tiny.config, 'config.json', tiny.source);
  const float = readerOf(tiny);
  const options = { model, engine, blas: createBlas(engine), windows: WINDOWS, path: tiny.label, folder: tmpdir() };
  const pass = new Calibration({ ...options, followFloat: true, batchTokens: 20 });
  await pass.start(float);
  const [first, block] = model.blocks;
  const worse: WeightReader = { ...float, loadSite: async (site) => (await float.loadSite(site)).map((w) => 0.9 * w) };
  await pass.advance(first, worse);
  await pass.advanceFloat(first, float);
  const objective = await pass.objective(block, float, float, dual);
  const weights = new Map<string, Float32Array>();
  for (const site of block.sites) weights.set(site.name, (await float.loadSite(site)).slice());
  return { pass, block, float, objective, weights };
}

describe.each([tinyLlama('objective'), tinyGpt2('objective')])('the error of a block: $label, $config.model_type', (tiny) => {
  test('is differentiated by every weight, as differences say', async () => {
    const { pass, block, objective, weights } = await secondBlock(tiny, false);
    await using _ = pass;
    await using __ = objective;
    const windows = [4, 0, 2];
    const { loss, gradients } = await objective.gradient(weights, windows);
    expect(loss).toBeCloseTo(await objective.loss(weights, windows), 5);
    for (const { name } of block.sites) {
      const slope = gradients.get(name)!.slice();
      const length = Math.hypot(...slope);
      const random = normals(name.length, slope.length);
      const size = Math.hypot(...random);
      for (const along of [slope.map((g) => g / length), Float32Array.from(random, (z) => z / size)]) {
        const at = (by: number) =>
          objective.loss(
            new Map(weights).set(
              name,
              weights.get(name)!.map((w, i) => w + by * along[i]),
            ),
            windows,
          );
        const difference = ((await at(1e-2)) - (await at(-1e-2))) / 2e-2;
        const expected = slope.reduce((sum, g, i) => sum + g * along[i], 0);
        expect(Math.abs(difference - expected) / length, name).toBeLessThan(2e-3);
      }
    }
  });

  test('is a mean over tokens: batches of windows add up, however many run together and whatever pads they need', async () => {
    const { pass, objective, weights } = await secondBlock(tiny, false);
    await using _ = pass;
    await using __ = objective;
    const tokens = WINDOWS.map(({ length }) => length);
    const each: number[] = [];
    for (const window of tokens.keys()) each.push(await objective.loss(weights, [window]));
    const expected = each.reduce((sum, loss, w) => sum + loss * tokens[w], 0) / tokens.reduce((a, b) => a + b);
    // More places than windows, and the same window twice: two batches.
    expect(await objective.loss(weights, [5, 4, 3, 2, 1, 0])).toBeCloseTo(expected, 5);
    expect(await objective.loss(weights, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5])).toBeCloseTo(expected, 5);
    const [name] = weights.keys();
    const once = (await objective.gradient(weights, [0, 1, 2])).gradients.get(name)!.slice();
    const twice = (await objective.gradient(weights, [0, 1, 2, 0, 1, 2, 0, 1, 2])).gradients.get(name)!;
    twice.forEach((value, i) => {
      expect(value).toBeCloseTo(once[i], 5);
    });
  });

  test('is nothing for the float block on its own inputs, and dual it is the mean of both targets', async () => {
    const plain = await secondBlock(tiny, false);
    await using _ = plain.pass;
    await using __ = plain.objective;
    const dual = await secondBlock(tiny, true);
    await using ___ = dual.pass;
    await using ____ = dual.objective;
    const all = [0, 1, 2, 3, 4, 5];
    const off = await plain.objective.loss(plain.weights, all);
    expect(off).toBeGreaterThan(1e-3);
    // The float block on these inputs is half-way from the one target to the other.
    expect((await dual.objective.loss(dual.weights, all)) / off).toBeCloseTo(0.25, 4);
    expect(plain.objective.firstHeldOut).toBe(5);
  });
});
