/** SliM-LLM (arXiv 2405.14917), preset `paper`: widths by group salience, searched scales, GPTQ compensation. See slim-llm section 4. */
import type { CalibrationStats } from '../../../calibration/statistics.ts';
import { inlineKernels } from '../../../compute/kernels/wasm-kernels.ts';
import { RecipeError } from '../../../errors.ts';
import type { LinearSite } from '../../../model/model.ts';
import { columnRange, takeColumns } from '../columns.ts';
import { type DampedFactor, dampedFactor } from '../damped-factor.ts';
import { sweep } from '../gptq-core.ts';
import { fitSearched } from '../grid.ts';
import { relativeOutputError } from '../output-error.ts';
import { checkPlan, uniformPlan } from '../plan.ts';
import { QuantizedBuilder } from '../quantized-builder.ts';
import type { QuantizeContext, QuantizeOptions, QuantizeResult, Quantizer, SitePlan } from '../quantizer.ts';
import { requireStats } from '../require-stats.ts';
import { bestSplit, divergences, rankGroups, widthsFor } from './bit-allocation.ts';
import { groupSalience, salienceWeights } from './salience.ts';

/** Below this many groups nothing is allocated: every group gets the mean width (slim-llm 4.4). */
const LEAST_GROUPS = 4;

/** Reads `bits` (2..7), `groupSize`, `dampening`, `lambdaSalience`, `salience`. Always asymmetric. */
export const slimLlm: Quantizer = {
  name: 'slim-llm',
  summary: 'give salient groups of columns a bit more and the others a bit less, then round as gptq does',
  needsCalibration: true,

  async decide(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    measured: CalibrationStats | undefined,
  ): Promise<SitePlan> {
    const { blas, kernels = inlineKernels(), options } = context;
    refuseSymmetric(options);
    const uniform = uniformPlan(site, options, 2, 7);
    const { groupSize } = uniform;
    const groups = uniform.bits.length;
    if (groups < LEAST_GROUPS) return uniform;
    const stats = requireStats(site, measured);
    const factor = await dampedFactor(context, site, stats, 'natural');
    const group = (g: number) => {
      const columns = columnRange(g * groupSize, Math.min((g + 1) * groupSize, site.inFeatures));
      const values = takeColumns(site, weight, columns, factor.dead);
      return { columns: columns.length, rows: site.outFeatures, values };
    };
    const denominators = salienceDenominators(factor, options);
    const salience = Float64Array.from({ length: groups }, (_, g) =>
      groupSalience(group(g), denominators.subarray(g * groupSize, (g + 1) * groupSize)),
    );
    const ranking = rankGroups(salience);
    const problem = {
      inFeatures: site.inFeatures,
      outFeatures: site.outFeatures,
      groupSize,
      bits: options.bits,
      weight,
      bias: await loadBias(context, site),
      group,
      batches: () => stats.batches(),
    };
    const split = bestSplit(await divergences(blas, kernels, problem, ranking));
    return { groupSize, bits: widthsFor(ranking, split, options.bits) };
  },

  async apply(
    context: QuantizeContext,
    site: LinearSite,
    weight: Float32Array,
    measured: CalibrationStats | undefined,
    plan: SitePlan,
  ): Promise<QuantizeResult> {
    const { blas, kernels = inlineKernels(), options } = context;
    refuseSymmetric(options);
    checkPlan(site, plan);
    const stats = requireStats(site, measured);
    const factor = await dampedFactor(context, site, stats, 'natural');
    const denominators = salienceDenominators(factor, options);
    const builder = new QuantizedBuilder(site, plan);
    const columns = takeColumns(site, weight, factor.order, factor.dead);
    await sweep(
      blas,
      kernels,
      factor,
      columns,
      plan.groupSize,
      async ({ start, end, group }) => {
        const g = start / plan.groupSize;
        const bits = plan.bits[g];
        // With lambda = 1 every element weighs the same, whatever the mask.
        const weights =
          options.lambdaSalience === 1
            ? undefined
            : salienceWeights(group, denominators.subarray(start, end), options.lambdaSalience);
        const grid = builder.setGrid(g, await fitSearched(kernels, group, bits, weights));
        return { bits: new Uint8Array(group.columns).fill(bits), grid };
      },
      ({ start, end }, codes) => builder.setCodes(factor.order.subarray(start, end), codes),
    );
    const quantized = builder.finish();
    return { quantized, relativeError: await relativeOutputError(blas, stats, weight, quantized) };
  },
};

/** What w^2 is divided by: `U_jj^2`, or the paper's `[H^-1]_jj^2` (slim-llm 4.4). */
function salienceDenominators(factor: DampedFactor, options: QuantizeOptions): Float64Array {
  return options.salience === 'code' ? factor.squaredDiagonal() : factor.inverseDiagonal().map((value) => value * value);
}

async function loadBias(context: QuantizeContext, site: LinearSite): Promise<Float32Array | undefined> {
  if (!site.hasBias) return undefined;
  if (!context.loadBias) throw new Error(`${site.name} has a bias, but the context cannot load it`);
  return context.loadBias(site);
}

function refuseSymmetric(options: QuantizeOptions): void {
  if (options.symmetric) throw new RecipeError('--symmetric: slim-llm with preset paper is always asymmetric.');
}
