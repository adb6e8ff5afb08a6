/** First look at an input's sites in the float model: what every transform, every size of its groups, and then every width of every group, would cost them. */
import type { CalibrationStats } from '../../../calibration/statistics.ts';
import type { AsyncKernels } from '../../../compute/kernels/kernels.ts';
import { inlineKernels } from '../../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../../model/model.ts';
import { decodeGroup } from '../grid.ts';
import { untransformColumns } from '../input-transform.ts';
import type { InputSurvey, QuantizeContext, SiteCosts, TransformCosts, TransformKind, Trial } from '../quantizer.ts';
import { requireStats } from '../require-stats.ts';
import { storedColumns } from './best.ts';
import { sampledEnergy } from './energy.ts';
import { groupCosts, groupSizesFor } from './group-costs.ts';
import { type WeighedInput, weighInput } from './prepared-input.ts';

/** Transforms of an input that are worth a look. Each costs a factorization. */
export function transformKinds({ options, sortsFreely }: QuantizeContext, input: string): readonly TransformKind[] {
  if (options.without?.includes('transform')) return ['none'];
  const { transform = 'auto' } = options;
  if (transform === 'free') return sortsFreely?.(input) ? ['none', 'perm'] : ['none'];
  return transform === 'auto' ? ['none', 'perm', 'perm-had'] : [transform];
}

/** Costs under each transform, and a trial of every site under the last: rounded to the width nearest `options.bits`. */
export async function surveyInput(
  context: QuantizeContext,
  sites: readonly LinearSite[],
  loadSite: (site: LinearSite) => Promise<Float32Array>,
  measured: CalibrationStats | undefined,
  widths: readonly number[],
): Promise<InputSurvey> {
  const kernels = context.kernels ?? inlineKernels();
  const stats = requireStats(sites[0], measured);
  const free = context.sortsFreely?.(sites[0].input) ?? false;
  const transforms: TransformCosts[] = [];
  const trials = new Map<string, Trial>();
  const views = viewsOf(transformKinds(context, sites[0].input), groupSizesFor(context, stats.features));
  for (const [i, { transform, groupSizes }] of views.entries()) {
    const last = i + 1 === views.length;
    const own = { ...stats, batches: () => stats.batches(), hessian: last ? stats.hessian : stats.hessian.slice() };
    const [largest] = groupSizes;
    const input = await weighInput(context, sites[0], own, transform, largest);
    const found = groupSizes.map((groupSize) => ({ transform, free, groupSize, sites: [] as SiteCosts[] }));
    for (const site of sites) {
      const columns = storedColumns(site, await loadSite(site), input);
      const [energy] = await sampledEnergy(context.blas, input.hessian, [columns], input.features);
      for (const { groupSize, sites: costs } of found)
        costs.push({ site, energy, costs: await groupCosts(kernels, columns, input.energies, groupSize, widths) });
      if (!last) continue;
      const width = trialWidth(context.options.bits, widths);
      trials.set(site.name, await tryOut(context, kernels, site, columns, input, largest, width));
    }
    transforms.push(...found);
  }
  return { transforms, trials };
}

/** One look at an input: under a transform, in groups of any of the sizes. */
interface View {
  readonly transform: TransformKind;
  /** Descending. */
  readonly groupSizes: readonly number[];
}

/** Looks that share a factorization are one. What is rotated depends on the size of the groups: the largest comes last, for the trial. */
function viewsOf(transforms: readonly TransformKind[], groupSizes: readonly number[]): View[] {
  return transforms.flatMap((transform): View[] =>
    transform === 'perm-had'
      ? groupSizes.map((size) => ({ transform, groupSizes: [size] })).reverse()
      : [{ transform, groupSizes }],
  );
}

function trialWidth(bits: number, widths: readonly number[]): number {
  return widths.reduce((best, width) => (Math.abs(width - bits) < Math.abs(best - bits) ? width : best), widths[0]);
}

async function tryOut(
  { blas }: QuantizeContext,
  kernels: AsyncKernels,
  site: LinearSite,
  columns: Float32Array,
  input: WeighedInput,
  groupSize: number,
  width: number,
): Promise<Trial> {
  const { outFeatures: rows, inFeatures: n } = site;
  const decoded = new Float32Array(columns.length);
  for (let start = 0; start < n; start += groupSize) {
    const end = Math.min(start + groupSize, n);
    const group = { columns: end - start, rows, values: columns.subarray(start * rows, end * rows) };
    const { grid } = await kernels.fitWeighted(group, width, input.energies.subarray(start, end));
    decoded.set(decodeGroup(await kernels.roundCodes(group, width, grid), width, grid), start * rows);
  }
  const stored = new Float32Array(columns.length);
  for (let j = 0; j < n; j++) for (let i = 0; i < rows; i++) stored[i * n + j] = decoded[j * rows + i];
  for (let i = 0; i < decoded.length; i++) decoded[i] -= columns[i];
  const [loss] = await sampledEnergy(blas, input.hessian, [decoded], n);
  const weight = input.transform ? untransformColumns(input.transform, stored, rows, n) : stored;
  return { weight, loss };
}
