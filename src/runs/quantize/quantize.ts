/** `quantize`: a float checkpoint and a budget in, an artifact that runtimes load out. */
import { explainDiskError } from '../../artifacts/durable.ts';
import { assertFiniteTensors } from '../../artifacts/finite-tensors.ts';
import { readGenerationConfig } from '../../artifacts/generation-config.ts';
import { hashFolder, writeManifest, writeReport } from '../../artifacts/manifest.ts';
import { openModelSource } from '../../artifacts/model-source.ts';
import { OutputFolder } from '../../artifacts/output-folder.ts';
import { PartStore } from '../../artifacts/parts.ts';
import { type WrittenArtifact, writeArtifact } from '../../artifacts/write-artifact.ts';
import type { Device } from '../../compute/engine.ts';
import { RecipeError } from '../../errors.ts';
import type { BitPlan, Measuring } from '../../methods/quantize/quantizer.ts';
import { packageVersion } from '../../package-root.ts';
import type { RunHooks } from '../run.ts';
import type { BlockDetails, SiteDetails } from './blocks.ts';
import type { SharedRanks } from './branches.ts';
import { type ArtifactSizes, estimatePeakBytes, predictSizes, sizesOf } from './estimate.ts';
import { describeInputs, type RunInputs } from './inputs.ts';
import { prepareJob, type QuantizeJob } from './job.ts';
import type { LossRound, LossSearch } from './loss-budget.ts';
import { type ArtifactFormat, nominalGroupSize, onnxStorageOf, type QuantizeRecipe } from './recipe.ts';
import { mixesWidths } from './recipe-rules.ts';
import { measuringOf, solve } from './solve.ts';

/** How to treat what is already on disk, and whether to work at all. */
export interface OutputMode {
  readonly overwrite: boolean;
  readonly resume: boolean;
  readonly dryRun: boolean;
}

/** What came of a run, or would come of it. */
export interface QuantizeOutcome {
  readonly architecture: string;
  readonly method: string;
  readonly modules: number;
  readonly quantizedModules: number;
  /** Mean code bits over the quantized weights; a prediction in a dry run. */
  readonly averageBits: number;
  readonly artifacts: readonly (ArtifactSizes & { readonly format: ArtifactFormat })[];
  /** Weight files of the model that was read. */
  readonly sourceBytes: number;
  readonly plan: BitPlan;
  readonly notes: readonly string[];
  /** Passes over the calibration text, in words. */
  readonly passes: string;
  readonly predictedPeakBytes: number;
  /** With `--max-loss`: every artifact that was tried, with its weight files. */
  readonly search?: Omit<LossSearch, 'rounds'> & { readonly rounds: readonly (LossRound & { readonly bytes: number })[] };
  /** What the run did; absent in a dry run. */
  readonly run?: {
    readonly output: string;
    readonly device: Device;
    readonly seconds: number;
    /** Peak resident memory of the process. */
    readonly peakBytes: number;
  };
}

/**
 * Quantizes the model at `modelPath` into the folder `outputPath`. Throws RecipeError and UnsupportedError for a request that cannot
 * be met (before any work), FormatError for a broken input, EnvironmentError for what the machine lacks.
 */
export async function quantize(
  modelPath: string,
  outputPath: string,
  recipe: QuantizeRecipe,
  mode: OutputMode,
  hooks: RunHooks = {},
): Promise<QuantizeOutcome> {
  const started = performance.now();
  const notes: string[] = [];
  const tell: RunHooks = {
    ...hooks,
    note: (message) => {
      notes.push(message);
      hooks.note?.(message);
    },
  };
  await using source = await openModelSource(modelPath);
  if (source.kind !== 'float') {
    throw new RecipeError(`${modelPath}: is quantized already (layout ${source.kind}); give the float model it was made from`);
  }
  const request = { path: outputPath, overwrite: mode.overwrite, resume: mode.resume };
  // What is in the way is found before any work; whether a partial run is of this recipe is judged when the inputs are hashed.
  if (!mode.dryRun)
    await OutputFolder.check({ ...request, resume: false, overwrite: mode.overwrite || mode.resume, recipeHash: '' });
  if (source.model.unusedTensors.length > 0) {
    const [first] = source.model.unusedTensors;
    tell.note?.(
      `${source.model.unusedTensors.length} tensors of ${modelPath} have no place in a ${source.model.architecture}, "${first}" for one; they are left out of ONNX`,
    );
  }
  // It is copied at the very end, and refused now.
  await readGenerationConfig(source);
  const job = await prepareJob(source, recipe, tell);
  if (mode.dryRun) return dryRun(job, tell, notes);
  await assertFiniteTensors(source.tensors, new Set(source.model.unusedTensors), tell.signal);

  const inputs = await describeInputs(job);
  await using output = await OutputFolder.open({ ...request, recipeHash: inputs.hash });
  try {
    return await produce({ job, inputs, output, outputPath, started, notes, hooks: tell });
  } catch (error) {
    throw explainDiskError(error, output.path);
  }
}

