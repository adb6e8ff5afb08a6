/** Routed experts and sparse updates from training to use: what is written is what was trained, whoever reads it, and a stopped run loses nothing. */
import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import { ModelGradient } from '../../src/calibration/model-gradient.ts';
import { Spool } from '../../src/calibration/state-store.ts';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { adapt } from '../../src/runs/adapt/adapt.ts';
import { withAdapter } from '../../src/runs/adapt/adapter-weights.ts';
import { convertAdapter, inspectAdapter } from '../../src/runs/adapt/convert.ts';
import { NextTokenLoss } from '../../src/runs/adapt/next-token-loss.ts';
import type { AdaptOutcome } from '../../src/runs/adapt/outcome.ts';
import { type AdaptRequest, adaptRecipe } from '../../src/runs/adapt/recipe.ts';
import { endOfText, readTrainingText } from '../../src/runs/adapt/text.ts';
import { evaluate } from '../../src/runs/evaluate/evaluate.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const at = (...parts: string[]) => join(scratch.path, ...parts);
const MACHINE = { device: 'cpu', threads: 1, maxMemory: 2 ** 30 } as const;
const MODES = { overwrite: false, resume: false, dryRun: false } as const;

beforeAll(async () => {
  for (const [name, model] of [
    ['base', tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 64 })],
    ['gpt2', tinyGpt2('gpt2', { vocab_size: 2048 })],
  ] as const) {
    await saveCheckpoint(at(name), model, 1e9);
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${file}`), at(name, file));
  }
  writeFileSync(at('text.txt'), readFileSync(fixture('text/python.train.txt'), 'utf8').slice(0, 9000));
}, 120_000);

const recipeOf = (request: AdaptRequest) =>
  adaptRecipe({ text: [at('text.txt')], sequenceLength: 32, batch: 4, ...MACHINE, ...request }, 1);
const evaluated = async (model: string, adapter?: string): Promise<number> => {
  const options = { ...MACHINE, text: [at('text.txt')], sequenceLength: 32, accuracy: 'exact' as const };
  return (await evaluate(at(model), { ...options, ...(adapter === undefined ? {} : { adapter: at(adapter) }) })).nll;
};

/** Loss of the windows that a run holds out, with an adapter as it is on the disk. */
async function heldOutLoss(base: string, adapter: string): Promise<number> {
  await using source = await openModelSource(at(base));
  const { model } = source;
  const tokenizer = await loadTokenizer(source.folder, model.shape.vocabSize);
  const { heldOut: windows } = await readTrainingText(tokenizer, [at('text.txt')], 32, endOfText(source.config));
  await using engine = await createEngine({ device: 'cpu', threads: 1 });
  await using spool = new Spool({});
  const weights = await withAdapter(source, at(adapter), createBlas(engine));
  await using pass = new ModelGradient({ model, engine, path: base, spool, windows, batchTokens: 2048 });
  return await (await NextTokenLoss.open(model, engine, weights)).score(await pass.forward(weights), windows);
}

const FORMS: readonly (readonly [string, AdaptRequest, string])[] = [
  ['mola', { method: 'mola', budget: 'params=4k', steps: 30, lr: 2e-2, profile: '2244' }, 'mola'],
  ['mola by gradients', { method: 'mola', budget: 'experts=6', expertRank: 2, profile: 'auto', steps: 30, lr: 2e-2 }, 'mola'],
  ['tmoe', { method: 'mola', router: 'soft', budget: 'params=4k', steps: 30, lr: 2e-2 }, 'tmoe'],
  ['snella', { method: 'snella', budget: 'density=0.05', steps: 30, lr: 2e-3 }, 'delta'],
];

describe.each(FORMS)('%s', (name, request, layout) => {
  let outcome: AdaptOutcome;
  beforeAll(async () => {
    outcome = await adapt(at('base'), at(name), recipeOf(request), MODES);
  }, 120_000);

  it('learns within the budget, from exactly the base', () => {
    const { heldOut } = outcome.run!;
    expect(heldOut.best).toBeLessThan(heldOut.before - 0.02);
    expect(outcome.budget.spent).toBeLessThanOrEqual(outcome.budget.total);
    expect(outcome.budget.spent).toBeGreaterThan(0.6 * outcome.budget.total);
  });

  it('is read again as it was trained', async () => {
    const adapter = (await inspectAdapter(at(name)))!;
    expect(adapter.layout).toBe(layout);
    expect(adapter.parameters).toBe(outcome.parameters);
    if (layout !== 'delta')
      expect(adapter.modules.map(({ name: own, routed }) => [own, routed!.experts])).toEqual(
        outcome.modules.map(({ name: own, experts }) => [own, experts]).toSorted(),
      );
    expect(Math.abs((await heldOutLoss('base', name)) - outcome.run!.heldOut.best)).toBeLessThan(1e-5);
  });

  it('goes on from a checkpoint to the same bytes', async () => {
    const stop = new AbortController();
    const hooks = {
      signal: stop.signal,
      progress: ({ phase, done }: { phase: string; done: number }) => {
        if (phase.startsWith('step') && done === 17) stop.abort();
      },
    };
    await expect(adapt(at('base'), at(`${name} again`), recipeOf(request), MODES, hooks)).rejects.toThrow();
    // Numbers are in the tensors: as text, those of a larger model are longer than a string can be.
    expect(statSync(at(`${name} again.partial`, 'parts', 'training.json')).size).toBeLessThan(100_000);
    const again = await adapt(at('base'), at(`${name} again`), recipeOf(request), { ...MODES, resume: true });
    expect(again.run!.losses).toEqual(outcome.run!.losses);
    const file = 'adapter_model.safetensors';
    expect(readFileSync(at(`${name} again`, file)).equals(readFileSync(at(name, file)))).toBe(true);
  });
});

it('a sparse update is folded into its base, whole layers stored either way', async () => {
  await adapt(at('gpt2'), at('sparse gpt2'), recipeOf({ method: 'snella', budget: 'density=0.1', steps: 6 }), MODES);
  for (const [base, adapter] of [
    ['base', 'snella'],
    ['gpt2', 'sparse gpt2'],
  ]) {
    const request = { to: 'merged', base: at(base), overwrite: true, threads: 1 } as const;
    await convertAdapter(at(adapter), at('merged'), request);
    expect(Math.abs((await evaluated('merged')) - (await evaluated(base, adapter)))).toBeLessThan(1e-6);
    expect(Math.abs((await evaluated('merged')) - (await evaluated(base)))).toBeGreaterThan(1e-4);
  }
});

it('without steps, experts are written that add nothing yet', async () => {
  const { run } = await adapt(at('base'), at('start'), recipeOf({ method: 'mola', budget: 'params=4k' }), MODES);
  expect(run!.heldOut.best).toBe(run!.heldOut.before);
  expect(await evaluated('base', 'start')).toBeCloseTo(await evaluated('base'), 6);
});

it('routed experts are not folded into a base without a text, and it says why', async () => {
  const request = { to: 'merged', base: at('base'), overwrite: true, threads: 1 } as const;
  await expect(convertAdapter(at('mola'), at('never'), request)).rejects.toThrow(
    /--text: .* routes tokens through experts .* takes the model and text to measure on/,
  );
});

it.each([
  [{ method: 'snella', budget: 'r=4' }, /--budget r=: snella has no ranks/],
  [{ method: 'uniform', budget: 'density=0.1' }, /--budget density=: uniform changes all weights/],
  [{ method: 'eva', budget: 'experts=8' }, /--budget experts=: eva has no experts/],
  [{ method: 'eva', profile: '2468', budget: 'r=2' }, /--profile: eva has no experts; mola does/],
  [{ method: 'mola', router: 'soft', topK: 2, budget: 'r=8' }, /--top-k: with --router soft/],
  [{ method: 'mola', padRanks: true, budget: 'r=8' }, /--pad-ranks: goes with plain factors/],
  [{ method: 'snella', alpha: 4, budget: 'pct=1%' }, /--alpha: snella has no scale/],
  [{ method: 'mola', init: 'pissa', steps: 3, budget: 'r=8' }, /--init pissa: mola starts from factors of its own/],
])('%j is refused', (request, message) => {
  expect(() => recipeOf(request)).toThrow(message);
});

it('what cannot be done is refused when the model is known', async () => {
  const run = (request: AdaptRequest) => adapt(at('base'), at('never'), recipeOf(request), MODES);
  await expect(run({ method: 'snella', budget: 'density=0.1' })).rejects.toThrow(/--steps 0: snella has nothing to write/);
  await expect(run({ method: 'mola', budget: 'params=500' })).rejects.toThrow(/2 experts of rank 1 in each of 14 layers cost/);
  await expect(run({ method: 'snella', budget: 'density=1', steps: 5 })).rejects.toThrow(/nothing is left out/);
});
