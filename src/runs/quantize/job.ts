/** What a quantize request comes down to for one model: which layers, what widths if they are known, which text. Decided before the first byte is written. */
import { fileURLToPath } from 'node:url';
import { freeInputs } from '../../artifacts/folds.ts';
import { whyNotGptq } from '../../artifacts/gptq.ts';
import type { ModelSource } from '../../artifacts/model-source.ts';
import { parseTextFile, readText } from '../../calibration/text.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import { calibrationWindows, holdOut } from '../../calibration/windows.ts';
import { RecipeError } from '../../errors.ts';
import { quantizerOf } from '../../methods/quantize/index.ts';
import { componentBits, factorBits } from '../../methods/quantize/low-rank.ts';
import { groupCount } from '../../methods/quantize/quantized-linear.ts';
import type { BitPlan, Quantizer, SitePlan } from '../../methods/quantize/quantizer.ts';
import { parseRankBudget, type SpendableBudget, spendable, uniformRank } from '../../methods/rank/rank-budget.ts';
import type { LinearSite } from '../../model/model.ts';
import { packageRoot } from '../../package-root.ts';
import type { RunHooks } from '../run.ts';
import { checkPlanFits, readPlan, selectSites } from '../site-selection.ts';
import { parseSize } from '../size.ts';
import { branchBits, branchStorage, checkBudget, type FixedCosts } from './bit-budget.ts';
import { embeddingGroups, embeddingSites } from './embeddings.ts';
import { fixedCosts } from './estimate.ts';
import { fileCounts } from './file-budget.ts';
import { nominalGroupSize, onnxStorageOf, QUANTIZE_DEFAULTS, type QuantizeRecipe } from './recipe.ts';

export interface QuantizeJob {
  readonly source: ModelSource;
  readonly recipe: QuantizeRecipe;
  readonly quantizer: Quantizer;
  /** Names of the linear layers to quantize. */
  readonly selected: ReadonlySet<string>;
  /** Mean width the budget comes to, about; exact for `--bits`. */
  readonly nominalBits: number;
  /** Whether the budget is shared out over the layers after a first pass over the model. */
  readonly surveys: boolean;
  /** What the widths do not change. */
  readonly fixed: FixedCosts;
  /** Widths to follow instead of deciding. */
  readonly given: BitPlan | undefined;
  /** What `--lowrank` may spend on branches, to be shared out. */
  readonly rankBudget: SpendableBudget | undefined;
  /** Whether layers get branches: of a budget, or of the ranks of a given plan. */
  readonly branches: boolean;
  /** Whether the run reads text: for its method, or for branches. */
  readonly readsText: boolean;
  /** Windows of calibration tokens; none for a run that reads no text. */
  readonly windows: readonly Int32Array[];
  /** Windows a tolerable loss is measured on, which the others know nothing of; none without `--max-loss`. */
  readonly heldOut: readonly Int32Array[];
  /** Widths as far as they are known now: those given, else one width everywhere, which a method may still depart from. */
  readonly expected: ReadonlyMap<LinearSite, SitePlan>;
  /** The same of embeddings and output head, where they are quantized. */
  readonly expectedEmbeddings: ReadonlyMap<LinearSite, SitePlan>;
}

