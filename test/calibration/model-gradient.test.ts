/** Gradients of whole models, a block at a time: against finite differences, for every architecture and with padded batches. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ModelGradient } from '../../src/calibration/model-gradient.ts';
import { Spool, type StateStore } from '../../src/calibration/state-store.ts';
import type { Engine, NdArray } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { HeadObjective, LinearSite, Model, WeightReader } from '../../src/model/model.ts';
import { tinyGpt2, tinyLlama } from '../support/tiny-models.ts';
import { readerOf } from '../support/tiny-reader.ts';

/** A whole model in float32, second differences included. */
const TOLERANCE = 1e-2;

const WINDOWS = [7, 4, 7].map((length, w) => Int32Array.from({ length }, (_, i) => (w * 13 + i * 7 + 3) % 41));
const TOKENS = WINDOWS.reduce((sum, { length }) => sum + length, 0);
const wave = (i: number) => Math.sin(12.9898 * (i + 1));

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

const DIVERGENCE: HeadObjective = { kind: 'divergence', temperature: 1 };
const weight = Float32Array.from({ length: TOKENS }, (_, t) => (t % 5 === 0 ? 0 : 1 / TOKENS));

const teacherLogits = (vocabSize: number) => Float32Array.from({ length: TOKENS * vocabSize }, (_, i) => 2 * wave(i + 99));
const labels = (vocabSize: number) => Float32Array.from({ length: TOKENS }, (_, t) => (7 * t + 3) % vocabSize);

/** Loss of all rows at once, and the cotangent of the hidden states. */
async function head(model: Model, weights: WeightReader, hidden: StateStore, objective: HeadObjective) {
  const { vocabSize, hiddenSize } = model.shape;
  const { model: graph, key, weights: norm } = model.headGradient(TOKENS, objective);
  const program = await engine.compile(graph, { key });
  const array = (shape: number[], data: Float32Array): NdArray => ({ dtype: 'F32', shape, data });
  const feeds: Record<string, NdArray> = {
    hidden: array([TOKENS, hiddenSize], await hidden.read(0, TOKENS)),
    head: array([vocabSize, hiddenSize], await weights.load(model.outputHead)),
    ...(objective.kind === 'divergence' && { teacher: array([TOKENS, vocabSize], teacherLogits(vocabSize)) }),
    ...(objective.kind === 'label' && { label: array([TOKENS, 1], labels(vocabSize)) }),
    weight: array([TOKENS, 1], weight),
  };
  for (const [input, name] of norm) {
    const data = await weights.load(name);
    feeds[input] = array([data.length], data);
  }
  const made = await program.run(feeds);
  return { loss: made['loss'].data[0] as number, cotangent: made['hidden_cotangent'].data as Float32Array };
}

async function lossOf(
  model: Model,
  weights: WeightReader,
  objective: HeadObjective,
  on?: (site: LinearSite, g: Float32Array) => void,
  sites?: ReadonlySet<string>,
) {
  await using spool = new Spool();
  const wanted = sites ? { sites } : {};
  await using pass = new ModelGradient({ model, engine, path: 'tiny', spool, windows: WINDOWS, batchTokens: 16, ...wanted });
  const hidden = await pass.forward(weights);
  const { loss, cotangent } = await head(model, weights, hidden, objective);
  if (on) {
    const store = spool.allocate(TOKENS, model.shape.hiddenSize);
    await store.write(0, cotangent);
    await pass.backward(weights, store, async (_, gradients) => {
      for (const [site, g] of gradients) on(site, g.slice());
    });
  }
  return loss;
}

it('makes those gradients that are wanted, the same, and goes back no further than they are', async () => {
  const tiny = tinyLlama('Llama');
  const model = createModel(tiny.config, 'config.json', tiny.source);
  const { index, sites } = model.blocks.at(-1)!;
  expect(index).toBeGreaterThan(0);
  const gradientsOf = async (wanted?: ReadonlySet<string>, reader = readerOf(tiny)) => {
    const found = new Map<string, Float32Array>();
    await lossOf(model, reader, DIVERGENCE, ({ name }, g) => found.set(name, g), wanted);
    return found;
  };
  const all = await gradientsOf();
  const wanted = new Set([sites[1].name, sites[4].name]);
  let loads = 0;
  const reader = readerOf(tiny);
  const counting = {
    ...reader,
    loadSite: (site: LinearSite) => {
      if (site.name.includes('.0.')) loads++;
      return reader.loadSite(site);
    },
  };
  const some = await gradientsOf(wanted, counting);
  expect([...some.keys()].sort()).toEqual([...wanted].sort());
  for (const [name, g] of some) expect(g).toEqual(all.get(name));
  // On the way forward only.
  expect(loads).toBe(model.blocks[0].sites.length);
});

