/** rtn under preset `best`: the grid with the least squared error instead of min-max, and widths by what that error is. Needs no data. */
import type { CalibrationStats } from '../../../calibration/statistics.ts';
import { inlineKernels } from '../../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../../model/model.ts';
import { solveWithin } from '../allocation/frontier.ts';
import { columnRange, takeColumns } from '../columns.ts';
import { fitMinMax } from '../grid.ts';
import { checkPlan, uniformPlan } from '../plan.ts';
import { QuantizedBuilder } from '../quantized-builder.ts';
import type { InputSurvey, QuantizeContext, QuantizeResult, Quantizer, SiteCosts, SitePlan } from '../quantizer.ts';
import { groupCosts, groupSizesFor } from './group-costs.ts';

/** Costs of a layer as if all inputs were equally loud and independent. */
async function costsOf(
  context: QuantizeContext,
  site: LinearSite,
  weight: Float32Array,
  groupSize: number,
  widths: readonly number[],
) {
  const columns = takeColumns(site, weight, columnRange(0, site.inFeatures), new Set());
  const energies = new Float32Array(site.inFeatures).fill(1);
  return groupCosts(context.kernels ?? inlineKernels(), columns, energies, groupSize, widths);
}

/** Reads `bits`, `groupSize`, `without`, and its part of the budget. */
export const rtnBest: Quantizer = {
  name: 'rtn',
  summary: 'round to the nearest level of the grid that suits the group best; reads no text',
  needsCalibration: false,

  async survey(
    context: QuantizeContext,
    sites: readonly LinearSite[],
    loadSite: (site: LinearSite) => Promise<Float32Array>,
    _stats: CalibrationStats | undefined,
    widths: readonly number[],
  ): Promise<InputSurvey> {
    const sizes = groupSizesFor(context, sites[0].inFeatures);
    const transforms = sizes.map((groupSize) => ({
      transform: 'none' as const,
      free: false,
      groupSize,
      sites: [] as SiteCosts[],
    }));
    for (const site of sites) {
      const weight = await loadSite(site);
      const energy = weight.reduce((sum, w) => sum + w * w, 0);
      for (const { groupSize, sites: found } of transforms)
        found.push({ site, energy, costs: await costsOf(context, site, weight, groupSize, widths) });
    }
    return { transforms, trials: new Map() };
  },

  async decide(context: QuantizeContext, site: LinearSite, weight: Float32Array): Promise<SitePlan> {
    const { allocation, options } = context;
    const assigned = allocation?.sites.get(site.name);
    if (allocation === undefined || assigned === undefined) return uniformPlan(site, options);
    const { widths } = allocation;
    const { groupSize, budget } = assigned;
    const costs = await costsOf(context, site, weight, groupSize, widths);
    const sizes = allocation.sizesOf(site, groupSize);
    return { groupSize, bits: solveWithin({ widths, costs, ...sizes, monotone: false }, budget).bits };
  },

  async apply(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    _stats: CalibrationStats | undefined,
    plan: SitePlan,
  ): Promise<QuantizeResult> {
    checkPlan(site, plan);
    const kernels = context.kernels ?? inlineKernels();
    const builder = new QuantizedBuilder(site, plan);
    for (const [g, bits] of plan.bits.entries()) {
      const columns = columnRange(g * plan.groupSize, Math.min((g + 1) * plan.groupSize, site.inFeatures));
      const group = { columns: columns.length, rows: site.outFeatures, values: takeColumns(site, weight, columns, new Set()) };
      const searched = bits > 0 && !context.options.without?.includes('grid');
      const fitted = searched
        ? (await kernels.fitWeighted(group, bits, new Float32Array(group.columns).fill(1))).grid
        : await fitMinMax(kernels, group, bits, false);
      builder.setCodes(columns, await kernels.roundCodes(group, bits, builder.setGrid(g, fitted)));
    }
    return { quantized: builder.finish() };
  },
};