/** A run that has its output folder. */
interface Production {
  readonly job: QuantizeJob;
  readonly inputs: RunInputs;
  readonly output: OutputFolder;
  /** As the user named it. */
  readonly outputPath: string;
  /** `performance.now()` when the run began. */
  readonly started: number;
  readonly notes: readonly string[];
  readonly hooks: RunHooks;
}

/** Quantizes, writes the artifact, and publishes it. */
async function produce({ job, inputs, output, outputPath, started, notes, hooks }: Production): Promise<QuantizeOutcome> {
  const { source, recipe } = job;
  const store = await PartStore.open(output.partsPath, inputs.hash);
  if (output.resumed && recipe.maxLoss === undefined) {
    const done = source.model.blocks.filter((block) => store.hasBlock(block.index)).length;
    hooks.note?.(`resuming: ${done} of ${source.model.blocks.length} blocks are finished`);
  }
  const { device, runtime, shared, ranks, parts, search } = await solve(job, store, () => output.keepForResume(), hooks).catch(
    (error: unknown) => {
      // A request that nothing can meet is not met by resuming it.
      if (error instanceof RecipeError) output.abandon();
      throw error;
    },
  );
  hooks.signal?.throwIfAborted();
  const written = await writeArtifact({
    source,
    quantized: parts,
    folder: output.artifactPath,
    formats: recipe.formats,
    version: packageVersion(),
    onnxStorage: onnxStorageOf(recipe),
  });
  for (const note of written.notes) hooks.note?.(note);
  const [{ weightBytes }] = written.formats;
  if (recipe.size !== undefined && weightBytes > recipe.size) {
    output.abandon();
    const less = 2 * recipe.size - weightBytes;
    throw new RecipeError(
      `--size ${recipe.size}: the files came out as ${weightBytes} bytes, since some layers took more than was foreseen; ask for ${less}`,
    );
  }
  const details = detailsOf(job, parts);
  const plan: BitPlan = { modules: Object.fromEntries(details.map(([name, { plan: site }]) => [name, site])) };
  const outcome: QuantizeOutcome = {
    ...outlineOf(job, plan, notes),
    averageBits: written.formats[0].storage.averageBits,
    artifacts: artifactsOf(job, written),
    ...(search && { search: withBytes(search, artifactsOf(job, written)[0]) }),
    run: {
      output: outputPath,
      device,
      seconds: (performance.now() - started) / 1000,
      peakBytes: process.resourceUsage().maxRSS * 1024,
    },
  };
  await writeManifest(output.artifactPath, {
    command: 'quantize',
    recipe: inputs.recipe,
    plan,
    ...(outcome.search && { search: outcome.search }),
    seed: recipe.seed,
    device,
    versions: { pcomp: packageVersion(), [runtime.split(' ')[0]]: runtime },
    inputs: inputs.files,
    outputs: await hashFolder(output.artifactPath),
    weights: written.weights,
  });
  const { plan: _, ...measured } = outcome;
  const sites = details.map(([name, site]) => [
    name,
    { relativeError: site.relativeError, ...site.details, seconds: site.seconds },
  ]);
  await writeReport(output.artifactPath, {
    ...measured,
    threads: recipe.threads,
    resumed: output.resumed,
    ...(shared && { allocation: { unit: shared.unit, predictedLoss: shared.predictedLoss, bound: shared.bound } }),
    ...(ranks && { ranks: { requested: recipe.lowrank, ...ranksReport(ranks) } }),
    ...learningOf(job, parts),
    sites: Object.fromEntries(sites),
  });
  hooks.signal?.throwIfAborted();
  await output.finalize();
  return outcome;
}

