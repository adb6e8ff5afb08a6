/** GPTQ (Frantar et al., arXiv 2210.17323) with min-max grids: each column's rounding error is made up for by the columns after it. */
import type { CalibrationStats } from '../../calibration/statistics.ts';
import type { Grid } from '../../compute/kernels/kernels.ts';
import { inlineKernels } from '../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../model/model.ts';
import { columnRange, takeColumns } from './columns.ts';
import { dampedFactor } from './damped-factor.ts';
import { type BlockGrids, type SweepBlock, sweep } from './gptq-core.ts';
import { fitMinMax } from './grid.ts';
import { relativeOutputError } from './output-error.ts';
import { checkPlan, uniformPlan } from './plan.ts';
import { QuantizedBuilder } from './quantized-builder.ts';
import type { QuantizeContext, QuantizeResult, Quantizer, SitePlan } from './quantizer.ts';
import { requireStats } from './require-stats.ts';

/**
 * Reads `bits`, `groupSize`, `dampening`, `symmetric`, `actOrder`, `staticGroups`. Grids are fitted to the compensated weights when their
 * group's turn comes; with static groups (always so with act-order, so that groups stay in natural order) to the original weights.
 */
export const gptq: Quantizer = {
  name: 'gptq',
  summary: 'round column by column, later columns making up for the errors of earlier ones',
  needsCalibration: true,

  async decide({ options }: QuantizeContext, site: LinearSite): Promise<SitePlan> {
    return uniformPlan(site, options);
  },

  async apply(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    measured: CalibrationStats | undefined,
    plan: SitePlan,
  ): Promise<QuantizeResult> {
    checkPlan(site, plan);
    const stats = requireStats(site, measured);
    const { blas, kernels = inlineKernels(), options } = context;
    const factor = await dampedFactor(context, site, stats, options.actOrder ? 'descending' : 'natural');
    const builder = new QuantizedBuilder(site, plan);
    const columns = takeColumns(site, weight, factor.order, factor.dead);

    const fitted = async ({ start, group }: SweepBlock): Promise<BlockGrids> => {
      const g = start / plan.groupSize;
      const bits = plan.bits[g];
      const grid = builder.setGrid(g, await fitMinMax(kernels, group, bits, options.symmetric));
      return { bits: new Uint8Array(group.columns).fill(bits), grid };
    };
    let grids: (block: SweepBlock) => BlockGrids | Promise<BlockGrids> = fitted;
    if (options.actOrder || options.staticGroups) {
      const fixed: Grid[] = [];
      for (const [g, bits] of plan.bits.entries()) {
        const range = columnRange(g * plan.groupSize, Math.min((g + 1) * plan.groupSize, site.inFeatures));
        const values = takeColumns(site, weight, range, factor.dead);
        const group = { columns: range.length, rows: site.outFeatures, values };
        fixed.push(builder.setGrid(g, await fitMinMax(kernels, group, bits, options.symmetric)));
      }
      grids = ({ start, end }) => gatherGrids(plan, fixed, factor.order.subarray(start, end));
    }
    await sweep(blas, kernels, factor, columns, plan.groupSize, grids, ({ start, end }, codes) => {
      builder.setCodes(factor.order.subarray(start, end), codes);
    });
    const quantized = builder.finish();
    return { quantized, relativeError: await relativeOutputError(blas, stats, weight, quantized) };
  },
};

/** The grid of each visited column's own group, (columns, rows). */
function gatherGrids(plan: SitePlan, fixed: readonly Grid[], visited: Uint32Array): BlockGrids {
  const rows = fixed[0].scale.length;
  const scale = new Float32Array(visited.length * rows);
  const shift = new Float32Array(visited.length * rows);
  const bits = new Uint8Array(visited.length);
  visited.forEach((column, j) => {
    const g = Math.floor(column / plan.groupSize);
    scale.set(fixed[g].scale, j * rows);
    shift.set(fixed[g].shift, j * rows);
    bits[j] = plan.bits[g];
  });
  return { bits, grid: { scale, shift } };
}
