/** Trains the adapters of a model: next-token loss on the gradient engine, AdamW, warm-up and cosine, the best held-out iterate kept. */

import { ModelGradient } from '../../calibration/model-gradient.ts';
import { cosine } from '../../compute/optim/schedule.ts';
import { TrainingError } from '../../errors.ts';
import { addOrthogonality } from '../../methods/rank/training/orthogonality.ts';
import type { TrainedModule, TrainedUpdate, TrainingSchedule } from '../../methods/rank/training/schedule.ts';
import type { WeightReader } from '../../model/model.ts';
import type { Forward } from '../forward.ts';
import { AdaptedWeights } from './adapted-weights.ts';
import { NextTokenLoss } from './next-token-loss.ts';
import { batchOf, type TrainingText } from './text.ts';

/** Tokens that run backward at once. */
const BATCH_TOKENS = 2048;
const WARM_UP = 0.03;
const CLIP = 1;
/** Looks at the held-out text in a run. */
const LOOKS = 20;
/** Steps in a row that may come to nothing. */
const MOST_SKIPPED = 10;

export interface TrainingRules {
  readonly steps: number;
  /** Windows of a step. */
  readonly batch: number;
  readonly learningRate: number;
  /** Looks without a better one after which the run ends; 0: never. */
  readonly patience: number;
  readonly seed: number;
  readonly keptBytes: number;
}

/** What a stopped run needs to go on as if nothing had happened, besides the tensors. */
export interface Progress {
  step: number;
  /** Nats per token of each step. */
  losses: number[];
  looks: { step: number; nll: number }[];
  /** The best look at the final budget. */
  best: { step: number; nll: number } | undefined;
  skipped: number;
}

export class Trainer {
  readonly modules: readonly TrainedModule[];
  readonly schedule: TrainingSchedule;
  readonly progress: Progress = { step: 0, losses: [], looks: [], best: undefined, skipped: 0 };
  /** Updates at the best look. */
  best: Map<string, TrainedUpdate> | undefined;
  readonly #forward: Forward;
  readonly #text: TrainingText;
  readonly #rules: TrainingRules;
  readonly #base: WeightReader;
  readonly #weights: AdaptedWeights;
  readonly #byName: ReadonlyMap<string, TrainedModule>;
  #loaded: NextTokenLoss | undefined;
  #skippedInARow = 0;

  constructor(
    forward: Forward,
    base: WeightReader,
    modules: readonly TrainedModule[],
    schedule: TrainingSchedule,
    text: TrainingText,
    rules: TrainingRules,
  ) {
    this.#forward = forward;
    this.modules = modules;
    this.schedule = schedule;
    this.#base = base;
    this.#text = text;
    this.#rules = rules;
    this.#byName = new Map(modules.map((module) => [module.name, module]));
    this.#weights = new AdaptedWeights({ base, modules: this.#byName, blas: forward.blas, keptBytes: rules.keptBytes });
  }

  get done(): boolean {
    const { step, best, looks } = this.progress;
    const { steps, patience } = this.#rules;
    const since = best ? looks.filter((look) => look.step > best.step).length : 0;
    return step >= steps || (patience > 0 && since >= patience);
  }

  /** Held-out nats per token as the model is now. */
  async heldOut(): Promise<number> {
    return await this.#loss(this.#text.heldOut);
  }

  /** The same without any adapter. */
  async heldOutOfBase(): Promise<number> {
    return await this.#loss(this.#text.heldOut, this.#base);
  }

