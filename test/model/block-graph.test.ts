import { describe, expect, test } from 'vitest';
import type { NdArray } from '../../src/compute/engine.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { LinearSite } from '../../src/model/model.ts';
import type { MemorySource } from '../support/memory-source.ts';
import { referenceForward } from '../support/reference-forward.ts';
import { f32, i32, openGraph } from '../support/run-graph.ts';
import { type TinyModel, tinyLlama, tinyModels } from '../support/tiny-models.ts';

/** Largest error, as a fraction of the largest value. */
const TOLERANCE = 1e-4;

const ROWS = [
  [3, 17, 40, 0, 8, 25],
  [11, 32, 5, 0, 0, 0],
];
const LENGTHS = [6, 3];

/** W as (outFeatures, inFeatures), element by element. */
function siteWeight(source: MemorySource, site: LinearSite): NdArray {
  const { outFeatures, inFeatures, transposed } = site;
  const stored = source.values(`${site.name}.weight`)!;
  const weight = Array.from({ length: outFeatures * inFeatures }, (_, i) => {
    const [n, k] = [Math.floor(i / inFeatures), i % inFeatures];
    return stored[transposed ? k * outFeatures + n : i];
  });
  return f32([outFeatures, inFeatures], weight);
}

function tensor(source: MemorySource, name: string): NdArray {
  return f32(source.tensors.get(name)!.shape, source.values(name)!);
}

/** Real tokens of each row, from (batch, sequence, features). */
function realTokens({ data, shape }: NdArray): number[][] {
  const [, sequence, features] = shape;
  return LENGTHS.flatMap((length, b) =>
    Array.from({ length }, (_, t) =>
      Array.from((data as Float32Array).subarray((b * sequence + t) * features).subarray(0, features)),
    ),
  );
}

function expectClose(actual: readonly (readonly number[])[], expected: readonly (readonly number[])[]): void {
  expect(actual.map((row) => row.length)).toEqual(expected.map((row) => row.length));
  const largest = Math.max(...expected.flat().map(Math.abs));
  const error = Math.max(...expected.map((row, t) => Math.max(...row.map((value, i) => Math.abs(value - actual[t][i])))));
  expect(error / largest).toBeLessThan(TOLERANCE);
}

describe.each(tinyModels())('the calibration graphs: $label', ({ config, source }: TinyModel) => {
  test('chained, they compute what the independent forward pass does, site inputs included, on right-padded rows', async () => {
    const model = createModel(config, 'config.json', source);
    const references = ROWS.map((row, b) => referenceForward(config, (name) => source.values(name), row.slice(0, LENGTHS[b])));
    const { hiddenSize } = model.shape;

    const table = source.values(model.tokenEmbedding)!;
    const places = model.positionEmbedding ? source.values(model.positionEmbedding)! : undefined;
    const embedded = ROWS.flatMap((row) =>
      row.flatMap((token, t) =>
        Array.from({ length: hiddenSize }, (_, i) => table[token * hiddenSize + i] + (places ? places[t * hiddenSize + i] : 0)),
      ),
    );
    let hidden = f32([2, ROWS[0].length, hiddenSize], embedded);
    for (const block of model.blocks) {
      const { model: blockModel, weights, siteInputs } = model.blockGraph(block);
      const feeds = [...weights].map(([input, from]) => {
        return [input, typeof from === 'string' ? tensor(source, from) : siteWeight(source, from)] as const;
      });
      const graph = await openGraph(blockModel);
      const results = await graph.run({ ...Object.fromEntries(feeds), hidden, lengths: i32([2], LENGTHS) });
      await graph.release();
      hidden = results['hidden_out'];
      expect(hidden.data.every(Number.isFinite)).toBe(true);
      expectClose(
        realTokens(hidden),
        references.flatMap((reference) => reference.hidden[block.index]),
      );
      expect([...siteInputs.keys()]).toEqual(block.inputs);
      for (const site of block.sites) {
        const seen = realTokens(results[siteInputs.get(site.input)!]);
        expectClose(
          seen,
          references.flatMap((reference) => reference.linearInputs.get(site.name)!),
        );
      }
    }

    const norm = model.finalNormGraph();
    const graph = await openGraph(norm.model);
    const rows = realTokens(hidden);
    const feeds = [...norm.weights].map(([input, name]) => [input, tensor(source, name)] as const);
    const normed = await graph.run({ ...Object.fromEntries(feeds), hidden: f32([rows.length, hiddenSize], rows.flat()) });
    await graph.release();
    const head = source.values(model.outputHead)!;
    const output = normed['hidden_out'].data as Float32Array;
    const logits = rows.map((_, t) =>
      Array.from({ length: model.shape.vocabSize }, (_, v) => {
        let sum = 0;
        for (let i = 0; i < hiddenSize; i++) sum += head[v * hiddenSize + i] * output[t * hiddenSize + i];
        return sum;
      }),
    );
    expectClose(
      logits,
      references.flatMap((reference) => reference.logits),
    );
  });
});

describe('the key of a calibration graph', () => {
  const keys = (changes: Record<string, unknown>): string[] => {
    const { config, source } = tinyLlama('keys', changes);
    const model = createModel(config, 'config.json', source);
    return model.blocks.map((block) => model.blockGraph(block).key);
  };

  test('is shared by blocks of one make', () => {
    expect(new Set(keys({ num_hidden_layers: 3 })).size).toBe(1);
  });

  test('tells apart whatever changes the graph', () => {
    const smol = { architectures: ['SmolLM3ForCausalLM'], tie_word_embeddings: true };
    const made = [
      keys({})[0],
      keys({ rms_norm_eps: 1e-6 })[0],
      keys({ hidden_act: 'gelu' })[0],
      keys({ rope_theta: 5000 })[0],
      keys({ max_position_embeddings: 128 })[0],
      keys({ intermediate_size: 20 })[0],
      keys({ num_attention_heads: 4 })[0],
      keys({ architectures: ['MistralForCausalLM'], sliding_window: 3 })[0],
      keys({ ...smol, no_rope_layers: [1, 0] })[1],
    ];
    expect(new Set(made).size).toBe(made.length);
  });

  test('tables of angles end with the longest window, and graphs for other lengths have other keys', () => {
    const { config, source } = tinyLlama('short');
    const model = createModel(config, 'config.json', source);
    const rows = (positions?: number) =>
      model.blockGraph(model.blocks[0], positions).model.graph.initializers.get('cos_cache')?.shape[0];
    expect(rows(7)).toBe(7);
    expect(rows()).toBe(model.shape.contextLength);
    expect(rows(model.shape.contextLength + 1)).toBe(model.shape.contextLength);
    expect(model.blockGraph(model.blocks[0], 7).key).not.toBe(model.blockGraph(model.blocks[0], 8).key);
  });

  test('equal keys come with equal graphs', () => {
    const { config, source } = tinyLlama('equal graphs');
    const model = createModel(config, 'config.json', source);
    const [first, second] = model.blocks.map((block) => model.blockGraph(block));
    expect(second.model.graph.nodes).toEqual(first.model.graph.nodes);
    expect(second.model.graph.inputs).toEqual(first.model.graph.inputs);
    expect(second.model.graph.outputs).toEqual(first.model.graph.outputs);
    expect([...second.weights.keys()]).toEqual([...first.weights.keys()]);
  });
});
