import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { NdArray } from '../../src/compute/engine.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { Model } from '../../src/model/model.ts';
import { referenceForward } from '../support/reference-forward.ts';
import { f32, i64, type OpenGraph, openGraph } from '../support/run-graph.ts';
import { type TinyModel, tinyModels } from '../support/tiny-models.ts';

/** Largest error of a logit, as a fraction of the largest logit: float32 through a few layers. */
const TOLERANCE = 1e-4;

const TOKENS = [3, 17, 40, 0, 8, 25, 11, 32, 5];

/** Runs calls one after another and keeps the cache between them. */
class Decoder {
  readonly #model: Model;
  readonly #graph: OpenGraph;
  #cache: Record<string, NdArray> = {};

  constructor(model: Model, graph: OpenGraph, batch: number) {
    this.#model = model;
    this.#graph = graph;
    const { blockCount, kvHeadCount, headDim } = model.shape;
    for (let i = 0; i < blockCount; i++) {
      for (const part of ['key', 'value']) {
        this.#cache[`past_key_values.${i}.${part}`] = f32([batch, kvHeadCount, 0, headDim], []);
      }
    }
  }

  /** Logits of rows of new tokens, [row][token]; `mask` covers all columns so far. */
  async step(rows: readonly (readonly number[])[], mask: readonly (readonly number[])[]): Promise<number[][][]> {
    const results = await this.#graph.run({
      input_ids: i64([rows.length, rows[0].length], rows.flat()),
      attention_mask: i64([mask.length, mask[0].length], mask.flat()),
      ...this.#cache,
    });
    this.#cache = Object.fromEntries(
      Object.entries(results)
        .filter(([name]) => name.startsWith('present.'))
        .map(([name, value]) => [name.replace('present', 'past_key_values'), value]),
    );
    const { vocabSize } = this.#model.shape;
    const logits = results['logits'].data as Float32Array;
    return rows.map((row, b) =>
      row.map((_, t) => Array.from(logits.subarray((b * row.length + t) * vocabSize, (b * row.length + t + 1) * vocabSize))),
    );
  }
}

function expectClose(actual: readonly (readonly number[])[], expected: readonly (readonly number[])[]): void {
  expect(actual.length).toBe(expected.length);
  const largest = Math.max(...expected.flat().map(Math.abs));
  const error = Math.max(...expected.map((row, t) => Math.max(...row.map((value, i) => Math.abs(value - actual[t][i])))));
  expect(error / largest).toBeLessThan(TOLERANCE);
}

const ones = (count: number): number[] => new Array<number>(count).fill(1);

describe.each(tinyModels())('the exported decoder: $label', ({ config, source }: TinyModel) => {
  let model: Model;
  let graph: OpenGraph;
  const reference = (tokens: readonly number[]) => referenceForward(config, (name) => source.values(name), tokens).logits;

  beforeAll(async () => {
    model = createModel(config, 'config.json', source);
    graph = await openGraph(model.decoderGraph(source));
  });
  afterAll(() => graph?.release());

  test('computes the logits of the independent forward pass', async () => {
    const [logits] = await new Decoder(model, graph, 1).step([TOKENS], [ones(TOKENS.length)]);
    expectClose(logits, reference(TOKENS));
  });

  test('computes the same in pieces with a cache as at once', async () => {
    const decoder = new Decoder(model, graph, 1);
    const pieces = [TOKENS.slice(0, 4), TOKENS.slice(4, 6), ...TOKENS.slice(6).map((token) => [token])];
    const logits: number[][] = [];
    for (const piece of pieces) {
      logits.push(...(await decoder.step([piece], [ones(logits.length + piece.length)]))[0]);
    }
    expectClose(logits, reference(TOKENS));
  });

  test('pads to the right change nothing, neither at once nor when the rows go on', async () => {
    const decoder = new Decoder(model, graph, 2);
    const short = TOKENS.slice(2, 6);
    const prompt = await decoder.step([TOKENS.slice(0, 6), [...short, 0, 0]], [ones(6), [...ones(4), 0, 0]]);
    expectClose(prompt[0], reference(TOKENS.slice(0, 6)));
    expectClose(prompt[1].slice(0, 4), reference(short));
    const next = await decoder.step([[TOKENS[6]], [9]], [ones(7), [...ones(4), 0, 0, 1]]);
    expectClose(next[0], reference(TOKENS.slice(0, 7)).slice(-1));
    expectClose(next[1], reference([...short, 9]).slice(-1));
  });
});
