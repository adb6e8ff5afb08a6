/** First look at an input's sites in the float model: what every transform, and then every width of every group, would cost them. */
import type { CalibrationStats } from '../../../calibration/statistics.ts';
import { inlineKernels } from '../../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../../model/model.ts';
import type { QuantizeContext, TransformKind } from '../quantizer.ts';
import { storedColumns } from './best.ts';
import { sampledEnergy } from './energy.ts';
import { groupCosts } from './group-costs.ts';
import { prepareInput } from './prepared-input.ts';

/** One site under one transform. */
export interface SiteCosts {
  readonly site: LinearSite;
  /** Predicted loss of each group (stored order) at each width. */
  readonly costs: readonly Float64Array[];
  /** `tr(W H W^T)`: the output's energy, which losses are small beside. */
  readonly energy: number;
}

/** All sites of one input under one transform. */
export interface TransformCosts {
  readonly transform: TransformKind;
  readonly sites: readonly SiteCosts[];
}

/**
 * Costs under each of `kinds`.
 * @param statsOf fresh statistics of the input: each kind uses one up
 */
export async function surveyInput(
  context: QuantizeContext,
  sites: readonly LinearSite[],
  loadSite: (site: LinearSite) => Promise<Float32Array>,
  stats: CalibrationStats,
  kinds: readonly TransformKind[],
  groupSize: number,
  widths: readonly number[],
): Promise<TransformCosts[]> {
  const kernels = context.kernels ?? inlineKernels();
  const result: TransformCosts[] = [];
  for (const transform of kinds) {
    const own = { ...stats, batches: () => stats.batches(), hessian: kinds.length > 1 ? stats.hessian.slice() : stats.hessian };
    const input = await prepareInput(context, sites[0], own, transform, groupSize, { centred: false, damping: 'shrink' });
    const costs: SiteCosts[] = [];
    for (const site of sites) {
      const columns = storedColumns(site, await loadSite(site), input);
      const [energy] = await sampledEnergy(context.blas, input.hessian, [columns], input.features);
      costs.push({ site, costs: await groupCosts(kernels, columns, input.energies, groupSize, widths), energy });
    }
    result.push({ transform, sites: costs });
  }
  return result;
}
