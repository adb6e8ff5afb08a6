/** One stage of Expert Merging: gradient descent on coefficients, so that the merged model says what each expert says (merging.md 6.4). */
import { ModelGradient } from '../../../calibration/model-gradient.ts';
import type { StateStore } from '../../../calibration/state-store.ts';
import { type AdamState, AdamW } from '../../../compute/optim/adam.ts';
import { clipByNorm, cosine, cosineWithRestarts } from '../../../compute/optim/schedule.ts';
import { Random } from '../../../compute/random.ts';
import { type Coefficients, chunkProducts } from '../../../methods/merge/expert-merging/coefficients.ts';
import type { HeadObjective, WeightReader } from '../../../model/model.ts';
import { decodeFloats, encodeFloats } from '../../float-text.ts';
import type { Forward } from '../../forward.ts';
import type { MergeWeights } from '../weights.ts';
import { distances, meanKl } from './distances.ts';
import { type Lesson, middleBlock } from './forward-pass.ts';
import { HeadLoss } from './head-loss.ts';
import type { MiddleStates, Teachers } from './teachers.ts';

/** Tokens that run backward at once. */
const BATCH_TOKENS = 2048;
/** Updates between two looks at the held-out samples. */
const LOOK_EVERY = 5;

/** Part of the rate at an update. */
const SCHEDULES = {
  cosine,
  restarts: (update: number) => cosineWithRestarts(update, 50, 0.1),
  constant: () => 1,
} as const;

export interface StageRules {
  /** `epoch`: every expert gives as many samples as the one with most, all shuffled, and each is seen once, as published. */
  readonly updates: number | 'epoch';
  /** Sequences of an update; what an epoch leaves for its last one counts as that part of an update. */
  readonly batch: number;
  readonly learningRate: number;
  readonly weightDecay: number;
  readonly schedule: 'cosine' | 'restarts' | 'constant';
  /** Longest gradient by the parameters; absent: any. */
  readonly clipNorm?: number;
  readonly gamma: number;
  /** Weight of the hidden states' distance; 0: none. */
  readonly hiddenWeight: number;
  readonly objective: HeadObjective;
  /** Keep the iterate with the least held-out divergence; otherwise the last. */
  readonly selects: boolean;
}

/** What a stage works on. */
export interface Stage {
  readonly forward: Forward;
  readonly teachers: Teachers;
  readonly weights: MergeWeights;
  readonly expertCount: number;
  readonly training: readonly Lesson[];
  /** Empty: iterates are judged by their training loss. */
  readonly heldOut: readonly Lesson[];
  readonly coefficients: Coefficients;
  /** The model with the coefficients as they are. */
  readonly learned: WeightReader;
  readonly seed: number;
  readonly name: string;
  readonly onUpdate: (done: number, total: number, loss: number) => void;
  /** Where an interrupted stage was. */
  readonly resumed?: StageState | undefined;
  /** Called after every update. */
  readonly keep?: (state: StageState) => Promise<void>;
}

/** A stage after some updates: all that a run needs to go on as if it had never stopped. */
export interface StageState extends StageResult {
  /** Updates done. Which samples come next follows from it. */
  readonly update: number;
  /** As `encodeFloats` writes them. */
  readonly parameters: string;
  readonly optimizer: AdamState;
  /** The best iterate so far. */
  readonly best?: { readonly kl: number; readonly parameters: string };
}

export interface StageResult {
  /** Training loss of every update, before it, regularizer included. */
  readonly losses: readonly number[];
  /** Held-out divergence after so many updates. */
  readonly looks: readonly { readonly update: number; readonly kl: number }[];
  /** Coefficients that were moved back into their range, over all updates. */
  readonly clamped: number;
}

/** Moves `stage.coefficients`. */
export async function learnStage(stage: Stage, rules: StageRules): Promise<StageResult> {
  const { coefficients, forward } = stage;
  const optimizer = new AdamW(coefficients.parameters.length, rules);
  const head = await HeadLoss.open(forward, stage.learned, rules.objective);
  const batches = lessonOrder(stage, rules.batch);
  const draws = rules.updates === 'epoch' ? epochOf(stage) : undefined;
  const updates = draws ? Math.ceil(draws.length / rules.batch) : Number(rules.updates);
  const { resumed } = stage;
  const losses = [...(resumed?.losses ?? [])];
  const looks = [...(resumed?.looks ?? [])];
  let clamped = resumed?.clamped ?? 0;
  let best = resumed?.best && { kl: resumed.best.kl, parameters: decodeFloats(resumed.best.parameters) };
  if (resumed) {
    coefficients.parameters.set(decodeFloats(resumed.parameters));
    optimizer.restore(resumed.optimizer);
  }
  const judge = (kl: number): void => {
    if (kl < (best?.kl ?? Number.POSITIVE_INFINITY)) best = { kl, parameters: coefficients.parameters.slice() };
  };
  const look = async (update: number): Promise<void> => {
    if (!rules.selects || stage.heldOut.length === 0) return;
    const kl = meanKl(await distances(forward, stage.teachers, stage.heldOut, stage.expertCount, stage.learned));
    looks.push({ update, kl });
    judge(kl);
  };
  if (resumed === undefined) await look(0);
  for (let update = resumed?.update ?? 0; update < updates; update++) {
    forward.signal?.throwIfAborted();
    const lessons = draws ? draws.slice(update * rules.batch, (update + 1) * rules.batch) : batches(update);
    const { loss, gradient } = await step(stage, rules, head, lessons);
    const regularizer = coefficients.regularize((rules.gamma * lessons.length) / rules.batch, gradient);
    if (rules.selects && stage.heldOut.length === 0) judge(loss);
    const total = loss + regularizer;
    if (!Number.isFinite(total)) throw new Error(`the loss of ${stage.name} is ${total} at update ${update}`);
    losses.push(total);
    coefficients.toParameters(gradient);
    if (rules.clipNorm !== undefined) clipByNorm(gradient, rules.clipNorm);
    const factor = SCHEDULES[rules.schedule](update, updates);
    optimizer.step(coefficients.parameters, gradient, factor);
    clamped += coefficients.clamp();
    stage.onUpdate(update + 1, updates, total);
    if ((update + 1) % LOOK_EVERY === 0 || update + 1 === updates) await look(update + 1);
    await stage.keep?.({
      update: update + 1,
      parameters: encodeFloats(coefficients.parameters),
      optimizer: optimizer.state,
      ...(best ? { best: { kl: best.kl, parameters: encodeFloats(best.parameters) } } : {}),
      losses,
      looks,
      clamped,
    });
  }
  if (rules.selects && best) coefficients.parameters.set(best.parameters);
  return { losses, looks, clamped };
}

