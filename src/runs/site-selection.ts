/** Which linear layers a quantize request means, and what widths a given plan asks of them. */
import { readFile } from 'node:fs/promises';
import { EnvironmentError, RecipeError } from '../errors.ts';
import { rotatedRun } from '../methods/quantize/input-transform.ts';
import { groupCount } from '../methods/quantize/quantized-linear.ts';
import { type BitPlan, type SitePlan, TRANSFORMS } from '../methods/quantize/quantizer.ts';
import type { LinearSite, Model } from '../model/model.ts';
import { matchModules } from './module-glob.ts';

/** The sites `--only` names (default: all) less those `--skip` names. Throws RecipeError when none is left. */
export function selectSites(model: Model, only: readonly string[], skip: readonly string[]): Set<string> {
  const names = model.blocks.flatMap((block) => block.sites.map((site) => site.name));
  const selected = only.length > 0 ? matchModules('--only', only, names) : new Set(names);
  for (const name of matchModules('--skip', skip, names)) selected.delete(name);
  if (selected.size === 0) throw new RecipeError(`--skip, --only: none of the ${names.length} linear layers is left to quantize`);
  return selected;
}

/** Reads a plan: a plan file, or an artifact's pcomp.json. Throws RecipeError naming what is wrong with it. */
export async function readPlan(path: string): Promise<BitPlan> {
  let content: string;
  try {
    content = await readFile(path, 'utf8');
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `--plan ${path}: cannot be read (${(error as NodeJS.ErrnoException).code})`);
  }
  let parsed: unknown;
  try {
    parsed = JSON.parse(content);
  } catch (error) {
    throw new RecipeError(`--plan ${path}: not JSON: ${(error as Error).message}`);
  }
  const plan = isObject(parsed) && isObject(parsed['plan']) ? parsed['plan'] : parsed;
  if (!isObject(plan) || !isObject(plan['modules'])) {
    throw new RecipeError(
      `--plan ${path}: no "modules" in it; a plan is {"modules": {name: {"groupSize", "bits"}}} or an artifact's pcomp.json`,
    );
  }
  const modules = new Map<string, SitePlan>();
  for (const [name, site] of Object.entries(plan['modules'])) modules.set(name, checkSitePlan(path, name, site));
  return { modules: Object.fromEntries(modules) };
}

function checkSitePlan(path: string, name: string, site: unknown): SitePlan {
  const fail = (what: string) => new RecipeError(`--plan ${path}: module "${name}" ${what}`);
  if (!isObject(site)) throw fail('is not an object with "groupSize" and "bits"');
  const { groupSize, bits, transform, rank, rankBits } = site;
  if (typeof groupSize !== 'number' || ![32, 64, 128, 256].includes(groupSize))
    throw fail(`has groupSize ${groupSize}; 32, 64, 128 or 256 is expected`);
  if (!Array.isArray(bits) || !bits.every((width) => Number.isInteger(width) && width >= 1 && width <= 8)) {
    throw fail('has "bits" that are not a list of whole numbers 1..8');
  }
  const kind = TRANSFORMS.find((known) => known === transform && known !== 'none');
  if (transform !== undefined && kind === undefined)
    throw fail(`has a "transform" that is not ${TRANSFORMS.filter((known) => known !== 'none').join(', ')}`);
  if (rank !== undefined && !(Number.isInteger(rank) && (rank as number) > 0))
    throw fail('has a "rank" that is no whole number above 0');
  if (rankBits !== undefined && (rank === undefined || (rankBits !== 8 && rankBits !== 4)))
    throw fail('has "rankBits" that are not the 8 or 4 of a "rank"');
  return {
    groupSize,
    bits: bits as number[],
    ...(kind && kind !== 'none' && { transform: kind }),
    ...(rank !== undefined && { rank: rank as number }),
    ...(rankBits !== undefined && { rankBits: rankBits as 8 | 4 }),
  };
}

/** Checks that the plan fits the model: known modules, a width for each selected one, and one per group. */
export function checkPlanFits(path: string, plan: BitPlan, model: Model, selected: ReadonlySet<string>): void {
  const sites = new Map<string, LinearSite>(model.blocks.flatMap((block) => block.sites.map((site) => [site.name, site])));
  for (const [name, { groupSize, bits, rank = 0 }] of Object.entries(plan.modules)) {
    const site = sites.get(name);
    if (site === undefined) throw new RecipeError(`--plan ${path}: the model has no module "${name}"`);
    const groups = groupCount(site.inFeatures, groupSize);
    if (bits.length !== groups) {
      throw new RecipeError(
        `--plan ${path}: module "${name}" has ${bits.length} widths, but ${site.inFeatures} inputs in groups of ${groupSize} make ${groups}`,
      );
    }
    if (rank > Math.min(site.inFeatures, site.outFeatures)) {
      throw new RecipeError(`--plan ${path}: module "${name}" has rank ${rank}, but is ${site.outFeatures} x ${site.inFeatures}`);
    }
  }
  const byInput = new Map<string, string>();
  for (const [name, { transform = 'none', groupSize }] of Object.entries(plan.modules)) {
    const { input, inFeatures } = sites.get(name)!;
    const own = transform === 'perm-had' ? `${transform} of ${rotatedRun(groupSize, inFeatures)} columns` : transform;
    const other = byInput.get(input) ?? own;
    byInput.set(input, other);
    if (other !== own) {
      throw new RecipeError(
        `--plan ${path}: module "${name}" has transform ${own}, but another that reads the same input has ${other}`,
      );
    }
  }
  for (const name of selected) {
    if (plan.modules[name] === undefined) {
      throw new RecipeError(`--plan ${path}: no widths for module "${name}"; leave it as it is with --skip "${name}"`);
    }
  }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
