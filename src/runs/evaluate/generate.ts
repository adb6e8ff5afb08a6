/** Greedy generation through a written ONNX artifact: the shortest proof that what was written runs. */
import type { Engine, NdArray } from '../../compute/engine.ts';
import type { Model } from '../../model/model.ts';
import { likeliestToken } from '../token-choice.ts';
import { promptFeeds } from './logits-source.ts';

export interface GenerateOptions {
  /** Most tokens to add. */
  readonly maxNewTokens: number;
  /** Generation stops before this token is added. */
  readonly endToken?: number;
}

/** Continues `prompt` with the likeliest token each time; a prefill, then one token a run on the cache. Returns the new tokens. */
export async function generate(
  engine: Engine,
  model: Model,
  onnxPath: string,
  prompt: Int32Array,
  options: GenerateOptions,
): Promise<number[]> {
  await using program = await engine.open(onnxPath);
  const { vocabSize, blockCount, contextLength } = model.shape;
  const generated: number[] = [];
  let feeds = promptFeeds(model, prompt);
  const room = Math.min(options.maxNewTokens, contextLength - prompt.length);
  for (let step = 0; step < room; step++) {
    const results = await program.run(feeds);
    const logits = results['logits'].data as Float32Array;
    const token = likeliestToken(logits.subarray(logits.length - vocabSize));
    if (token === options.endToken) break;
    generated.push(token);
    feeds = nextFeeds(results, blockCount, token, prompt.length + step + 1);
  }
  return generated;
}

/** Feeds of the run after one: its token, the length with that token, and the caches the run before gave. */
export function nextFeeds(
  results: Record<string, NdArray>,
  blockCount: number,
  token: number,
  length: number,
): Record<string, NdArray> {
  const feeds: Record<string, NdArray> = {
    input_ids: { dtype: 'I64', shape: [1, 1], data: BigInt64Array.of(BigInt(token)) },
    attention_mask: { dtype: 'I64', shape: [1, length], data: new BigInt64Array(length).fill(1n) },
  };
  for (let block = 0; block < blockCount; block++) {
    for (const kind of ['key', 'value']) feeds[`past_key_values.${block}.${kind}`] = results[`present.${block}.${kind}`];
  }
  return feeds;
}