describe.each([
  ['llama, shared key/value heads', () => tinyLlama('Llama with shared key/value heads'), DIVERGENCE],
  ['llama, at temperature 2', () => tinyLlama('Llama'), { kind: 'divergence', temperature: 2 }],
  ['llama, next tokens', () => tinyLlama('Llama'), { kind: 'label' }],
  ['llama, entropy', () => tinyLlama('Llama'), { kind: 'entropy' }],
  ['gpt2', () => tinyGpt2('GPT-2'), DIVERGENCE],
] as const)('%s', (_name, make, objective) => {
  it('every site’s gradient is the slope of the loss, along it and across', async () => {
    const tiny = make();
    const model = createModel(tiny.config, 'config.json', tiny.source);
    const gradients = new Map<LinearSite, Float32Array>();
    await lossOf(model, readerOf(tiny), objective, (site, g) => gradients.set(site, g));
    expect(gradients.size).toBe(model.blocks.reduce((sum, { sites }) => sum + sites.length, 0));
    for (const [site, g] of gradients) {
      const norm = Math.hypot(...g);
      const other = Float32Array.from(g, (_, i) => wave(i + 7));
      for (const direction of [g.map((value) => value / norm), other.map((value) => value / Math.hypot(...other))]) {
        const step = 0.02;
        const at = (sign: number) =>
          lossOf(model, readerOf(tiny, { site: site.name, by: direction.map((value) => sign * step * value) }), objective);
        const measured = ((await at(1)) - (await at(-1))) / (2 * step);
        const predicted = g.reduce((sum, value, i) => sum + value * direction[i], 0);
        expect(Math.abs(measured - predicted) / norm, site.name).toBeLessThan(TOLERANCE);
      }
    }
  });
});

it('one batch and several give the same gradients', async () => {
  const tiny = tinyLlama('Llama');
  const model = createModel(tiny.config, 'config.json', tiny.source);
  const run = async (batchTokens: number) => {
    const gradients: Float32Array[] = [];
    await using spool = new Spool();
    await using pass = new ModelGradient({ model, engine, path: 'tiny', spool, windows: WINDOWS, batchTokens });
    await pass.forward(readerOf(tiny));
    const store = spool.allocate(TOKENS, model.shape.hiddenSize);
    await store.write(
      0,
      Float32Array.from({ length: TOKENS * model.shape.hiddenSize }, (_, i) => wave(i)),
    );
    await pass.backward(readerOf(tiny), store, async (_, all) => {
      for (const g of all.values()) gradients.push(g.slice());
    });
    gradients.push((await store.read(0, TOKENS)).slice());
    return gradients;
  };
  const [whole, parts] = [await run(64), await run(7)];
  for (const [i, g] of whole.entries()) {
    const difference = Math.hypot(...g.map((value, j) => value - parts[i][j]));
    expect(difference / Math.hypot(...g)).toBeLessThan(1e-6);
  }
});

it('losses at the head are what their definitions say', async () => {
  const tiny = tinyLlama('Llama');
  const model = createModel(tiny.config, 'config.json', tiny.source);
  const { vocabSize, hiddenSize } = model.shape;
  const weights = readerOf(tiny);
  await using spool = new Spool();
  const store = spool.allocate(TOKENS, hiddenSize);
  const states = Float32Array.from({ length: TOKENS * hiddenSize }, (_, i) => wave(3 * i));
  await store.write(0, states);
  const [norm, matrix] = [await weights.load('model.norm.weight'), await weights.load(model.outputHead)];
  const losses = { divergence: 0, label: 0, entropy: 0 };
  for (let t = 0; t < TOKENS; t++) {
    const row = states.subarray(t * hiddenSize, (t + 1) * hiddenSize);
    const length = Math.sqrt(
      row.reduce((sum, value) => sum + value ** 2, 0) / hiddenSize + Number(tiny.config['rms_norm_eps'] ?? 1e-6),
    );
    const z = Array.from({ length: vocabSize }, (_, v) =>
      row.reduce((sum, value, j) => sum + (value / length) * norm[j] * matrix[v * hiddenSize + j], 0),
    );
    const logs = (all: readonly number[]) => {
      const total = Math.log(all.reduce((sum, value) => sum + Math.exp(value), 0));
      return all.map((value) => value - total);
    };
    const own = logs(z);
    const teacher = logs([...teacherLogits(vocabSize).subarray(t * vocabSize, (t + 1) * vocabSize)]);
    losses.divergence += weight[t] * teacher.reduce((sum, value, v) => sum + Math.exp(value) * (value - own[v]), 0);
    losses.label -= weight[t] * own[labels(vocabSize)[t]];
    losses.entropy -= weight[t] * own.reduce((sum, value) => sum + Math.exp(value) * value, 0);
  }
  for (const objective of [DIVERGENCE, { kind: 'label' }, { kind: 'entropy' }] as const) {
    expect((await head(model, weights, store, objective)).loss, objective.kind).toBeCloseTo(losses[objective.kind], 4);
  }
});
