/** Writing on a cache against reading the whole row again: rows of different lengths side by side, for every kind of attention. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BlockRunner } from '../../src/calibration/block-runner.ts';
import { CachedDecoder } from '../../src/calibration/cached-decoder.ts';
import { embedTokens } from '../../src/calibration/embed.ts';
import { HiddenStates } from '../../src/calibration/hidden-states.ts';
import { Spool } from '../../src/calibration/state-store.ts';
import type { Engine } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { Model, WeightReader } from '../../src/model/model.ts';
import { tinyGpt2, tinyLlama } from '../support/tiny-models.ts';
import { readerOf } from '../support/tiny-reader.ts';

/** Another order of sums in float32. */
const TOLERANCE = 2e-5;
const PROMPTS = [5, 1, 3].map((length, r) => Int32Array.from({ length }, (_, i) => (7 * r + 3 * i + 1) % 41));
const ADDED = [
  [4, 9, 30],
  [11, 2, 17],
  [40, 0, 8],
];

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

/** States after the last block at the last token of a row. */
async function lastStates(model: Model, weights: WeightReader, row: Int32Array): Promise<Float32Array> {
  await using spool = new Spool();
  await using states = new HiddenStates([row], model.shape.hiddenSize, 64, spool);
  await embedTokens(model, weights, states, { path: 'tiny' });
  const runner = new BlockRunner(model, engine, 'tiny');
  for (const block of model.blocks) await runner.advance(states, block, weights);
  return (await states.store.read(row.length - 1, row.length)).slice();
}

describe.each([
  ['llama, shared key/value heads', () => tinyLlama('Llama with shared key/value heads')],
  [
    'mistral, a window of three tokens',
    () => tinyLlama('Mistral', { architectures: ['MistralForCausalLM'], model_type: 'mistral', sliding_window: 3 }),
  ],
  ['gpt2, learned positions', () => tinyGpt2('GPT-2')],
] as const)('%s', (_name, make) => {
  it('every step sees what a pass over the whole row sees', async () => {
    const tiny = make();
    const model = createModel(tiny.config, 'config.json', tiny.source);
    const weights = readerOf(tiny);
    const { hiddenSize } = model.shape;
    const decoder = new CachedDecoder({ model, engine, weights, path: 'tiny', prompts: PROMPTS, room: ADDED.length });
    const rows = PROMPTS.map((prompt) => [...prompt]);
    let states = await decoder.begin();
    for (let step = 0; ; step++) {
      for (const [r, row] of rows.entries()) {
        const wanted = await lastStates(model, weights, Int32Array.from(row));
        const found = states.subarray(r * hiddenSize, (r + 1) * hiddenSize);
        for (let i = 0; i < hiddenSize; i++)
          expect(Math.abs(found[i] - wanted[i]), `row ${r}, step ${step}`).toBeLessThan(TOLERANCE);
      }
      if (step === ADDED.length) break;
      states = await decoder.next(ADDED[step]);
      rows.forEach((row, r) => {
        row.push(ADDED[step][r]);
      });
    }
  });
});