/** Lessons of an update: experts take turns, and each goes through its samples in an order of its own, again and again. */
function lessonOrder({ training, expertCount, seed, name }: Stage, batch: number): (update: number) => Lesson[] {
  const own = Array.from({ length: expertCount }, (_, k) =>
    shuffled(
      training.filter(({ sample }) => sample.expert === k),
      new Random(seed, `expert merging ${name} ${k}`),
    ),
  );
  return (update) =>
    Array.from({ length: batch }, (_, i) => {
      const turn = update * batch + i;
      const lessons = own[turn % expertCount];
      return lessons[Math.floor(turn / expertCount) % lessons.length];
    });
}

/** All draws of an epoch, in the order they are seen. */
function epochOf({ training, expertCount, seed, name }: Stage): Lesson[] {
  const own = Array.from({ length: expertCount }, (_, k) => training.filter(({ sample }) => sample.expert === k));
  const most = Math.max(...own.map(({ length }) => length));
  const draws = own.flatMap((lessons) => Array.from({ length: most }, (_, i) => lessons[i % lessons.length]));
  return shuffled(draws, new Random(seed, `expert merging ${name}`));
}

function shuffled<T>(list: readonly T[], random: Random): T[] {
  const result = [...list];
  for (let i = result.length - 1; i > 0; i--) {
    const j = random.nextBelow(i + 1);
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

/** Loss of a batch, mean over its lessons, and its gradient by the coefficients. */
async function step(
  { forward, teachers, weights, expertCount, coefficients, learned }: Stage,
  { hiddenWeight, batch }: StageRules,
  head: HeadLoss,
  lessons: readonly Lesson[],
): Promise<{ loss: number; gradient: Float64Array }> {
  const { model, engine, spool, path, signal } = forward;
  const { hiddenSize } = model.shape;
  const windows = lessons.map(({ sample }) => sample.tokens);
  await using pass = new ModelGradient({ model, engine, path, spool, windows, batchTokens: BATCH_TOKENS, signal });
  const hidden = await pass.forward(learned);
  await using cotangent = spool.allocate(pass.tokenCount, hiddenSize);
  let loss = 0;
  let token = 0;
  const places = lessons.map((lesson) => {
    const place = { lesson, token };
    token += lesson.sample.tokens.length;
    return place;
  });
  for (const { lesson, token: first } of places) loss += await head.add(lesson, first, hidden, teachers, cotangent, batch);
  const gradient = new Float64Array(coefficients.parameters.length);
  const indices = new Map(coefficients.tensors.map(({ name }, index) => [name, index]));
  const aligned = model.blocks[middleBlock(model)];
  await pass.backward(
    learned,
    cotangent,
    async (_, gradients) => {
      for (const [site, own] of gradients) {
        const index = indices.get(site.name);
        if (index === undefined) continue;
        const { bounds } = coefficients.tensors[index];
        for (let k = 0; k < expertCount; k++) {
          const products = chunkProducts(bounds, own, weights.taskVector(k, site));
          for (const [s, product] of products.entries()) gradient[coefficients.index(index, k, s)] += product;
        }
      }
    },
    {
      before: async (block, own) => {
        if (block !== aligned || hiddenWeight === 0 || teachers.middle === undefined) return;
        const states = pass.after(block);
        for (const { lesson, token: first } of places) {
          loss += await addHidden(lesson, first, states, teachers.middle, own, hiddenWeight / batch);
        }
      },
    },
  );
  return { loss, gradient };
}

/** `|h - h_k|^2 / (n v_k)` over counted rows, and its derivative. */
async function addHidden(
  { sample, firstToken, rows }: Lesson,
  first: number,
  states: StateStore,
  { states: wantedStates, variances }: MiddleStates,
  cotangent: StateStore,
  weight: number,
): Promise<number> {
  const { countedFrom, tokens, expert } = sample;
  const [start, end] = [first + countedFrom, first + tokens.length];
  const own = await states.read(start, end);
  const wanted = await wantedStates.read(firstToken + countedFrom, firstToken + tokens.length);
  const sum = (await cotangent.read(start, end)).slice();
  const scale = variances[expert] > 0 ? weight / (rows * variances[expert]) : 0;
  let loss = 0;
  for (let i = 0; i < own.length; i++) {
    const difference = own[i] - wanted[i];
    loss += difference * difference;
    sum[i] += 2 * scale * difference;
  }
  await cotangent.write(start, sum);
  return scale * loss;
}
