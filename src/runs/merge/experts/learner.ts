/** From a start to a plan: coefficients per tensor, then per chunk where it matters, and what came of them (merging.md 6.4, 6.6). */
import type { ChunkBounds } from '../../../methods/merge/expert-merging/chunks.ts';
import { Coefficients } from '../../../methods/merge/expert-merging/coefficients.ts';
import type { MergePlan } from '../../../methods/merge/merge-plan.ts';
import { decodeFloats, encodeFloats } from '../../float-text.ts';
import type { Forward } from '../../forward.ts';
import type { RunHooks } from '../../run.ts';
import type { MergeRecipe } from '../recipe.ts';
import type { MergeWeights } from '../weights.ts';
import { findChunks, sitesOf, sizeOf } from './chunks.ts';
import { distances, meanKl, type ScoredDistance, scoredDistances } from './distances.ts';
import type { Lesson } from './forward-pass.ts';
import { learnStage, type StageResult, type StageRules } from './learn.ts';
import { LearnedWeights } from './learned-weights.ts';
import type { LearningProgress } from './learning-progress.ts';
import type { PreparedLearning } from './prepare.ts';
import { coefficientRules, GAMMAS, stageRules, UNVALIDATED_GAMMA, validatesGamma } from './rules.ts';
import type { FoundStart, TriedStart } from './start.ts';
import type { Teachers } from './teachers.ts';

/** How far the result is from each expert, on samples that were held out where there are enough. */
export interface ExpertReport {
  readonly label: string;
  readonly samples: number;
  readonly base: ScoredDistance;
  readonly start: ScoredDistance;
  readonly merged: ScoredDistance;
  /** `1 - KL(merged) / KL(base)`. */
  readonly recovered: number;
}

/** What a reader of the report should know of the learning. */
export interface LearningReport {
  readonly experts: readonly ExpertReport[];
  readonly judgedOn: 'held-out samples' | 'training samples';
  /** Responses that experts wrote. */
  readonly responses: number;
  readonly gamma: number;
  readonly start: readonly TriedStart[];
  readonly stages: readonly (StageResult & {
    readonly name: string;
    readonly coefficients: number;
    /** What it ended at. */
    readonly plan: MergePlan;
  })[];
}

export interface LearnedMerge {
  readonly plan: MergePlan;
  readonly report: LearningReport;
}

interface LearnerParts {
  readonly prepared: PreparedLearning;
  readonly recipe: MergeRecipe;
  readonly forward: Forward;
  readonly teachers: Teachers;
  readonly weights: MergeWeights;
  readonly found: FoundStart;
  readonly progress: LearningProgress;
  readonly hooks: RunHooks;
}

/** From a start to a plan. */
export class Learner {
  readonly #parts: LearnerParts;
  readonly #paper: boolean;
  readonly #lessons: readonly Lesson[];
  /** What iterates are looked at with; none without held-out samples. */
  readonly #looks: readonly Lesson[];

  constructor(parts: LearnerParts) {
    this.#parts = parts;
    this.#paper = parts.recipe.preset === 'paper';
    const count = parts.prepared.samples.training.length;
    this.#lessons = parts.teachers.lessons.slice(0, count);
    this.#looks = parts.teachers.lessons.slice(count);
  }

