/** Plans of single sites: the uniform one, and whether a given one fits. */
import { RecipeError } from '../../errors.ts';
import type { LinearSite } from '../../model/model.ts';
import { groupCount } from './quantized-linear.ts';
import type { QuantizeOptions, SitePlan } from './quantizer.ts';

/** One width for every group. Throws RecipeError unless it is a whole number from `least` to `most`. */
export function uniformPlan(site: LinearSite, options: QuantizeOptions, least = 1, most = 8): SitePlan {
  const { bits, groupSize } = options;
  if (!Number.isInteger(groupSize) || groupSize < 1) {
    throw new RecipeError(`--group-size ${groupSize}: a group is a whole number of columns, at least 1.`);
  }
  if (!Number.isInteger(bits) || bits < least || bits > most) {
    throw new RecipeError(
      `--bits ${bits}: with this method, preset paper takes a whole number of bits from ${least} to ${most}.`,
    );
  }
  return { groupSize, bits: new Array<number>(groupCount(site.inFeatures, groupSize)).fill(bits) };
}

/** Throws RecipeError unless the plan has one whole width of 0..8 bits for each of the site's groups. */
export function checkPlan(site: LinearSite, plan: SitePlan): void {
  const { groupSize, bits } = plan;
  if (!Number.isInteger(groupSize) || groupSize < 1) {
    throw new RecipeError(`plan of ${site.name}: group size ${groupSize} is not a whole number above 0.`);
  }
  const groups = groupCount(site.inFeatures, groupSize);
  if (bits.length !== groups) {
    throw new RecipeError(
      `plan of ${site.name}: ${bits.length} widths for ${groups} groups of ${groupSize} among ${site.inFeatures} columns.`,
    );
  }
  const odd = bits.find((width) => !Number.isInteger(width) || width < 0 || width > 8);
  if (odd !== undefined)
    throw new RecipeError(`plan of ${site.name}: a width of ${odd} bits, but widths are whole, from 0 to 8.`);
}
