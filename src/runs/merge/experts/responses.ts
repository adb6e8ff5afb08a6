/** Experts write the responses that their prompts lack, so that prompts alone are enough to learn from (merging.md 6.2). */
import { appendFile, readFile } from 'node:fs/promises';
import { CachedDecoder, cacheBytesPerToken } from '../../../calibration/cached-decoder.ts';
import { Random } from '../../../compute/random.ts';
import type { WeightReader } from '../../../model/model.ts';
import { OutputHead } from '../../evaluate/output-head.ts';
import type { Forward } from '../../forward.ts';
import { KeptWeights } from '../../kept-weights.ts';
import { drawToken, likeliestToken } from '../../token-choice.ts';
import type { Sample } from './samples.ts';

/** Tokens of prompts, pads included, that are read at once. */
const PROMPT_TOKENS = 2048;

export interface ResponseOptions {
  readonly labels: readonly string[];
  /** Weights of an expert. */
  readonly weightsOf: (expert: number) => WeightReader;
  /** Most tokens of a response. */
  readonly length: number;
  /** Most tokens of a prompt with its response. */
  readonly sequenceLength: number;
  /** 0: the likeliest token each time. Above: drawn from the softmax of logits over it. */
  readonly temperature: number;
  /** What ends a response, by expert. */
  readonly endTokens: readonly ReadonlySet<number>[];
  readonly seed: number;
  /** For weights and caches. */
  readonly memoryBytes: number;
  /** Responses that are done are kept here, a JSON line each, for a run that is interrupted. */
  readonly path: string;
  /** Called before the file is written. */
  readonly keep: () => Promise<void>;
  readonly onResponse?: (done: number, total: number) => void;
}

interface Written {
  /** Place among all samples. */
  readonly sample: number;
  readonly tokens: readonly number[];
}

/** The samples with every open prompt answered by its expert; what is written before an end token counts, and what predicts it. */
export async function answerPrompts(forward: Forward, samples: readonly Sample[], options: ResponseOptions): Promise<Sample[]> {
  const responses = await keptResponses(options.path);
  const open = samples.flatMap((sample, i) => (sample.open ? [i] : []));
  let done = responses.size;
  for (const expert of options.labels.keys()) {
    // Cut before what is done is left out: a product of other rows may round otherwise, and a resumed run is to write the same.
    const batches = batchesOf(
      open.filter((i) => samples[i].expert === expert),
      samples,
      forward,
      options,
    ).filter((batch) => !batch.every((i) => responses.has(i)));
    if (batches.length === 0) continue;
    const weights = new KeptWeights(options.weightsOf(expert), options.memoryBytes / 2);
    const head = new OutputHead(forward.model, weights, forward.engine, forward.blas, options.memoryBytes / 4);
    for (const batch of batches) {
      forward.signal?.throwIfAborted();
      const written = await writeBatch(forward, weights, head, batch, samples, options);
      await options.keep();
      await appendFile(options.path, written.map((response) => `${JSON.stringify(response)}\n`).join(''), { flush: true });
      for (const { sample, tokens } of written) responses.set(sample, tokens);
      done += batch.length;
      options.onResponse?.(done, open.length);
    }
  }
  return samples.map((sample, i) => {
    if (!sample.open) return sample;
    const { open: _, ...prompt } = sample;
    const tokens = Int32Array.of(...sample.tokens, ...responses.get(i)!);
    return { ...prompt, tokens, countedFrom: sample.tokens.length - 1 };
  });
}

/** Finished responses of an earlier run by sample; a line that was torn is none. */
async function keptResponses(path: string): Promise<Map<number, readonly number[]>> {
  const text = await readFile(path, 'utf8').catch(() => '');
  const responses = new Map<number, readonly number[]>();
  for (const line of text.split('\n').slice(0, -1)) {
    try {
      const { sample, tokens } = JSON.parse(line) as Written;
      responses.set(sample, tokens);
    } catch {
      // Written again.
    }
  }
  return responses;
}

/** Prompts of like lengths together, the longest batch first, so many that prompts and caches keep to their bounds. */
function batchesOf(
  own: readonly number[],
  samples: readonly Sample[],
  { model }: Forward,
  { length, memoryBytes }: ResponseOptions,
): number[][] {
  const most = Math.max(1, Math.floor(memoryBytes / 4 / cacheBytesPerToken(model)));
  const sorted = own.toSorted((a, b) => samples[b].tokens.length - samples[a].tokens.length || a - b);
  const batches: number[][] = [];
  for (let first = 0; first < sorted.length; ) {
    const longest = samples[sorted[first]].tokens.length;
    const count = Math.max(1, Math.min(Math.floor(PROMPT_TOKENS / longest), Math.floor(most / (longest + length))));
    batches.push(sorted.slice(first, first + count));
    first += count;
  }
  return batches;
}

async function writeBatch(
  { model, engine, path, signal }: Forward,
  weights: WeightReader,
  head: OutputHead,
  batch: readonly number[],
  samples: readonly Sample[],
  { labels, length, sequenceLength, temperature, endTokens, seed }: ResponseOptions,
): Promise<Written[]> {
  const { hiddenSize, vocabSize } = model.shape;
  const prompts = batch.map((i) => samples[i].tokens);
  const rows = batch.map((i) => ({
    sample: i,
    tokens: [] as number[],
    room: Math.min(length, sequenceLength - samples[i].tokens.length),
    random: new Random(seed, `response ${labels[samples[i].expert]} ${i}`),
    ended: false,
  }));
  const room = rows.reduce((most, row) => Math.max(most, row.room), 0);
  const decoder = new CachedDecoder({ model, engine, weights, path, prompts, room });
  let states = await decoder.begin();
  for (let step = 0; ; step++) {
    const logits = await head.logits({ rows: rows.length, columns: hiddenSize, data: states });
    const tokens = rows.map((row, r) => {
      if (row.ended) return undefined;
      const own = logits.data.subarray(r * vocabSize, (r + 1) * vocabSize);
      const token = temperature === 0 ? likeliestToken(own) : drawToken(own, row.random, temperature);
      if (endTokens[samples[row.sample].expert].has(token)) row.ended = true;
      else row.tokens.push(token);
      if (row.tokens.length >= row.room) row.ended = true;
      return row.ended ? undefined : token;
    });
    if (rows.every(({ ended }) => ended)) break;
    signal?.throwIfAborted();
    if (step + 1 >= room) break;
    states = await decoder.next(tokens);
  }
  return rows.map(({ sample, tokens }) => ({ sample, tokens }));
}
