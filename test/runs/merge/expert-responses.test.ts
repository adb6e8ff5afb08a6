/** Responses that are written side by side against each prompt by itself, up to the end of the model's context. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Spool } from '../../../src/calibration/state-store.ts';
import type { Engine } from '../../../src/compute/engine.ts';
import { createEngine } from '../../../src/compute/ort.ts';
import { createBlas } from '../../../src/compute/ort-blas.ts';
import { createModel } from '../../../src/model/architectures/index.ts';
import { answerPrompts } from '../../../src/runs/merge/experts/responses.ts';
import type { Sample } from '../../../src/runs/merge/experts/samples.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { tinyGpt2, tinyLlama } from '../../support/tiny-models.ts';
import { readerOf } from '../../support/tiny-reader.ts';

const CONTEXT = 16;
const LENGTH = 12;
const scratch = scratchFolder();
const prompt = (length: number, r: number): Sample => ({
  expert: 0,
  tokens: Int32Array.from({ length }, (_, i) => (7 * r + 3 * i + 1) % 41),
  countedFrom: 0,
  open: true,
});

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

it.each([
  ['rotary positions', () => tinyLlama('llama', { max_position_embeddings: CONTEXT })],
  ['learned positions', () => tinyGpt2('gpt2', { n_positions: CONTEXT })],
] as const)('a prompt whose response fills the context ends there, and its neighbours go on: %s', async (_, make) => {
  const tiny = make();
  const model = createModel(tiny.config, 'config.json', tiny.source);
  expect(model.shape.contextLength).toBe(CONTEXT);
  await using spool = new Spool();
  const forward = { model, engine, blas: createBlas(engine), spool, path: 'tiny' };
  const answered = (samples: Sample[], name: string) => {
    const path = join(scratch.path, `${tiny.label}-${name}.jsonl`);
    expect(existsSync(path)).toBe(false);
    return answerPrompts(forward, samples, {
      labels: ['a'],
      weightsOf: () => readerOf(tiny),
      length: LENGTH,
      sequenceLength: CONTEXT,
      temperature: 0,
      endTokens: [new Set()],
      seed: 0,
      memoryBytes: 1e8,
      path,
      keep: async () => undefined,
    });
  };
  const samples = [15, 3, 10].map(prompt);
  const together = await answered(samples, 'together');
  expect(together.map(({ tokens }) => tokens.length)).toEqual([16, 15, 16]);
  for (const [i, sample] of samples.entries()) {
    const [alone] = await answered([sample], `alone-${i}`);
    expect(together[i].tokens).toEqual(alone.tokens);
  }
});
