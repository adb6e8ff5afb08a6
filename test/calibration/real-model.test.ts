/** The calibration pass with the real engine on tiny random networks, against a slow forward pass in float64. */
import { tmpdir } from 'node:os';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Calibration, type CalibrationOptions } from '../../src/calibration/calibration.ts';
import type { Blas } from '../../src/compute/blas.ts';
import type { Engine, NdArray } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createBlas } from '../../src/compute/ort-blas.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { Model, WeightReader } from '../../src/model/model.ts';
import { referenceForward } from '../support/reference-forward.ts';
import { type TinyModel, tinyGpt2, tinyLlama, weightsOf } from '../support/tiny-models.ts';

/** fp32 block graphs against float64 loops, values of about 1. */
const FORWARD_TOLERANCE = 2e-4;
/** A Gram matrix of fp32 products against float64 sums of the same fp32 numbers, relative to its largest entry. */
const GRAM_TOLERANCE = 1e-6;

const WINDOWS = [9, 4, 9, 1, 7].map((length, w) => Int32Array.from({ length }, (_, i) => (w * 13 + i * 7 + 3) % 41));
const ROWS = WINDOWS.reduce((sum, window) => sum + window.length, 0);

let engine: Engine;
let blas: Blas;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
  blas = createBlas(engine);
});
afterAll(() => engine[Symbol.asyncDispose]());

function open(
  tiny: TinyModel,
  options: Partial<CalibrationOptions> = {},
): { model: Model; pass: Calibration; weights: WeightReader } {
  const model = createModel(tiny.config, 'config.json', tiny.source);
  const pass = new Calibration({
    model,
    engine,
    blas,
    windows: WINDOWS,
    path: tiny.label,
    batchTokens: 20,
    folder: tmpdir(),
    ...options,
  });
  return { model, pass, weights: weightsOf(tiny) };
}

function reference(tiny: TinyModel) {
  return WINDOWS.map((window) => referenceForward(tiny.config, (name) => tiny.source.values(name), [...window]));
}

async function replay(batches: AsyncIterable<{ data: Float32Array }>): Promise<number[]> {
  const all: number[] = [];
  for await (const { data } of batches) all.push(...data);
  return all;
}

async function hiddenRows(pass: Calibration): Promise<number[]> {
  const all: number[] = [];
  for await (const { hidden } of pass.hiddenStates()) all.push(...hidden);
  return all;
}

/** The final norm on the engine, the output head in plain loops. */
async function logits(tiny: TinyModel, model: Model, hidden: readonly number[]): Promise<number[]> {
  const { hiddenSize, vocabSize } = model.shape;
  const norm = model.finalNormGraph();
  const program = await engine.compile(norm.model, { key: norm.key });
  const data = Float32Array.from(hidden);
  const feeds: Record<string, NdArray> = { hidden: { dtype: 'F32', shape: [ROWS, hiddenSize], data } };
  for (const [input, name] of norm.weights) feeds[input] = { dtype: 'F32', shape: [hiddenSize], data: tiny.source.values(name)! };
  const normed = (await program.run(feeds))['hidden_out'].data as Float32Array;
  const head = tiny.source.values(model.outputHead)!;
  const out: number[] = [];
  for (let row = 0; row < ROWS; row++) {
    for (let v = 0; v < vocabSize; v++) {
      let sum = 0;
      for (let i = 0; i < hiddenSize; i++) sum += normed[row * hiddenSize + i] * head[v * hiddenSize + i];
      out.push(sum);
    }
  }
  return out;
}

function expectClose(actual: ArrayLike<number>, expected: ArrayLike<number>, tolerance: number): void {
  expect(actual.length).toBe(expected.length);
  let worst = 0;
  for (let i = 0; i < expected.length; i++) worst = Math.max(worst, Math.abs(actual[i] - expected[i]));
  expect(worst).toBeLessThan(tolerance);
}

const llama = tinyLlama('Llama with shared key/value heads');
const models = [
  llama,
  tinyLlama('Llama in BF16 with tied embeddings', { tie_word_embeddings: true }, { dtype: 'BF16' }),
  tinyGpt2('GPT-2 with learned positions'),
];

describe.each(models.map((tiny) => [tiny.label, tiny] as const))('%s', (_, tiny) => {
  it('enters every linear layer, and leaves every block, with what the slow forward pass gives', async () => {
    const { model, pass, weights } = open(tiny);
    await using _pass = pass;
    const slow = reference(tiny);
    await pass.start(weights);
    for (const block of model.blocks) {
      await using measured = await pass.measure(block, weights);
      expect([...measured.keys()]).toEqual(block.inputs);
      for (const site of block.sites) {
        const seen = await replay(measured.get(site.input)!.batches());
        expectClose(
          seen,
          slow.flatMap(({ linearInputs }) => linearInputs.get(site.name)!.flat()),
          FORWARD_TOLERANCE,
        );
      }
      await pass.advance(block, weights);
      expectClose(
        await hiddenRows(pass),
        slow.flatMap(({ hidden }) => hidden[block.index].flat()),
        FORWARD_TOLERANCE,
      );
    }
    expectClose(
      await logits(tiny, model, await hiddenRows(pass)),
      slow.flatMap((result) => result.logits.flat()),
      FORWARD_TOLERANCE,
    );
  });

  it('gives the Hessian of exactly the activations that it replays', async () => {
    const { model, pass, weights } = open(tiny);
    await using _pass = pass;
    await pass.start(weights);
    await using measured = await pass.measure(model.blocks[0], weights);
    for (const stats of measured.values()) {
      const n = stats.features;
      const x = await replay(stats.batches());
      expect([stats.tokenCount, x.length]).toEqual([ROWS, ROWS * n]);
      const expected = new Float64Array(n * n);
      for (let t = 0; t < ROWS; t++) {
        for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) expected[i * n + j] += (x[t * n + i] * x[t * n + j]) / ROWS;
      }
      expectClose(stats.hessian, expected, GRAM_TOLERANCE * Math.max(...expected.map(Math.abs)));
      for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) expect(stats.hessian[i * n + j]).toBe(stats.hessian[j * n + i]);
    }
  });
});

