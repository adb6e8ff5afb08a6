/** The calibrated methods under preset `best`: slim-llm shares a budget out over groups and layers, gptq has one width. */
import type { CalibrationStats } from '../../../calibration/statistics.ts';
import { inlineKernels } from '../../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../../model/model.ts';
import { solveWithin } from '../allocation/frontier.ts';
import { uniformPlan } from '../plan.ts';
import {
  type Measuring,
  type QuantizeContext,
  type QuantizeOptions,
  type Quantizer,
  type SitePlan,
  sorts,
  type TransformKind,
} from '../quantizer.ts';
import { requireStats } from '../require-stats.ts';
import { applyBest, preparedInput, storedColumns } from './best.ts';
import { groupCosts } from './group-costs.ts';
import { surveyInput, transformKinds } from './survey.ts';

function measuring({ without }: QuantizeOptions): Measuring {
  return { sequential: true, drift: !(without?.includes('asymmetric') && without.includes('bias')), replay: false };
}

/** One width everywhere. */
async function decideUniform(context: QuantizeContext, site: LinearSite): Promise<SitePlan> {
  // Without costs to compare, the transform that helps most models.
  const transform = transformKinds(context, site.input).at(-1)!;
  return { ...uniformPlan(site, context.options), ...named(transform) };
}

function named(transform: TransformKind): Pick<SitePlan, 'transform'> {
  return transform === 'none' ? {} : { transform };
}

/** gptq under preset `best`. Reads `bits` (whole), `groupSize`, `transform`, `alpha`, `without`. */
export const gptqBest: Quantizer = {
  name: 'gptq',
  summary: 'one width everywhere, with sorted and rotated inputs, weighted grids, drift correction and polish',
  needsCalibration: true,
  measuring,
  decide: decideUniform,
  apply: applyBest,
};

/** slim-llm under preset `best`. Reads `groupSize`, `transform`, `alpha`, `without`, and its part of the budget. */
export const slimLlmBest: Quantizer = {
  name: 'slim-llm',
  summary: 'as gptq, and the budget goes to the groups and layers where it lowers the loss most',
  needsCalibration: true,
  measuring,
  survey: surveyInput,

  async decide(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    measured: CalibrationStats | undefined,
  ): Promise<SitePlan> {
    const { allocation } = context;
    const assigned = allocation?.sites.get(site.name);
    if (allocation === undefined || assigned === undefined) return decideUniform(context, site);
    const { transform, groupSize, budget } = assigned;
    const input = await preparedInput(context, site, requireStats(site, measured), transform, groupSize);
    const { widths } = allocation;
    const columns = storedColumns(site, weight, input);
    const costs = await groupCosts(context.kernels ?? inlineKernels(), columns, input.energies, groupSize, widths);
    const sizes = allocation.sizesOf(site, groupSize);
    const { bits } = solveWithin({ widths, costs, ...sizes, monotone: sorts(transform) }, budget);
    return { groupSize, bits, ...named(transform) };
  },
  apply: applyBest,
};
