import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import { f32, i64, openGraph } from '../support/run-graph.ts';

const data = process.env['PCOMP_TEST_DATA'] ?? '../shared/data';
const available = existsSync(data);
if (!available) console.warn(`exports of trained models are not tested: ${data} is absent (PCOMP_TEST_DATA)`);

/**
 * Perplexity of the exported decoder on the evaluation stories: windows of `length` scored tokens, nothing carried between
 * them, lines ending as they did when the published figures were taken.
 */
async function perplexity(folder: string, length: number, withPrefix: boolean): Promise<number> {
  const path = join(data, folder);
  await using source = await openCheckpoint(path);
  const model = createModel(JSON.parse(await readFile(join(path, 'config.json'), 'utf8')), join(path, 'config.json'), source);
  const { vocabSize, blockCount, kvHeadCount, headDim } = model.shape;
  const tokenizer = await loadTokenizer(path, vocabSize);
  const text = await readFile(join(data, 'text/tinystories.valid.30k.txt'), 'utf8');
  const tokens = Array.from(tokenizer.encode(text.replaceAll('\r\n', '\n'))).slice(withPrefix ? 0 : tokenizer.prefix.length);
  const graph = await openGraph(model.decoderGraph(source));
  const cache = Array.from({ length: blockCount }, (_, i) =>
    ['key', 'value'].map((part) => `past_key_values.${i}.${part}`),
  ).flat();
  let nll = 0;
  let scored = 0;
  for (let start = 0; start + 1 < tokens.length; start += length) {
    const window = tokens.slice(start, start + length + 1);
    const input = window.slice(0, -1);
    const results = await graph.run({
      input_ids: i64([1, input.length], input),
      attention_mask: i64([1, input.length], new Array<number>(input.length).fill(1)),
      ...Object.fromEntries(cache.map((name) => [name, f32([1, kvHeadCount, 0, headDim], [])])),
    });
    const logits = results['logits'].data as Float32Array;
    input.forEach((_, t) => {
      const row = logits.subarray(t * vocabSize, (t + 1) * vocabSize);
      let largest = Number.NEGATIVE_INFINITY;
      for (const value of row) largest = Math.max(largest, value);
      let sum = 0;
      for (const value of row) sum += Math.exp(value - largest);
      nll += Math.log(sum) + largest - row[window[t + 1]];
      scored++;
    });
  }
  await graph.release();
  return Math.exp(nll / scored);
}

describe.skipIf(!available)('the export of a trained model has the perplexity that was measured elsewhere', () => {
  test.each([
    ['stories260k', 511, true, 5.552],
    ['lab/base', 256, false, 40.13],
  ])('%s', async (folder, length, withPrefix, published) => {
    const measured = await perplexity(folder, length, withPrefix);
    expect(Math.abs(measured / published - 1)).toBeLessThan(1e-3);
  });
});
