/** Every expert once over its own samples, the prompts among them answered first: what merged models are compared with. */
import { join } from 'node:path';
import type { TextValues } from '../../../methods/merge/learned.ts';
import type { Forward } from '../../forward.ts';
import type { RunHooks } from '../../run.ts';
import type { MergeRecipe } from '../recipe.ts';
import type { MergeWeights } from '../weights.ts';
import type { PreparedText } from './prepare.ts';
import { answerPrompts } from './responses.ts';
import { type Teachers, teach } from './teachers.ts';

/** Where a run keeps what it would be long in doing again. */
export interface LearningPlace {
  readonly folder: string;
  /** Called before the first file is written. */
  readonly keep: () => Promise<void>;
}

export interface Questions {
  readonly text: PreparedText;
  readonly values: TextValues;
  /** Keep the states after the middle block. */
  readonly middle: boolean;
  readonly recipe: MergeRecipe;
  /** For weights and caches while experts write. */
  readonly memoryBytes: number;
  readonly place: LearningPlace;
  readonly hooks: RunHooks;
}

/** Lessons are in the order of the samples, those that are held out last. */
export async function askExperts(forward: Forward, weights: MergeWeights, questions: Questions): Promise<Teachers> {
  const { text, values, middle, recipe, memoryBytes, place, hooks } = questions;
  const { labels, samples, sequenceLength, endTokens } = text;
  const report = (phase: string) => (done: number, total: number) => hooks.progress?.({ phase, done, total });
  const weightsOf = (k: number) => weights.expert(k);
  const answered = await answerPrompts(forward, [...samples.training, ...samples.heldOut], {
    labels,
    weightsOf,
    length: values.response_length,
    sequenceLength,
    temperature: values.response_temperature,
    endTokens,
    seed: recipe.seed,
    memoryBytes,
    path: join(place.folder, 'responses.jsonl'),
    keep: place.keep,
    onResponse: report('responses'),
  });
  return await teach(forward, {
    samples: answered,
    expertCount: labels.length,
    weightsOf,
    middle,
    onExpert: (k) => report(`teacher ${labels[k]}`)(k, labels.length),
  });
}