/** Reads plan and text, and checks that they, the model and the formats fit together. Throws RecipeError, FormatError, EnvironmentError. */
export async function prepareJob(source: ModelSource, recipe: QuantizeRecipe, hooks: RunHooks): Promise<QuantizeJob> {
  const quantizer = quantizerOf(recipe.method, recipe.preset);
  const selected = selectSites(source.model, recipe.only, recipe.skip);
  const given = recipe.plan === undefined ? undefined : await readPlan(recipe.plan);
  if (given !== undefined && recipe.plan !== undefined) checkPlanFits(recipe.plan, given, source.model, selected);
  const sites = source.model.blocks.flatMap((block) => block.sites).filter(({ name }) => selected.has(name));
  const uniform = ({ inFeatures }: LinearSite, bits: number, groupSize: number): SitePlan => ({
    groupSize,
    bits: new Array<number>(groupCount(inFeatures, groupSize)).fill(bits),
  });
  const nominalBits = given === undefined ? nominalBitsOf(recipe, source, sites) : 0;
  const expected = new Map(
    sites.map((site): [LinearSite, SitePlan] => [
      site,
      given?.modules[site.name] ?? uniform(site, Math.max(1, Math.round(nominalBits)), nominalGroupSize(recipe)),
    ]),
  );
  const { embeddings } = recipe;
  const tables = embeddings === 'float' ? [] : embeddingSites(source.model);
  const expectedEmbeddings = new Map(
    tables.map((site) => [site, uniform(site, Number(embeddings), embeddingGroups(source.model, recipe))]),
  );
  // What the gptq layout has a place for.
  const free = recipe.formats.includes('gptq') ? freeInputs(source.model, selected) : new Set<string>();
  const transformed = [...expected].find(
    ([{ input }, { transform }]) =>
      transform !== undefined && !(transform === 'perm' && free.has(input) && recipe.preset === 'best'),
  );
  if (transformed !== undefined && (recipe.preset !== 'best' || !quantizer.needsCalibration || recipe.formats.includes('gptq'))) {
    const why = recipe.formats.includes('gptq')
      ? '--format gptq has no place for it'
      : `--method ${recipe.method}, preset ${recipe.preset} does not make it`;
    throw new RecipeError(
      `--plan ${recipe.plan}: module "${transformed[0].name}" has transform ${transformed[1].transform}, and ${why}`,
    );
  }
  const rankBudget = rankBudgetOf(recipe, sites, given);
  const branches = rankBudget !== undefined || [...expected.values()].some(({ rank }) => rank !== undefined);
  checkBranches(recipe, branches);
  if (rankBudget) {
    const rank = uniformRank(rankBudget, sites);
    const rankBits = recipe.lowrankBits === 16 ? {} : { rankBits: recipe.lowrankBits };
    if (rank > 0) for (const [site, plan] of expected) expected.set(site, { ...plan, rank, ...rankBits });
  }
  checkFormats(recipe, expected);
  const unbranched = fixedCosts(expected.keys(), expectedEmbeddings, recipe.formats[0], onnxStorageOf(recipe));
  const fixed = rankBudget ? withReserve(unbranched, rankBudget) : unbranched;
  const surveys = given === undefined && quantizer.survey !== undefined && !recipe.without.includes('allocation');
  if (surveys) {
    const counted = { source, recipe, expected, expectedEmbeddings, rankBudget };
    await checkBudget(recipe, fixed, sites, await fileCounts(counted, 'reserved'));
  }
  const readsText = quantizer.needsCalibration || branches;
  const text = readsText ? await readWindows(source, recipe, hooks) : { windows: [], heldOut: [] };
  const ranks = { rankBudget, branches, readsText };
  return {
    source,
    recipe,
    quantizer,
    selected,
    nominalBits,
    surveys,
    fixed,
    given,
    ...ranks,
    ...text,
    expected,
    expectedEmbeddings,
  };
}

function rankBudgetOf(
  recipe: QuantizeRecipe,
  sites: readonly LinearSite[],
  given: BitPlan | undefined,
): SpendableBudget | undefined {
  if (recipe.lowrank === undefined) return undefined;
  const ranked = Object.entries(given?.modules ?? {}).find(([, { rank }]) => rank !== undefined);
  if (ranked) {
    throw new RecipeError(
      `--lowrank ${recipe.lowrank}: the plan says the ranks ("${ranked[0]}" has ${ranked[1].rank}); give --lowrank or a plan without ranks`,
    );
  }
  const budget = parseRankBudget(recipe.lowrank, parseSize, '--lowrank');
  if (budget.kind === 'r' && (recipe.size !== undefined || recipe.runtimeMemory !== undefined))
    throw new RecipeError(
      `--lowrank ${recipe.lowrank}: inside a budget of bytes, ranks are counted by bpw=, bytes=, params= or pct=`,
    );
  const storage = branchStorage(recipe);
  return spendable(budget, sites, {
    parameterBits: branchBits(recipe),
    flag: '--lowrank',
    parametersOf: (length) => componentBits(storage, length) / factorBits(storage),
  });
}

/** Refuses what goes with branches only, and where they cannot be. */
function checkBranches({ method, formats, calibration, plan, lowrank, lowrankOuter }: QuantizeRecipe, branches: boolean): void {
  const by = lowrank === undefined ? `--plan ${plan}` : `--lowrank ${lowrank}`;
  if (branches && formats.includes('gptq')) throw new RecipeError(`${by}: --format gptq has no place for a low-rank branch`);
  if (branches) return;
  if (method === 'rtn' && calibration.length > 0)
    throw new RecipeError(`--calibration: --method rtn reads text for low-rank branches only, and --plan ${plan} has none`);
  if (lowrankOuter !== QUANTIZE_DEFAULTS.lowrankOuter)
    throw new RecipeError(`--lowrank-outer ${lowrankOuter}: --plan ${plan} has no low-rank branches`);
}

