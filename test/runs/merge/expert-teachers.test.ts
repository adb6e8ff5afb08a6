/** Teachers kept as hidden states against teachers kept as logits: the same losses, at a fraction of the bytes. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { BlockRunner } from '../../../src/calibration/block-runner.ts';
import { embedTokens } from '../../../src/calibration/embed.ts';
import { HiddenStates } from '../../../src/calibration/hidden-states.ts';
import { Spool } from '../../../src/calibration/state-store.ts';
import type { Engine } from '../../../src/compute/engine.ts';
import { createEngine } from '../../../src/compute/ort.ts';
import { createBlas } from '../../../src/compute/ort-blas.ts';
import { createModel } from '../../../src/model/architectures/index.ts';
import type { WeightReader } from '../../../src/model/model.ts';
import { OutputHead } from '../../../src/runs/evaluate/output-head.ts';
import { Scorer } from '../../../src/runs/evaluate/scoring.ts';
import type { Forward } from '../../../src/runs/forward.ts';
import { scoredDistances } from '../../../src/runs/merge/experts/distances.ts';
import type { Sample } from '../../../src/runs/merge/experts/samples.ts';
import { teach } from '../../../src/runs/merge/experts/teachers.ts';
import { tinyLlama } from '../../support/tiny-models.ts';
import { readerOf } from '../../support/tiny-reader.ts';

/** Relative: the same products in float32, of other numbers of rows. */
const TOLERANCE = 1e-5;
const tiny = tinyLlama('base');
const model = createModel(tiny.config, 'config.json', tiny.source);
const base = readerOf(tiny);
const site = model.blocks[1].sites[2];
const wave = (length: number, scale: number) => Float32Array.from({ length }, (_, i) => scale * Math.sin(1.7 * i + 0.3));

/** One expert changed a layer, the other its output head and final norm. */
const layer = readerOf(tiny, { site: site.name, by: wave(site.outFeatures * site.inFeatures, 0.3) });
const head: WeightReader = {
  ...base,
  load: async (name) => {
    const values = await base.load(name);
    return name === model.outputHead || name === 'model.norm.weight'
      ? values.map((value, i) => value + 0.2 * Math.sin(i))
      : values;
  },
  loadRows: async (name, start, end) => {
    const all = await head.load(name);
    const columns = tiny.source.tensors.get(name)!.shape[1];
    return all.slice(start * columns, end * columns);
  },
};
const EXPERTS = [layer, head];
const SAMPLES: Sample[] = [
  [0, 9, 0],
  [1, 7, 3],
  [0, 12, 5],
  [1, 4, 0],
].map(([expert, length, countedFrom], s) => ({
  expert,
  tokens: Int32Array.from({ length }, (_, i) => (11 * s + 5 * i + 2) % 41),
  countedFrom,
}));

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

/** Logits of all rows of a sample, kept whole. */
async function logitsOf(forward: Forward, weights: WeightReader, { tokens }: Sample): Promise<Float32Array> {
  await using states = new HiddenStates([tokens], model.shape.hiddenSize, 64, forward.spool);
  await embedTokens(model, weights, states, { path: 'tiny' });
  const runner = new BlockRunner(model, engine, 'tiny');
  for (const block of model.blocks) await runner.advance(states, block, weights);
  const data = await states.store.read(0, tokens.length);
  const output = new OutputHead(model, weights, engine, forward.blas);
  return (await output.logits({ rows: tokens.length, columns: model.shape.hiddenSize, data })).data;
}

it('what experts say is what they said, whatever of them differs from the base, and so are all losses', async () => {
  await using spool = new Spool();
  const forward: Forward = { model, engine, blas: createBlas(engine), spool, path: 'tiny' };
  await using teachers = await teach(forward, { samples: SAMPLES, expertCount: 2, weightsOf: (k) => EXPERTS[k], middle: false });
  const scorers = [new Scorer(), new Scorer()];
  const divergences: number[][] = [[], []];
  const v = model.shape.vocabSize;
  for (const lesson of teachers.lessons) {
    const { expert, tokens, countedFrom } = lesson.sample;
    const whole = (await logitsOf(forward, EXPERTS[expert], lesson.sample)).subarray(countedFrom * v);
    const again = await teachers.logits(lesson, 0, lesson.rows);
    expect(again.rows).toBe(tokens.length - countedFrom);
    for (let i = 0; i < whole.length; i++) expect(Math.abs(again.data[i] - whole[i])).toBeLessThan(TOLERANCE * 10);
    const own = (await logitsOf(forward, base, lesson.sample)).subarray(countedFrom * v);
    const blas = { rows: lesson.rows, columns: v };
    divergences[expert].push(await forward.blas.meanKl({ ...blas, data: whole.slice() }, { ...blas, data: own.slice() }));
    scorers[expert].add(own, tokens.subarray(countedFrom + 1), v, whole);
  }
  const measured = await scoredDistances(forward, teachers, teachers.lessons, 2, base);
  for (const [k, { kl, perplexity }] of measured.entries()) {
    const wanted = divergences[k].reduce((sum, value) => sum + value, 0) / divergences[k].length;
    expect(wanted).toBeGreaterThan(1e-3);
    expect(Math.abs(kl - wanted) / wanted).toBeLessThan(TOLERANCE * 10);
    expect(Math.abs(perplexity / scorers[k].score.perplexity - 1)).toBeLessThan(TOLERANCE);
  }
});

it('takes four bytes for each feature of a counted row, not for each token of the vocabulary', async () => {
  const allocated: number[] = [];
  const spool = new Spool();
  const counting = new Proxy(spool, {
    get: (target, name) =>
      name === 'allocate'
        ? (rows: number, columns: number) => {
            allocated.push(rows * columns);
            return target.allocate(rows, columns);
          }
        : Reflect.get(target, name),
  });
  const forward: Forward = { model, engine, blas: createBlas(engine), spool: counting, path: 'tiny' };
  await using _teachers = await teach(forward, { samples: SAMPLES, expertCount: 2, weightsOf: (k) => EXPERTS[k], middle: false });
  const rows = SAMPLES.reduce((sum, { tokens, countedFrom }) => sum + tokens.length - countedFrom, 0);
  const tokens = SAMPLES.reduce((sum, sample) => sum + sample.tokens.length, 0);
  const { hiddenSize } = model.shape;
  expect(allocated.reduce((sum, size) => sum + size, 0)).toBe((rows + tokens) * hiddenSize);
  await spool[Symbol.asyncDispose]();
});
