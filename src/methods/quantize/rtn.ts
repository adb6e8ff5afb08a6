/** Round to nearest: every weight to the closest level of its group's min-max grid. Needs no data; the floor other methods are measured from. */
import type { CalibrationStats } from '../../calibration/statistics.ts';
import { inlineKernels } from '../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../model/model.ts';
import { columnRange, takeColumns } from './columns.ts';
import { fitMinMax } from './grid.ts';
import { relativeOutputError } from './output-error.ts';
import { checkPlan, uniformPlan } from './plan.ts';
import { QuantizedBuilder } from './quantized-builder.ts';
import type { QuantizeContext, QuantizeResult, Quantizer, SitePlan } from './quantizer.ts';

const NONE: ReadonlySet<number> = new Set();

/** Reads `bits`, `groupSize`, `symmetric`. */
export const rtn: Quantizer = {
  name: 'rtn',
  summary: 'round each weight to the nearest level of its group; needs no calibration text',
  needsCalibration: false,

  async decide({ options }: QuantizeContext, site: LinearSite): Promise<SitePlan> {
    return uniformPlan(site, options);
  },

  async apply(
    { blas, kernels = inlineKernels(), options }: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    stats: CalibrationStats | undefined,
    plan: SitePlan,
  ): Promise<QuantizeResult> {
    checkPlan(site, plan);
    const builder = new QuantizedBuilder(site, plan);
    for (const [g, bits] of plan.bits.entries()) {
      const columns = columnRange(g * plan.groupSize, Math.min((g + 1) * plan.groupSize, site.inFeatures));
      const values = takeColumns(site, weight, columns, NONE);
      const group = { columns: columns.length, rows: site.outFeatures, values };
      const grid = builder.setGrid(g, await fitMinMax(kernels, group, bits, options.symmetric));
      builder.setCodes(columns, await kernels.roundCodes(group, bits, grid));
    }
    const quantized = builder.finish();
    if (!stats) return { quantized };
    return { quantized, relativeError: await relativeOutputError(blas, stats, weight, quantized) };
  },
};