/** A budget of memory pays for the branches too: what they may take is kept for them. */
function withReserve(fixed: FixedCosts, { total }: SpendableBudget): FixedCosts {
  // The runtime multiplies in float32.
  return { ...fixed, runtimeBytes: fixed.runtimeBytes + 4 * total };
}

/** Scales and zero points of a group, about, in bits a weight. */
const GRID_BITS = 18;
/** Where a search for a tolerable loss begins. */
const SEARCH_BITS = 3;

function nominalBitsOf(recipe: QuantizeRecipe, source: ModelSource, sites: readonly LinearSite[]): number {
  const { bits, bpw, size, runtimeMemory } = recipe;
  if (bits !== undefined) return bits;
  const overhead = GRID_BITS / nominalGroupSize(recipe);
  const weights = sites.reduce((sum, { inFeatures, outFeatures }) => sum + inFeatures * outFeatures, 0);
  const replaced = new Set(sites.map(({ name }) => `${name}.weight`));
  const kept = [...source.tensors.tensors.values()].filter(({ name }) => !replaced.has(name));
  const fixed = size === undefined ? 0 : kept.reduce((sum, { byteLength }) => sum + byteLength, 0);
  const bytes = size ?? runtimeMemory;
  const mean = bpw ?? (bytes === undefined ? SEARCH_BITS + overhead : (8 * (bytes - fixed)) / weights);
  return Math.min(8, Math.max(1, mean - overhead));
}

/** Refuses before the work what a format could not hold after it. */
function checkFormats({ formats, plan }: QuantizeRecipe, expected: ReadonlyMap<LinearSite, SitePlan>): void {
  const groups = [...expected].find(([, { groupSize }]) => groupSize > 128);
  if (formats.includes('onnx') && groups !== undefined) {
    const [{ name }, { groupSize }] = groups;
    throw new RecipeError(
      `${plan === undefined ? `--group-size ${groupSize}` : `--plan ${plan}: "${name}" has groups of ${groupSize}`}: onnxruntime runs 2-bit blocks of ${groupSize} very slowly; use 32, 64 or 128, or --format safetensors`,
    );
  }
  if (!formats.includes('gptq')) return;
  const reasons = [...expected].map(([site, { groupSize, bits }]): [string, string | undefined] => {
    const shape = { ...site, groupSize, bits: Uint8Array.from(bits), scaleDtype: 'F16' as const };
    return [site.name, whyNotGptq(shape)];
  });
  if (reasons.every(([, why]) => why !== undefined)) {
    const [[name, why]] = reasons;
    throw new RecipeError(
      `--format gptq: the layout can hold none of the layers to quantize; "${name}" ${why}. Use --format safetensors.`,
    );
  }
}

async function readWindows(
  { model, folder }: ModelSource,
  recipe: QuantizeRecipe,
  hooks: RunHooks,
): Promise<Pick<QuantizeJob, 'windows' | 'heldOut'>> {
  if (recipe.calibration.length === 0) {
    hooks.note?.(
      'no --calibration given: measuring on the text that ships with pcomp; text of your own domain gives better results',
    );
  }
  const tokenizer = await loadTokenizer(folder, model.shape.vocabSize);
  const tokens = tokenizer.encode(await readText(calibrationFiles(recipe).map(parseTextFile)));
  const sequenceLength = Math.min(recipe.sequenceLength, model.shape.contextLength);
  const { samples, seed } = recipe;
  const { rest, heldOut } =
    recipe.maxLoss === undefined ? { rest: tokens, heldOut: [] } : holdOut(tokens, { samples, sequenceLength });
  const { windows, notes } = calibrationWindows(rest, { samples: Math.max(1, samples - heldOut.length), sequenceLength, seed });
  for (const note of notes) hooks.note?.(note);
  return { windows, heldOut };
}

/** The text files a run reads, with their selectors: those asked for, else the one that ships with pcomp. */
export function calibrationFiles({ calibration }: QuantizeRecipe): readonly string[] {
  return calibration.length > 0 ? calibration : [fileURLToPath(new URL('assets/calibration.txt', packageRoot()))];
}
