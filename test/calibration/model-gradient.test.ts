/** Gradients of whole models, a block at a time: against finite differences, for every architecture and with padded batches. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { ModelGradient } from '../../src/calibration/model-gradient.ts';
import { Spool, type StateStore } from '../../src/calibration/state-store.ts';
import type { Engine, NdArray } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { LinearSite, Model, WeightReader } from '../../src/model/model.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../support/tiny-models.ts';

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

function readerOf(tiny: TinyModel, moved?: { readonly site: string; readonly by: Float32Array }): WeightReader {
  const values = (name: string) => tiny.source.values(name)!;
  return {
    load: async (name) => values(name),
    loadRows: async (name, start, end) => {
      const columns = tiny.source.tensors.get(name)!.shape[1];
      return values(name).slice(start * columns, end * columns);
    },
    loadSite: async (site: LinearSite) => {
      const stored = values(`${site.name}.weight`);
      const { outFeatures, inFeatures, transposed } = site;
      const weight = Float32Array.from(stored, (value, i) =>
        transposed ? stored[(i % inFeatures) * outFeatures + Math.floor(i / inFeatures)] : value,
      );
      if (moved?.site === site.name) for (let i = 0; i < weight.length; i++) weight[i] += moved.by[i];
      return weight;
    },
    info: (name) => tiny.source.tensors.get(name),
  };
}

const weight = Float32Array.from({ length: TOKENS }, (_, t) => (t % 5 === 0 ? 0 : 1 / TOKENS));

/** Loss of all rows at once, and the cotangent of the hidden states. */
async function head(model: Model, weights: WeightReader, hidden: StateStore, temperature: number) {
  const { vocabSize, hiddenSize } = model.shape;
  const { model: graph, key, weights: norm } = model.headGradient(TOKENS, temperature);
  const program = await engine.compile(graph, { key });
  const array = (shape: number[], data: Float32Array): NdArray => ({ dtype: 'F32', shape, data });
  const feeds: Record<string, NdArray> = {
    hidden: array([TOKENS, hiddenSize], await hidden.read(0, TOKENS)),
    head: array([vocabSize, hiddenSize], await weights.load(model.outputHead)),
    teacher: array(
      [TOKENS, vocabSize],
      Float32Array.from({ length: TOKENS * vocabSize }, (_, i) => 2 * wave(i + 99)),
    ),
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
  temperature: number,
  on?: (site: LinearSite, g: Float32Array) => void,
) {
  await using spool = new Spool();
  await using pass = new ModelGradient({ model, engine, path: 'tiny', spool, windows: WINDOWS, batchTokens: 16 });
  const hidden = await pass.forward(weights);
  const { loss, cotangent } = await head(model, weights, hidden, temperature);
  if (on) {
    const store = spool.allocate(TOKENS, model.shape.hiddenSize);
    await store.write(0, cotangent);
    await pass.backward(weights, store, async (_, gradients) => {
      for (const [site, g] of gradients) on(site, g.slice());
    });
  }
  return loss;
}

describe.each([
  ['llama, shared key/value heads', () => tinyLlama('Llama with shared key/value heads'), 1],
  ['llama, at temperature 2', () => tinyLlama('Llama'), 2],
  ['gpt2', () => tinyGpt2('GPT-2'), 1],
] as const)('%s', (_name, make, temperature) => {
  it('every site’s gradient is the slope of the loss, along it and across', async () => {
    const tiny = make();
    const model = createModel(tiny.config, 'config.json', tiny.source);
    const gradients = new Map<LinearSite, Float32Array>();
    await lossOf(model, readerOf(tiny), temperature, (site, g) => gradients.set(site, g));
    expect(gradients.size).toBe(model.blocks.reduce((sum, { sites }) => sum + sites.length, 0));
    for (const [site, g] of gradients) {
      const norm = Math.hypot(...g);
      const other = Float32Array.from(g, (_, i) => wave(i + 7));
      for (const direction of [g.map((value) => value / norm), other.map((value) => value / Math.hypot(...other))]) {
        const step = 0.02;
        const at = (sign: number) =>
          lossOf(model, readerOf(tiny, { site: site.name, by: direction.map((value) => sign * step * value) }), temperature);
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
