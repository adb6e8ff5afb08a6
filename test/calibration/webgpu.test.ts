/**
 * Calibration on WebGPU gives the CPU's numbers, over windows long enough for every path of a GPU's operators: hidden states and
 * Hessians against float64, losses and widths of both presets against the CPU. Skipped where there is no adapter.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Calibration } from '../../src/calibration/calibration.ts';
import type { Engine } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import { quantize } from '../../src/runs/quantize/quantize.ts';
import { quantizeRecipe } from '../../src/runs/quantize/recipe.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { referenceForward } from '../support/reference-forward.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { webgpuEngine } from '../support/software-vulkan.ts';
import { weightsOf } from '../support/tiny-models.ts';

/** Hidden states after a block, relative to the largest: fp32 in other orders of summation, against float64. */
const HIDDEN_TOLERANCE = 5e-6;
/** Entries of a Hessian, relative to its largest, against float64. */
const HESSIAN_TOLERANCE = 5e-6;
/** A layer's relative output error on the device over that on the CPU. Codes are discrete: near a tie either may be taken. */
const LOSS_TOLERANCE = 0.02;

/** A software adapter on busy cores. */
const MINUTES = 300_000;

/** From 32 tokens on, attention of WebGPU takes other paths than for short windows. */
const WINDOWS = [70, 33, 64, 7].map((length, w) => Int32Array.from({ length }, (_, i) => (w * 13 + i * i * 7 + i + 3) % 41));
const tiny = groupedLlama('webgpu', { max_position_embeddings: 128 });

const adapter = await webgpuEngine();
const scratch = scratchFolder();

describe.skipIf(adapter === undefined)('calibration on webgpu', () => {
  let cpu: Engine;
  beforeAll(async () => {
    cpu = await createEngine({ threads: 1 });
  });
  afterAll(async () => {
    await cpu[Symbol.asyncDispose]();
    await adapter?.[Symbol.asyncDispose]();
  });

  it('makes the hidden states and Hessians of a forward pass in float64, as the CPU does', async () => {
    const model = createModel(tiny.config, 'config.json', tiny.source);
    const weights = weightsOf(tiny);
    const expected = WINDOWS.map((window) => referenceForward(tiny.config, (name) => tiny.source.values(name), [...window]));
    for (const engine of [cpu, adapter!]) {
      await using pass = new Calibration({ model, engine, blas: createBlas(engine), windows: WINDOWS, path: 'tiny' });
      await pass.start(weights);
      for (const block of model.blocks) {
        await using measured = await pass.measure(block, weights, { replay: false });
        for (const [input, { hessian, features }] of measured) {
          const site = block.sites.find((candidate) => candidate.input === input)!;
          const rows = expected.flatMap(({ linearInputs }) => linearInputs.get(site.name)!);
          expect(relativeError(hessian, gram(rows, features)), `${engine.device} ${input}`).toBeLessThan(HESSIAN_TOLERANCE);
        }
        await pass.advance(block, weights);
        const hidden: number[] = [];
        for await (const window of pass.hiddenStates()) hidden.push(...window.hidden);
        const wanted = expected.flatMap((result) => result.hidden[block.index].flat());
        expect(relativeError(hidden, wanted), `${engine.device} ${block.name}`).toBeLessThan(HIDDEN_TOLERANCE);
      }
    }
  });

  it.each(['paper', 'best'] as const)(
    'gives every layer the loss it has on the CPU, preset %s',
    { timeout: MINUTES },
    async (preset) => {
      const model = await saveCheckpoint(join(scratch.path, preset), tiny);
      const text = scratch.write('text.txt', tinyText(1000));
      const losses = async (device: 'cpu' | 'webgpu'): Promise<Map<string, number>> => {
        const request = { preset, bits: 2, groupSize: 32, device, calibration: [text], samples: 2, sequenceLength: 64 };
        const output = join(scratch.path, `${preset}-${device}`);
        await quantize(model, output, quantizeRecipe(request, 1), { overwrite: false, resume: false, dryRun: false });
        const { sites } = JSON.parse(readFileSync(join(output, 'report.json'), 'utf8')) as {
          sites: Record<string, { relativeError: number }>;
        };
        return new Map(Object.entries(sites).map(([name, { relativeError }]) => [name, relativeError]));
      };
      const [own, expected] = [await losses('webgpu'), await losses('cpu')];
      expect([...own.keys()]).toEqual([...expected.keys()]);
      for (const [name, loss] of expected) {
        expect(loss).toBeGreaterThan(0);
        expect(Math.abs(own.get(name)! / loss - 1), name).toBeLessThan(LOSS_TOLERANCE);
      }
    },
  );
});

function gram(rows: readonly (readonly number[])[], features: number): Float64Array {
  const sum = new Float64Array(features * features);
  for (const row of rows) {
    for (let i = 0; i < features; i++) for (let j = 0; j < features; j++) sum[i * features + j] += row[i] * row[j];
  }
  return sum.map((value) => value / rows.length);
}

/** Largest difference over the largest value. */
function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  expect(actual.length).toBe(expected.length);
  let [largest, error] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    largest = Math.max(largest, Math.abs(expected[i]));
    const difference = Math.abs(actual[i] - expected[i]);
    if (!(difference <= error)) error = difference;
  }
  return error / largest;
}