/** The plan says which layer has which. */
function ranksReport({ total, spent, predicted }: SharedRanks) {
  return { total, spent, predicted };
}

/** What learning did for each block that was learned. */
function learningOf({ source }: QuantizeJob, parts: PartStore) {
  const blocks = source.model.blocks.flatMap(({ index, name }) => {
    const { learning } = parts.blockDetails(index) as unknown as BlockDetails;
    return learning ? [[name, learning] as const] : [];
  });
  return blocks.length > 0 ? { learning: Object.fromEntries(blocks) } : {};
}

/** Only the kept round was written; what is not quantized is the same in all of them. */
function withBytes(search: LossSearch, { unquantizedBytes }: ArtifactSizes) {
  return {
    ...search,
    rounds: search.rounds.map((round) => ({ ...round, bytes: Math.round(round.quantizedBytes + unquantizedBytes) })),
  };
}

function detailsOf({ source, selected }: QuantizeJob, parts: PartStore): [string, SiteDetails][] {
  return source.model.blocks.flatMap((block) => {
    const { sites } = parts.blockDetails(block.index) as unknown as BlockDetails;
    return block.sites
      .filter((site) => selected.has(site.name))
      .map((site): [string, SiteDetails] => [site.name, sites[site.name]]);
  });
}

/** Going through a block input by input is one pass; measuring all inputs and then moving on behind the quantized weights are two. */
function forwardPasses({ sequential, drift }: Measuring, surveys: boolean, times: number): string {
  const count = (surveys ? 1 : 0) + times * ((sequential ? 1 : 2) + (drift ? 1 : 0));
  return `${count} forward pass${count === 1 ? '' : 'es'}`;
}

function outlineOf(
  { source, recipe, selected, quantizer, windows, surveys, nominalBits, readsText, branches, rankBudget }: QuantizeJob,
  plan: BitPlan,
  notes: readonly string[],
) {
  const tokens = windows.reduce((sum, window) => sum + window.length, 0);
  const measuring = readsText ? measuringOf(quantizer, recipe, nominalBits) : undefined;
  return {
    architecture: source.model.architecture,
    method: `${recipe.method}, preset ${recipe.preset}`,
    modules: source.model.blocks.reduce((sum, block) => sum + block.sites.length, 0),
    quantizedModules: selected.size,
    sourceBytes: source.weightBytes,
    plan,
    notes,
    passes: measuring
      ? `${forwardPasses(measuring, surveys && quantizer.needsCalibration, rankBudget ? 2 : 1)} over ${tokens} tokens in ${windows.length} windows`
      : 'none: the method reads no text',
    predictedPeakBytes: estimatePeakBytes(source.model, { measuring, selected, tokens, maxMemory: recipe.maxMemory, branches }),
  };
}

/** Sizes with the widths that are known before the work. */
function dryRun(job: QuantizeJob, hooks: RunHooks, notes: readonly string[]): QuantizeOutcome {
  const { source, recipe, given, expected, expectedEmbeddings } = job;
  if (given === undefined && (mixesWidths(recipe) || (recipe.preset === 'best' && recipe.method === 'rtn'))) {
    const also = recipe.groupSize === 'auto' ? ` in groups of ${nominalGroupSize(recipe)}` : '';
    hooks.note?.(`sizes are those of one width everywhere${also}; the run mixes ${also ? 'both' : 'widths'} within the budget`);
  }
  const plan: BitPlan = { modules: Object.fromEntries([...expected].map(([site, widths]) => [site.name, widths])) };
  const artifacts = recipe.formats.map((format) => ({
    format,
    ...predictSizes(source, expected, expectedEmbeddings, format, onnxStorageOf(recipe)),
  }));
  return { ...outlineOf(job, plan, notes), averageBits: artifacts[0].averageBits, artifacts };
}

function artifactsOf({ recipe }: QuantizeJob, { formats }: WrittenArtifact) {
  return recipe.formats.map((format, i) => ({ format, ...sizesOf(formats[i].storage, formats[i].weightBytes, format) }));
}
