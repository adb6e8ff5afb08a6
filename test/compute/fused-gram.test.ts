import * as tf from '@tensorflow/tfjs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Engine } from '../../src/compute/engine.ts';
import { FusedGrams, fusesGrams } from '../../src/compute/fused-gram.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { createTfjsEngine } from '../../src/compute/tfjs.ts';
import { GraphBuilder } from '../../src/graph/builder.ts';
import { naiveBlas } from '../support/naive-blas.ts';
import { f32 } from '../support/run-graph.ts';

let engines: readonly Engine[];
beforeAll(async () => {
  engines = [await createEngine({ threads: 1 }), await createTfjsEngine({ tf, threads: 1 })];
});
afterAll(async () => {
  for (const engine of engines) await engine[Symbol.asyncDispose]();
});

/** `twice` = x + x, (batch, sequence, features). */
function doubling(features: number) {
  const builder = new GraphBuilder('doubling');
  const x = builder.input('x', 'F32', ['batch', 'sequence', features]);
  builder.output('twice', builder.add(x, x));
  return builder.build();
}

/** Small integers, whose products and sums are exact. */
const integers = (count: number): number[] => Array.from({ length: count }, (_, i) => ((i * 37) % 15) - 7);

describe('sums made where their tokens are made', () => {
  // One panel; two, of which the second is not full.
  it.each([3, 1030])('are exactly those of the tokens alone, over runs: %d features', async (features) => {
    for (const engine of engines) {
      const grams = new FusedGrams(doubling(features), [{ value: 'twice', features }]);
      const program = await engine.compile(grams.model);
      const expected = naiveBlas().gram(features);
      for (const lengths of [Int32Array.of(2, 1), Int32Array.of(2, 2)]) {
        const x = integers(2 * 2 * features);
        // A pad may hold anything, even what is no number.
        if (lengths[1] === 1) x.fill(Number.NaN, 3 * features);
        const into = grams.memory();
        await program.run({ x: f32([2, 2, features], x), ...grams.feeds(lengths, 2) }, { outputs: grams.outputs, into });
        expect(grams.add(into, lengths[0] + lengths[1])).toEqual([]);
        const rows = lengths[0] + lengths[1];
        await expected.add({ rows, columns: features, data: Float32Array.from(x.slice(0, rows * features), (v) => 2 * v) });
      }
      expect(grams.finish('twice')).toEqual(expected.finish());
    }
  });

  it('tell which value broke', async () => {
    const grams = new FusedGrams(doubling(2), [{ value: 'twice', features: 2 }]);
    const program = await engines[0].compile(grams.model);
    const into = grams.memory();
    const feeds = { x: f32([1, 1, 2], [1, Number.POSITIVE_INFINITY]), ...grams.feeds(Int32Array.of(1), 1) };
    await program.run(feeds, { outputs: grams.outputs, into });
    expect(grams.add(into, 1)).toMatchObject([{ value: 'twice', features: 2 }]);
  });

  it('are not for the CPU, which reads its operands in place', () => {
    expect(fusesGrams(engines[0])).toBe(false);
  });
});
