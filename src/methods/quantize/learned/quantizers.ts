/** Methods that learn a block's grids and roundings once its layers are quantized: slim-llm-plus and autoround. */
import type { BlockObjective } from '../../../calibration/block-objective.ts';
import { slimLlmBest } from '../best/quantizers.ts';
import { uniformPlan } from '../plan.ts';
import type { QuantizeContext, QuantizeOptions, Quantizer, SiteToLearn } from '../quantizer.ts';
import { requireStats } from '../require-stats.ts';
import { rtn } from '../rtn.ts';
import { slimLlm } from '../slim-llm/slim-llm.ts';
import { type LearningSchedule, learnBlock } from './learn.ts';

const STEPS = 200;

/** SliM-LLM+ as released: epochs of one window a step. */
const EPOCHS = 50;

/** SignSGD as AutoRound (arXiv 2309.05516) has it. */
const SIGN = { rule: 'sign', batch: 8, gridRate: 1 / STEPS, roundingRate: 1 / STEPS, decays: true } as const;

const GENTLE = { gridRate: 1 / 2000, roundingRate: 1 / 400 } as const;

type Schedule = (options: QuantizeOptions, windows: number) => LearningSchedule;

function refineBy(schedule: Schedule): NonNullable<Quantizer['refine']> {
  return ({ options, onStep }: QuantizeContext, sites: readonly SiteToLearn[], objective: BlockObjective) => {
    const training = Math.max(1, objective.firstHeldOut);
    return learnBlock(sites, objective, schedule(options, training), options.seed ?? 0, onStep ?? (() => {}));
  };
}

/** Rounds to the nearest level of the min-max grid, from which learning starts. */
const applyNearest: Quantizer['apply'] = async (context, site, weight, stats, plan) =>
  rtn.apply({ ...context, options: { ...context.options, symmetric: false } }, site, weight, requireStats(site, stats), plan);

/** slim-llm-plus under preset `paper`: widths of slim-llm, learnable clipping of the min-max range, both terms of the loss. */
export const slimLlmPlus: Quantizer = {
  name: 'slim-llm-plus',
  summary: 'widths as slim-llm, then clipping of each group learned block by block',
  needsCalibration: true,
  measuring: () => ({ sequential: false, drift: false, replay: true, learns: 'dual' }),
  decide: slimLlm.decide,
  apply: applyNearest,
  refine: refineBy(({ steps }, windows) => ({
    ...{ grid: 'clipping', rounding: false, rule: 'adam', batch: 1, gridRate: 1e-2, roundingRate: 0, decays: false },
    steps: steps ?? EPOCHS * windows,
  })),
};

/** autoround under preset `paper`: one width everywhere, roundings and both ends of the min-max range learned. */
export const autoround: Quantizer = {
  name: 'autoround',
  summary: 'one width everywhere, then roundings and ranges learned block by block by the signs of gradients',
  needsCalibration: true,
  measuring: () => ({ sequential: false, drift: false, replay: false, learns: 'plain' }),
  decide: async ({ options }, site) => uniformPlan(site, options),
  apply: applyNearest,
  refine: refineBy(({ steps }) => ({ ...SIGN, grid: 'ends', rounding: true, steps: steps ?? STEPS })),
};

/** slim-llm-plus under preset `best`: from the codes of slim-llm, scales and roundings learned. */
export const slimLlmPlusBest: Quantizer = {
  ...slimLlmBest,
  name: 'slim-llm-plus',
  summary: 'as slim-llm, then scales and roundings of each block learned against the float block',
  measuring: (options) => ({ ...slimLlmBest.measuring!(options), learns: 'dual' }),
  refine: refineBy(({ steps }) => ({
    ...{ grid: 'scale', rounding: true, rule: 'adam', batch: 8, gridRate: 2e-3, roundingRate: 1e-2, decays: true },
    steps: steps ?? STEPS,
  })),
};

/**
 * autoround under preset `best`: from the codes of slim-llm, roundings and both ends of each range learned by signs. Where the
 * start is good already, published rates first undo it: half of them for roundings and a tenth for ends came out lower on lab/base (32.255 against 32.307), and lower
 * the error of its first block, too.
 */
export const autoroundBest: Quantizer = {
  ...slimLlmBest,
  name: 'autoround',
  summary: 'as slim-llm, then roundings and ranges of each block learned by the signs of gradients',
  measuring: (options) => ({ ...slimLlmBest.measuring!(options), learns: 'plain' }),
  refine: refineBy(({ steps }) => ({ ...SIGN, ...GENTLE, grid: 'ends', rounding: true, steps: steps ?? STEPS })),
};
