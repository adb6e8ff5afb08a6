/** `--size`: what is in the weight files beside the layers' constants, known by laying them out for a plan without their data. */
import { artifactBytes, partBytesOf } from '../../artifacts/file-size.ts';
import type { ModelSource } from '../../artifacts/model-source.ts';
import type { SitePlan } from '../../methods/quantize/quantizer.ts';
import type { SpendableBudget } from '../../methods/rank/rank-budget.ts';
import type { LinearSite } from '../../model/model.ts';
import { packageVersion } from '../../package-root.ts';
import { branchBits, candidateWidths, type FileCounts, type PlannedSites } from './bit-budget.ts';
import { onnxStorageOf, type QuantizeRecipe } from './recipe.ts';

/** Bytes kept for every layer: names and offsets may come to have a digit more. */
const LAYER_MARGIN = 16;
/** Constants of a megabyte begin a page: four times the deviation of such a gap from what was laid out. */
const PAGED_WEIGHTS = 2 ** 20;
const PAGE_MARGIN = 6700;

/** What counting files needs of a job. */
export interface FileJob {
  readonly source: ModelSource;
  readonly recipe: QuantizeRecipe;
  /** Plans as far as they are known, ranks among them. */
  readonly expected: ReadonlyMap<LinearSite, SitePlan>;
  readonly expectedEmbeddings: ReadonlyMap<LinearSite, SitePlan>;
  readonly rankBudget: SpendableBudget | undefined;
}

/** Absent: the budget is not one of files. @param ranks what branches are paid from: what is reserved for them, or they are part of the plans */
export async function fileCounts(job: FileJob, ranks: 'reserved' | 'planned'): Promise<FileCounts | undefined> {
  const { source, recipe, expected, expectedEmbeddings, rankBudget } = job;
  if (recipe.size === undefined) return undefined;
  const files = {
    model: source.model,
    tensors: source.tensors,
    format: recipe.formats[0],
    storage: onnxStorageOf(recipe),
    version: packageVersion(),
  };
  const sites = [...expected.keys()];
  const large = sites.filter(({ outFeatures, inFeatures }) => outFeatures * inFeatures >= PAGED_WEIGHTS).length;
  const margin = LAYER_MARGIN * sites.length + Math.ceil(PAGE_MARGIN * Math.sqrt(large));
  const rankBits = recipe.lowrankBits === 16 ? {} : { rankBits: recipe.lowrankBits };
  const reserved = ranks === 'reserved' ? rankBudget : undefined;
  return {
    partBytes: await partBytesOf(
      files,
      sites.map(({ name }) => name),
      candidateWidths(recipe),
    ),
    async bytesOf(plans: PlannedSites) {
      if (!reserved) {
        const stored = plans.map(([site, plan]): [LinearSite, SitePlan] => [site, plan.rank ? { ...plan, ...rankBits } : plan]);
        return margin + (await artifactBytes(files, [...stored, ...expectedEmbeddings]));
      }
      // Where branches are is not known yet: as if every layer had one.
      const branched = plans.map(([site, plan]): [LinearSite, SitePlan] => [
        site,
        { ...plan, rank: expected.get(site)?.rank ?? 1, ...rankBits },
      ]);
      const parameters = branched.reduce((sum, [site, { rank = 0 }]) => sum + rank * reserved.cost(site), 0);
      const bytes = await artifactBytes(files, [...branched, ...expectedEmbeddings]);
      return margin + bytes + Math.ceil(((reserved.total - parameters) * branchBits(recipe)) / 8);
    },
  };
}