  /** One step, or none where the signal stops it; looks at the held-out text when it is time. Throws TrainingError when numbers stay infinite. */
  async step(): Promise<void> {
    const { steps, batch, learningRate, seed } = this.#rules;
    const { modules, schedule, progress } = this;
    const t = progress.step + 1;
    for (const { parameters } of modules) for (const { gradient } of parameters.values()) gradient.fill(0);
    const loss = await this.#backward(batchOf(this.#text.training, t, batch, seed));
    progress.losses.push(loss);
    if (schedule.regulariser > 0) addOrthogonality(modules, schedule.regulariser);
    if (Number.isFinite(loss) && clip(modules)) {
      this.#skippedInARow = 0;
      schedule.before(t, modules);
      const warmUp = Math.ceil(WARM_UP * steps);
      const usual = cosine(t - 1, steps, { warmUp });
      for (const { parameters } of modules) {
        for (const parameter of parameters.values()) {
          parameter.update(t, (born) => learningRate * (schedule.rateFactor?.(t, born) ?? usual));
        }
      }
      schedule.after(t, modules);
      this.#weights.changed();
    } else {
      progress.skipped++;
      if (++this.#skippedInARow >= MOST_SKIPPED) {
        throw new TrainingError(`step ${t}: the loss or its gradient is not finite, ${MOST_SKIPPED} steps in a row; lower --lr`);
      }
    }
    progress.step = t;
    if (t % Math.max(1, Math.floor(steps / LOOKS)) === 0 || t === steps) await this.#look();
  }

  async #look(): Promise<void> {
    const { progress, schedule } = this;
    const nll = await this.heldOut();
    progress.looks.push({ step: progress.step, nll });
    const final = progress.step >= schedule.finalFrom || progress.step === this.#rules.steps;
    if (!final || (progress.best && progress.best.nll <= nll)) return;
    progress.best = { step: progress.step, nll };
    this.best = await this.updates();
  }

  /** What every layer's parameters come to. */
  async updates(): Promise<Map<string, TrainedUpdate>> {
    const { modules, schedule } = this;
    const { blas } = this.#forward;
    const found = new Map<string, TrainedUpdate>();
    for (const module of modules) found.set(module.name, await schedule.factors(module, blas));
    return found;
  }

  /** Mean loss of the windows; leaves the gradients with the parameters. */
  async #backward(windows: readonly Int32Array[]): Promise<number> {
    const { model, engine, spool, path, blas, signal } = this.#forward;
    const { balance = 0 } = this.schedule;
    const sites = new Set(this.#byName.keys());
    const batch = { path, windows, batchTokens: BATCH_TOKENS };
    await using pass = new ModelGradient({ model, engine, spool, ...batch, signal, sites, balance });
    const hidden = await pass.forward(this.#weights);
    await using cotangent = spool.allocate(pass.tokenCount, model.shape.hiddenSize);
    const loss = await (await this.#head()).score(hidden, windows, cotangent);
    await pass.backward(this.#weights, cotangent, async (_, gradients, experts) => {
      for (const [name, gradient] of experts) this.#weights.pullBackExperts(name, gradient);
      for (const [site, gradient] of gradients) {
        const module = this.#byName.get(site.name);
        if (!module) continue;
        await this.schedule.observe?.(module, gradient, blas);
        await this.#weights.pullBack(site, gradient);
      }
    });
    return loss;
  }

  /** Is not interrupted: a stopped run must not have stepped without having looked. */
  async #loss(windows: readonly Int32Array[], weights: WeightReader = this.#weights): Promise<number> {
    const { model, engine, spool, path } = this.#forward;
    await using pass = new ModelGradient({ model, engine, path, spool, windows, batchTokens: BATCH_TOKENS });
    return await (await this.#head()).score(await pass.forward(weights), windows);
  }

  async #head(): Promise<NextTokenLoss> {
    const { model, engine } = this.#forward;
    this.#loaded ??= await NextTokenLoss.open(model, engine, this.#weights);
    return this.#loaded;
  }
}

/** Scales all gradients so that together they are at most `CLIP` long; false when they are not finite. */
function clip(modules: readonly TrainedModule[]): boolean {
  let square = 0;
  for (const { parameters } of modules) {
    for (const { gradient, frozen } of parameters.values()) {
      for (let i = 0; i < gradient.length; i++) if (!frozen?.[i]) square += gradient[i] * gradient[i];
    }
  }
  if (!Number.isFinite(square)) return false;
  const factor = CLIP / (Math.sqrt(square) + 1e-6);
  if (factor >= 1) return true;
  for (const { parameters } of modules) {
    for (const { gradient } of parameters.values()) for (let i = 0; i < gradient.length; i++) gradient[i] *= factor;
  }
  return true;
}
