/** `--steps 0` of a method that trains: what its calibration surrogate chooses for the model and the text at hand. */

import { RecipeError } from '../../errors.ts';
import { goraSteps } from '../../methods/rank/gora.ts';
import {
  componentGradient,
  componentsOf,
  type FrozenComponents,
  factorsOf,
  gradientComponents,
} from '../../methods/rank/surrogate/components.ts';
import type { SURROGATES } from '../../methods/rank/surrogate/index.ts';
import { type CandidateLayer, gini, type Surrogate, type SurrogateOptions } from '../../methods/rank/surrogate/surrogate.ts';
import { openOriginal } from './original.ts';
import type { FoundStart, StartJob } from './start.ts';
import { GRADIENT_WINDOWS, surveyErrors, surveyGradients } from './survey.ts';

/** What the plan says of a choice, besides ranks. */
export interface SurrogateReport {
  /** The method that it stands in for. */
  readonly of: string;
  /** What components are of: steps against the gradient, or what quantization lost. */
  readonly components: 'gradient' | 'error';
  readonly windows: number;
  /** Gini coefficient of the layers' scores: 0 all alike, 1 one layer has all. */
  readonly concentration: number;
  readonly scores: ReadonlyMap<string, readonly number[]>;
  readonly trace: readonly { readonly step: number; readonly totalRank: number; readonly changed: readonly string[] }[];
}

/** Scores of a layer that the plan keeps. */
const KEPT_SCORES = 64;

/**
 * Components are frozen: of a base whose float original is given with `against`, those that repair what quantization lost; else those of a step against the mean gradient, whose
 * length is found on held-out text.
 */
export async function surrogateStart(
  job: StartJob,
  method: keyof typeof SURROGATES,
  make: (options: SurrogateOptions, layers: StartJob['modules']) => Surrogate,
): Promise<FoundStart> {
  const { recipe, forward, weights, modules, budget, training, progress } = job;
  const { preset, startRank, rMax: most, growth, against } = recipe;
  if (training.length < 2)
    throw new RecipeError(`--text: ${training.length} window to look at; ${method} with --steps 0 compares gradients of several`);
  const surrogate = make({ budget, preset, startRank, most, growth }, modules);
  const repaired = new Map<string, FrozenComponents>();
  if (against !== undefined) {
    await using original = await openOriginal(against, modules);
    const mostRank = Math.max(...modules.map((module) => surrogate.mostOf(module)));
    const found = await surveyErrors(forward, weights, original.weights, modules, mostRank, training, progress);
    for (const module of modules) {
      const { gains, loraA, loraB } = found.get(module.name)!;
      const all = componentsOf(gains.length, loraA, loraB, 1);
      const count = Math.min(gains.length, surrogate.mostOf(module));
      repaired.set(module.name, { ...all, count, values: all.values.subarray(0, count) });
    }
  }
  const norms = new Map<string, number>();
  const layers = new Map<string, CandidateLayer>();
  await surveyGradients(forward, weights, modules, training, progress, async (module, data) => {
    const gradient = { rows: module.outFeatures, columns: module.inFeatures, data };
    const own = repaired.get(module.name);
    const found = own ? undefined : await gradientComponents(forward.blas, gradient, surrogate.mostOf(module));
    const components = own ?? found!.components;
    norms.set(module.name, found?.norm ?? 0);
    layers.set(module.name, { ...module, components, mean: await componentGradient(forward.blas, components, gradient) });
  });
  if (surrogate.observe) {
    await surveyGradients(
      forward,
      weights,
      modules,
      training,
      progress,
      async ({ name }) => surrogate.finish?.(layers.get(name)!),
      async ({ name }, gradient) => await surrogate.observe!(layers.get(name)!, gradient, forward.blas),
    );
  }
  const ordered = modules.map(({ name }) => layers.get(name)!);
  const { kept, scores, trace } = surrogate.choose(ordered);
  const factors = (name: string) => {
    const layer = layers.get(name)!;
    const own = kept.get(name)!;
    const covered = Math.sqrt(own.reduce((sum, k) => sum + layer.components.values[k] ** 2, 0));
    const scale = against !== undefined ? 1 : covered > 0 ? norms.get(name)! / covered : 0;
    return factorsOf(layer.components, own, layer, scale);
  };
  return {
    ranks: new Map([...kept].map(([name, own]) => [name, own.length])),
    loraA: (name) => factors(name).loraA,
    loraB: (name) => factors(name).loraB,
    ...(against === undefined ? { steps: goraSteps(preset) } : {}),
    surrogate: {
      of: method,
      components: against === undefined ? 'gradient' : 'error',
      windows: Math.min(training.length, GRADIENT_WINDOWS),
      concentration: gini(ordered.map(({ name }) => Array.from(scores.get(name)!).reduce((sum, value) => sum + value, 0))),
      scores: new Map(ordered.map(({ name }) => [name, Array.from(scores.get(name)!).slice(0, KEPT_SCORES)])),
      trace,
    },
  };
}
