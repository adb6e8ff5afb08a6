/** The numbers that learned merges go by: as published, and as they work best (merging.md 6.1). */

import type { CoefficientRules } from '../../../methods/merge/expert-merging/coefficients.ts';
import type { LearnedMethod, LearnedValues } from '../../../methods/merge/learned.ts';
import type { StageRules } from './learn.ts';

/** Strengths of the pull to the start that are compared, and how many samples of each expert that takes. */
export const GAMMAS = [0.02, 0.1, 0.4, 1.5] as const;
export const VALIDATED_FROM = 32;
export const UNVALIDATED_GAMMA = 0.8;

const BEST: CoefficientRules = { parametrization: 'linear', anchor: 0, range: [-1, 1.5] };
const PAPER: CoefficientRules = { parametrization: 'sigmoid', anchor: 0.1, range: [0, 1] };
/** AdaMerging: no bounds, and 0.3 of every expert to begin with. */
const UNBOUNDED: CoefficientRules = {
  parametrization: 'linear',
  anchor: 0.3,
  range: [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY],
};

export function coefficientRules({ objective }: LearnedMethod, { granularity }: LearnedValues, paper: boolean): CoefficientRules {
  const rules = objective === 'entropy' ? UNBOUNDED : paper ? PAPER : BEST;
  return granularity === 'task' ? { ...rules, shared: true } : rules;
}

/** Of the first stage; the second has updates of its own. */
export function stageRules(
  method: LearnedMethod,
  values: LearnedValues,
  { paper, gamma, experts }: { readonly paper: boolean; readonly gamma: number; readonly experts: number },
): StageRules {
  const common = { gamma, hiddenWeight: values.hidden, weightDecay: 0 };
  if (method.objective === 'entropy') {
    const { updates } = values;
    const objective = { kind: 'entropy' } as const;
    // The same way in fewer steps, from which the one nearest to the experts is kept; published: all of them, sixteen samples of each expert.
    return paper
      ? { ...common, objective, batch: 16 * experts, updates, learningRate: 1e-3, schedule: 'constant', selects: false }
      : { ...common, objective, batch: 8, updates, learningRate: 1e-2, schedule: 'cosine', selects: true };
  }
  const divergence = { ...common, batch: 8, objective: { kind: 'divergence', temperature: values.temperature } } as const;
  return paper
    ? { ...divergence, updates: 'epoch', learningRate: 0.5, weightDecay: 1e-5, schedule: 'restarts', clipNorm: 1, selects: false }
    : { ...divergence, updates: values.updates, learningRate: 0.05, schedule: 'cosine', selects: true };
}

/** Chunks per tensor on average, where none are asked for: so many coefficients as the samples can tell apart. */
export function chunksPerTensor({ chunks }: LearnedValues, samples: number): number {
  // An eighth of what was given is held out.
  return chunks > 0 ? chunks : samples >= 56 ? 8 : samples >= 28 ? 4 : 1;
}

/** Whether the pull is found by cross-validation. @param samples of each expert, without those held out */
export function validatesGamma({ gamma }: LearnedValues, samples: number): boolean {
  return gamma < 0 && samples >= (VALIDATED_FROM * 7) / 8;
}