describe('a batch', () => {
  async function run(options: Partial<CalibrationOptions>) {
    const { model, pass, weights } = open(llama, options);
    await using _pass = pass;
    await pass.start(weights);
    await pass.advance(model.blocks[0], weights);
    await using measured = await pass.measure(model.blocks[1], weights);
    const stats = [...measured.values()];
    return {
      hessians: stats.map(({ hessian }) => hessian),
      activations: await Promise.all(stats.map((one) => replay(one.batches()))),
      hidden: await hiddenRows(pass),
    };
  }

  it('of padded windows gives what single windows give', async () => {
    const together = await run({ batchTokens: 1000 });
    const alone = await run({ batchTokens: 1 });
    expectClose(together.hidden, alone.hidden, FORWARD_TOLERANCE);
    for (const [i, activations] of together.activations.entries())
      expectClose(activations, alone.activations[i], FORWARD_TOLERANCE);
    for (const [i, hessian] of together.hessians.entries()) expectClose(hessian, alone.hessians[i], FORWARD_TOLERANCE);
  });

  it('gives the same bits from RAM, from a file and from both', async () => {
    const inRam = await run({});
    expect(await run({ ramBytes: 0 })).toEqual(inRam);
    expect(await run({ ramBytes: 6000 })).toEqual(inRam);
  });

  it('gives the same bits every time', async () => {
    expect(await run({})).toEqual(await run({}));
  });
});

it('measures one input at a time behind weights that changed before it', async () => {
  const { model, pass, weights } = open(llama);
  await using _pass = pass;
  await pass.start(weights);
  const [block] = model.blocks;
  const changed = block.sites.filter((site) => site.input === block.inputs[0]).map((site) => site.name);
  const halved: WeightReader = {
    ...weights,
    loadSite: async (site) => (await weights.loadSite(site)).map((value) => (changed.includes(site.name) ? value / 2 : value)),
  };
  await using before = await pass.measure(block, weights, { inputs: block.inputs.slice(0, 2) });
  await using after = await pass.measure(block, halved, { inputs: block.inputs.slice(0, 2) });
  expect([...after.keys()]).toEqual(block.inputs.slice(0, 2));
  expect(after.get(block.inputs[0])!.hessian).toEqual(before.get(block.inputs[0])!.hessian);
  expect(after.get(block.inputs[1])!.hessian).not.toEqual(before.get(block.inputs[1])!.hessian);
});

describe.each([
  ['in RAM', {}],
  ['on disk, where a wide input is made again', { ramBytes: 0 }],
])('inputs measured in stages, activations %s', (_, spool) => {
  it.each([
    ['llama', () => llama],
    ['gpt2', () => tinyGpt2('GPT-2')],
  ])('see what whole passes see, in both models and to the end: %s', async (_name, tiny) => {
    const run = async (staged: boolean) => {
      const { model, pass, weights } = open(tiny(), { followFloat: true, ...spool });
      await using _pass = pass;
      await pass.start(weights);
      const seen: number[][] = [];
      for (const block of model.blocks) {
        const changed = new Set<string>();
        const halved: WeightReader = {
          ...weights,
          loadSite: async (site) => (await weights.loadSite(site)).map((value) => (changed.has(site.name) ? value / 2 : value)),
        };
        for (const input of block.inputs) {
          await using measured = await pass.measure(block, halved, { inputs: [input], float: weights, staged });
          const { hessian, drift } = measured.get(input)!;
          seen.push([...hessian], [...drift!.cross], [...(drift!.means?.float ?? [])]);
          for (const site of block.sites) if (site.input === input) changed.add(site.name);
        }
        await pass.advance(block, halved);
        await pass.advanceFloat(block, weights);
      }
      for await (const { hidden } of pass.hiddenStates()) seen.push([...hidden]);
      return seen;
    };
    const [inStages, whole] = [await run(true), await run(false)];
    expect(inStages.length).toBe(whole.length);
    const worst = whole.map((values, i) =>
      values.reduce((most, value, j) => Math.max(most, Math.abs(value - inStages[i][j])), 0),
    );
    // onnxruntime fuses an addition with the norm after it only where both are in one graph.
    expect(Math.max(...worst)).toBeLessThan(1e-6);
  });
});

it('moves on in the pass that measures, when asked to', async () => {
  const run = async (together: boolean) => {
    const { model, pass, weights } = open(llama);
    await using _pass = pass;
    await pass.start(weights);
    const [block] = model.blocks;
    await using measured = await pass.measure(block, weights, { advance: together });
    if (!together) await pass.advance(block, weights);
    const hidden: Float32Array[] = [];
    for await (const window of pass.hiddenStates()) hidden.push(window.hidden.slice());
    return [[...measured.values()].map(({ hessian }) => hessian), hidden];
  };
  expect(await run(true)).toEqual(await run(false));
});

it('names the tensor whose size does not fit the graph', async () => {
  const { model, pass, weights } = open(llama);
  await using _pass = pass;
  await pass.start(weights);
  const short: WeightReader = { ...weights, loadSite: async () => new Float32Array(3) };
  await expect(pass.measure(model.blocks[0], short)).rejects.toThrow(/q_proj\.weight" has 3 values.*1024 .*\[weight-shape\]/);
});
