/** How far models are from the experts on their samples, which is what a learned merge makes small (merging.md 6.3). */
import type { Matrix } from '../../../compute/blas.ts';
import type { WeightReader } from '../../../model/model.ts';
import { Scorer } from '../../evaluate/scoring.ts';
import type { Forward } from '../../forward.ts';
import { forwardPass, type Lesson } from './forward-pass.ts';
import type { Teachers } from './teachers.ts';

/** How far a model is from an expert on its samples. */
export interface Distance {
  /** Mean KL(expert || model) per counted row, in nats; mean over samples. */
  readonly kl: number;
  /** Share of counted rows where both rank the same token first. */
  readonly agreement: number;
}

/** A distance, and how well the samples themselves are predicted. */
export interface ScoredDistance extends Distance {
  /** Of counted rows that a token follows, of the model. */
  readonly perplexity: number;
  /** The same of the expert. */
  readonly expertPerplexity: number;
}

/** What is summed up of one expert's samples. */
interface Tally {
  kl: number;
  samples: number;
  agreed: number;
  rows: number;
}

/** Logits of the expert and of the model for counted rows of a lesson, the first of them row `start`. */
type OnRows = (lesson: Lesson, start: number, target: Matrix, own: Matrix) => void;

/** Distance of a model from every expert, over lessons of all of them. */
export async function distances(
  forward: Forward,
  teachers: Teachers,
  lessons: readonly Lesson[],
  expertCount: number,
  weights: WeightReader,
  onRows?: OnRows,
): Promise<Distance[]> {
  const sums = Array.from({ length: expertCount }, (): Tally => ({ kl: 0, samples: 0, agreed: 0, rows: 0 }));
  await using pass = await forwardPass(forward, weights, lessons);
  for await (const { lesson, start, values } of pass.logits()) {
    const target = await teachers.logits(lesson, start, start + values.rows);
    const sum = sums[lesson.sample.expert];
    sum.kl += ((await forward.blas.meanKl(target, values)) * values.rows) / lesson.rows;
    sum.agreed += agreements(target, values);
    sum.rows += values.rows;
    if (start === 0) sum.samples++;
    onRows?.(lesson, start, target, values);
  }
  return sums.map(({ kl, samples, agreed, rows }) => ({
    kl: samples === 0 ? 0 : kl / samples,
    agreement: agreed / Math.max(1, rows),
  }));
}

/** The same with perplexities, which take as long again where the vocabulary is large. */
export async function scoredDistances(...given: Parameters<typeof distances>): Promise<ScoredDistance[]> {
  const [, , , expertCount] = given;
  const scores = Array.from({ length: expertCount }, () => ({ own: new Scorer(), expert: new Scorer() }));
  const measured = await distances(given[0], given[1], given[2], expertCount, given[4], ({ sample }, start, target, own) => {
    const next = sample.countedFrom + start + 1;
    const tokens = sample.tokens.subarray(next, next + own.rows);
    const score = scores[sample.expert];
    score.own.add(own.data, tokens, own.columns);
    score.expert.add(target.data, tokens, target.columns);
  });
  return measured.map((distance, k) => ({
    ...distance,
    perplexity: scores[k].own.score.perplexity,
    expertPerplexity: scores[k].expert.score.perplexity,
  }));
}

/** Mean over experts. */
export function meanKl(all: readonly Distance[]): number {
  return all.reduce((sum, { kl }) => sum + kl, 0) / all.length;
}

function agreements(a: Matrix, b: Matrix): number {
  let count = 0;
  for (let row = 0; row < a.rows; row++) if (argmax(a, row) === argmax(b, row)) count++;
  return count;
}

function argmax({ data, columns }: Matrix, row: number): number {
  let best = 0;
  for (let j = 1; j < columns; j++) if (data[row * columns + j] > data[row * columns + best]) best = j;
  return best;
}