  async learn(): Promise<LearnedMerge> {
    const { method, values, model, labels, samples } = this.#parts.prepared;
    const gamma = await this.#gamma();
    const stages: LearningReport['stages'][number][] = [];
    const run = async (name: string, coefficients: Coefficients, rules: StageRules): Promise<void> => {
      const result = await this.#stage(name, coefficients, rules, this.#lessons, this.#looks);
      stages.push({ name, coefficients: coefficients.parameters.length, plan: this.#plan(coefficients), ...result });
    };
    let coefficients = this.#whole();
    const rules = this.#rules(gamma);
    await run('coefficients per tensor', coefficients, rules);
    if (method.chunked) {
      const bounds = await findChunks({
        model,
        weights: this.#parts.weights,
        expertCount: labels.length,
        coefficients,
        learned: this.#learned(coefficients),
        values,
        paper: this.#paper,
        samples: this.#perExpert,
      });
      const chunked = this.#make((index) => bounds[index]);
      if (!this.#paper)
        for (let l = 0; l < bounds.length; l++) for (let k = 0; k < labels.length; k++) repeat(coefficients, chunked, l, k);
      await run('coefficients per chunk', chunked, this.#paper ? rules : { ...rules, updates: values.chunk_updates });
      coefficients = chunked;
    }
    const [base, start, merged] = [
      await this.#scored(this.#learned(undefined, { scale: 0, passive: 'base' })),
      await this.#scored(this.#learned()),
      await this.#scored(this.#learned(coefficients)),
    ];
    const experts = labels.map((label, k) => ({
      label,
      samples: samples.training.filter(({ expert }) => expert === k).length,
      base: base[k],
      start: start[k],
      merged: merged[k],
      recovered: base[k].kl > 0 ? 1 - merged[k].kl / base[k].kl : 0,
    }));
    return {
      plan: this.#plan(coefficients),
      report: {
        experts,
        judgedOn: this.#looks.length > 0 ? 'held-out samples' : 'training samples',
        responses: this.#parts.prepared.cost.prompts,
        gamma,
        start: this.#parts.found.tried,
        stages,
      },
    };
  }

  /** Training samples of each expert, on average. */
  get #perExpert(): number {
    const { samples, labels } = this.#parts.prepared;
    return samples.training.length / labels.length;
  }

  #rules(gamma: number): StageRules {
    const { method, values, labels } = this.#parts.prepared;
    return stageRules(method, values, { paper: this.#paper, gamma, experts: labels.length });
  }

  /** The pull to the start that generalizes best, or the one asked for. */
  async #gamma(): Promise<number> {
    const { prepared, progress, forward, teachers } = this.#parts;
    const { values, labels } = prepared;
    if (values.gamma >= 0) return values.gamma;
    if (!validatesGamma(values, this.#perExpert)) return UNVALIDATED_GAMMA;
    let best = { gamma: UNVALIDATED_GAMMA, kl: Number.POSITIVE_INFINITY };
    for (const gamma of GAMMAS) {
      let kl = progress.gammas[gamma];
      if (kl === undefined) {
        kl = 0;
        for (const fold of [0, 1]) {
          const rest = this.#lessons.filter((_, i) => i % 2 !== fold);
          const judged = this.#lessons.filter((_, i) => i % 2 === fold);
          const coefficients = this.#whole();
          const rules = { ...this.#rules(gamma), selects: false };
          await this.#stage(`gamma ${gamma}, half ${fold}`, coefficients, rules, rest, [], `gamma ${gamma}`);
          kl += meanKl(await distances(forward, teachers, judged, labels.length, this.#learned(coefficients)));
        }
        await progress.addGamma(gamma, kl);
      }
      if (kl < best.kl) best = { gamma, kl };
    }
    return best.gamma;
  }

  /** Moves the coefficients, from where an interrupted run left them. @param order what names the order of the samples */
  async #stage(
    name: string,
    coefficients: Coefficients,
    rules: StageRules,
    training: readonly Lesson[],
    heldOut: readonly Lesson[],
    order = name,
  ): Promise<StageResult> {
    const { forward, teachers, weights, prepared, recipe, progress, hooks } = this.#parts;
    const done = progress.finished(name);
    if (done) {
      const { parameters, ...result } = done;
      coefficients.parameters.set(decodeFloats(parameters));
      return result;
    }
    const stage = {
      forward,
      teachers,
      weights,
      expertCount: prepared.labels.length,
      training,
      heldOut,
      coefficients,
      learned: this.#learned(coefficients),
      seed: recipe.seed,
      name: order,
      onUpdate: (update: number, total: number) => hooks.progress?.({ phase: name, done: update, total }),
      resumed: progress.underWay(name),
      keep: (state: Parameters<LearningProgress['update']>[1]) => progress.update(name, state),
    };
    const result = await learnStage(stage, rules);
    await progress.finish(name, { ...result, parameters: encodeFloats(coefficients.parameters) });
    return result;
  }

  #make(bounds: (index: number) => ChunkBounds): Coefficients {
    const { method, values, model, labels } = this.#parts.prepared;
    return new Coefficients(
      sitesOf(model).map(({ site }, index) => ({ name: site.name, bounds: bounds(index) })),
      labels.length,
      coefficientRules(method, values, this.#paper),
    );
  }

  /** A coefficient per tensor. */
  #whole(): Coefficients {
    const sites = sitesOf(this.#parts.prepared.model);
    return this.#make((index) => [0, sizeOf(sites[index].site)]);
  }

  /** The model with these coefficients; without, the start. */
  #learned(coefficients?: Coefficients, from?: { readonly scale: number; readonly passive: 'base' }): LearnedWeights {
    const { weights, prepared, found } = this.#parts;
    const { updates, passive, start } = found;
    const options = { weights, expertCount: prepared.labels.length, updates, scale: start.scale, passive, coefficients };
    return new LearnedWeights({ ...options, ...from });
  }

  #scored(learned: LearnedWeights): Promise<ScoredDistance[]> {
    const { forward, teachers, prepared } = this.#parts;
    const judges = this.#looks.length > 0 ? this.#looks : this.#lessons;
    return scoredDistances(forward, teachers, judges, prepared.labels.length, learned);
  }

  #plan(coefficients: Coefficients): MergePlan {
    const { prepared, found } = this.#parts;
    const { method, values, labels, model } = prepared;
    const trim = values.trim < 1 ? { trim: values.trim } : {};
    const tensors = sitesOf(model).map(({ site }, l) => {
      const { bounds } = coefficients.tensors[l];
      const own = labels.map((_, k) => coefficients.of(l, k));
      return [`${site.name}.weight`, { bounds: bounds.length > 1 ? bounds : [0, sizeOf(site)], coefficients: own, ...trim }];
    });
    const { start, passive } = found;
    return { method: method.name, experts: labels, start, passive, tensors: Object.fromEntries(tensors) };
  }
}

/** The coefficient of a tensor becomes that of each of its chunks. */
function repeat(from: Coefficients, to: Coefficients, tensor: number, expert: number): void {
  const [value] = from.of(tensor, expert);
  to.set(tensor, expert, new Array<number>(to.tensors[tensor].bounds.length - 1).fill(value));
}
