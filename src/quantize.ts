/** `quantize`: a float checkpoint and a budget in, an artifact that runtimes load out. */
import { createHash } from 'node:crypto';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type HashedFile, hashFile, hashFolder, writeManifest, writeReport } from './artifacts/manifest.ts';
import { type ModelSource, openModelSource } from './artifacts/model-source.ts';
import { OutputFolder } from './artifacts/output-folder.ts';
import { PartStore } from './artifacts/parts.ts';
import { type WrittenArtifact, writeArtifact } from './artifacts/write-artifact.ts';
import { Calibration } from './calibration/calibration.ts';
import { parseTextFile, readText } from './calibration/text.ts';
import { loadTokenizer } from './calibration/tokenizer.ts';
import { calibrationWindows } from './calibration/windows.ts';
import type { Device } from './compute/engine.ts';
import { createEngine } from './compute/ort.ts';
import { createBlas } from './compute/ort-blas.ts';
import { RecipeError } from './errors.ts';
import { QUANTIZERS } from './methods/quantize/index.ts';
import type { BitPlan, Quantizer, SitePlan } from './methods/quantize/quantizer.ts';
import { packageRoot, packageVersion } from './package-root.ts';
import { type BlockDetails, quantizeBlocks, type SiteDetails } from './quantize-blocks.ts';
import { quantizeEmbeddings } from './quantize-embeddings.ts';
import { type ArtifactSizes, estimatePeakBytes, predictSizes, sizesOf } from './quantize-estimate.ts';
import { QuantizeProgress } from './quantize-progress.ts';
import type { ArtifactFormat, QuantizeRecipe } from './recipe.ts';
import type { RunHooks } from './run.ts';
import { checkPlanFits, readPlan, selectSites } from './site-selection.ts';

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
  /** What the run did; absent in a dry run. */
  readonly run?: {
    readonly output: string;
    readonly device: Device;
    readonly seconds: number;
    /** Peak resident memory of the process. */
    readonly peakBytes: number;
  };
}

/** Everything that is decided before the first byte is written. */
interface Job {
  readonly source: ModelSource;
  readonly recipe: QuantizeRecipe;
  readonly quantizer: Quantizer;
  readonly selected: ReadonlySet<string>;
  readonly given: BitPlan | undefined;
  /** Windows of calibration tokens; none for a method that needs no text. */
  readonly windows: readonly Int32Array[];
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
  if (source.model.unusedTensors.length > 0) {
    const [first] = source.model.unusedTensors;
    tell.note?.(
      `${source.model.unusedTensors.length} tensors of ${modelPath} have no place in a ${source.model.architecture}, "${first}" for one; they are left out of ONNX`,
    );
  }
  const job = await prepare(source, recipe, tell);
  if (mode.dryRun) return dryRun(job, notes);

  const request = { path: outputPath, overwrite: mode.overwrite, resume: mode.resume };
  // What is in the way is found before the inputs are hashed, which takes a while; the hash is judged when it is known.
  await OutputFolder.check({ ...request, resume: false, overwrite: mode.overwrite || mode.resume, recipeHash: '' });
  const inputs = await hashInputs(job);
  const manifestRecipe = portableRecipe(recipe, modelPath);
  const recipeHash = createHash('sha256')
    .update(JSON.stringify([manifestRecipe, inputs, packageVersion()]))
    .digest('hex');
  await using output = await OutputFolder.open({ ...request, recipeHash });
  const parts = await PartStore.open(output.partsPath, recipeHash);
  if (output.resumed) {
    const done = source.model.blocks.filter((block) => parts.hasBlock(block.index)).length;
    tell.note?.(`resuming: ${done} of ${source.model.blocks.length} blocks are finished`);
  }

  const { device, runtime } = await solve(job, parts, output, tell);
  const written = await writeArtifact({
    source,
    quantized: parts,
    folder: output.artifactPath,
    formats: recipe.formats,
    version: packageVersion(),
  });
  for (const note of written.notes) tell.note?.(note);
  const details = detailsOf(job, parts);
  const plan: BitPlan = { modules: Object.fromEntries(details.map(([name, { plan: site }]) => [name, site])) };
  const outcome: QuantizeOutcome = {
    ...outlineOf(job, plan, notes),
    averageBits: written.formats[0].storage.averageBits,
    artifacts: artifactsOf(job, written),
    run: {
      output: outputPath,
      device,
      seconds: (performance.now() - started) / 1000,
      peakBytes: process.resourceUsage().maxRSS * 1024,
    },
  };
  await writeManifest(output.artifactPath, {
    command: 'quantize',
    recipe: manifestRecipe,
    plan,
    seed: recipe.seed,
    device,
    versions: { pcomp: packageVersion(), 'onnxruntime-node': runtime },
    inputs,
    outputs: await hashFolder(output.artifactPath),
    weights: written.weights,
  });
  const { plan: _, ...measured } = outcome;
  const sites = details.map(([name, site]) => [name, { relativeError: site.relativeError, seconds: site.seconds }]);
  await writeReport(output.artifactPath, {
    ...measured,
    threads: recipe.threads,
    resumed: output.resumed,
    sites: Object.fromEntries(sites),
  });
  await output.finalize();
  return outcome;
}

async function prepare(source: ModelSource, recipe: QuantizeRecipe, hooks: RunHooks): Promise<Job> {
  const quantizer: Quantizer = QUANTIZERS[recipe.method];
  const selected = selectSites(source.model, recipe.only, recipe.skip);
  const given = recipe.plan === undefined ? undefined : await readPlan(recipe.plan);
  if (given !== undefined && recipe.plan !== undefined) checkPlanFits(recipe.plan, given, source.model, selected);
  const windows = quantizer.needsCalibration ? await readWindows(source, recipe, hooks) : [];
  return { source, recipe, quantizer, selected, given, windows };
}

async function readWindows(
  { model, folder }: ModelSource,
  recipe: QuantizeRecipe,
  hooks: RunHooks,
): Promise<readonly Int32Array[]> {
  const files = calibrationFiles(recipe);
  if (recipe.calibration.length === 0) {
    hooks.note?.(
      'no --calibration given: measuring on the text that ships with pcomp; text of your own domain gives better results',
    );
  }
  const tokenizer = await loadTokenizer(folder, model.shape.vocabSize);
  const tokens = tokenizer.encode(await readText(files.map(parseTextFile)));
  const sequenceLength = Math.min(recipe.sequenceLength, model.shape.contextLength);
  const { windows, notes } = calibrationWindows(tokens, { samples: recipe.samples, sequenceLength, seed: recipe.seed });
  for (const note of notes) hooks.note?.(note);
  return windows;
}

function calibrationFiles(recipe: QuantizeRecipe): readonly string[] {
  return recipe.calibration.length > 0 ? recipe.calibration : [fileURLToPath(new URL('assets/calibration.txt', packageRoot()))];
}

/** Quantizes what is not in `parts` yet. Returns where it ran. */
async function solve(
  job: Job,
  parts: PartStore,
  output: OutputFolder,
  hooks: RunHooks,
): Promise<{ device: Device; runtime: string }> {
  const { source, recipe, quantizer } = job;
  await using engine = await createEngine({
    device: recipe.device,
    threads: recipe.threads,
    onNote: (note) => hooks.note?.(note),
  });
  const blas = createBlas(engine);
  const progress = new QuantizeProgress(source.model, hooks);
  await using calibration = quantizer.needsCalibration
    ? new Calibration({
        model: source.model,
        engine,
        blas,
        windows: job.windows,
        path: source.path,
        ramBytes: recipe.maxMemory,
        onProgress: (event) => progress.calibration(event),
      })
    : undefined;
  await quantizeBlocks({
    model: source.model,
    weights: source.weights,
    quantizer,
    options: { ...recipe, bits: recipe.bits ?? 0 },
    blas,
    calibration,
    parts,
    selected: job.selected,
    given: job.given,
    trueSequential: recipe.trueSequential,
    onStored: () => output.keepForResume(),
    progress,
    hooks,
  });
  if (recipe.embeddings !== 'float' && !parts.hasEmbeddings) {
    await quantizeEmbeddings(source, { ...recipe, bits: recipe.embeddings, symmetric: false }, blas, parts, hooks);
  }
  return { device: engine.device, runtime: engine.runtime };
}

function detailsOf({ source, selected }: Job, parts: PartStore): [string, SiteDetails][] {
  return source.model.blocks.flatMap((block) => {
    const { sites } = parts.blockDetails(block.index) as unknown as BlockDetails;
    return block.sites
      .filter((site) => selected.has(site.name))
      .map((site): [string, SiteDetails] => [site.name, sites[site.name]]);
  });
}

function outlineOf({ source, recipe, selected, quantizer, windows }: Job, plan: BitPlan, notes: readonly string[]) {
  const tokens = windows.reduce((sum, window) => sum + window.length, 0);
  const { needsCalibration } = quantizer;
  return {
    architecture: source.model.architecture,
    method: `${recipe.method}, preset ${recipe.preset}`,
    modules: source.model.blocks.reduce((sum, block) => sum + block.sites.length, 0),
    quantizedModules: selected.size,
    sourceBytes: source.weightBytes,
    plan,
    notes,
    passes: needsCalibration
      ? `2 forward passes over ${tokens} tokens in ${windows.length} windows`
      : 'none: the method reads no text',
    predictedPeakBytes: estimatePeakBytes(source.model, { needsCalibration, selected, tokens, maxMemory: recipe.maxMemory }),
  };
}

/** Sizes as they would be with one width everywhere, or with the plan that is given. */
function dryRun(job: Job, notes: string[]): QuantizeOutcome {
  const { source, recipe, given, selected } = job;
  const sites = source.model.blocks.flatMap((block) => block.sites).filter((site) => selected.has(site.name));
  const uniform = (columns: number): SitePlan => ({
    groupSize: recipe.groupSize,
    bits: new Array<number>(Math.ceil(columns / recipe.groupSize)).fill(recipe.bits ?? 0),
  });
  const plans = new Map(sites.map((site) => [site.name, given?.modules[site.name] ?? uniform(site.inFeatures)]));
  if (recipe.embeddings !== 'float') notes.push('sizes count the embeddings as they are stored now');
  if (given === undefined && recipe.method === 'slim-llm') {
    notes.push(
      'sizes are those of one width everywhere; slim-llm mixes widths around it, which makes an ONNX file larger (a 1-bit group takes 2 bits there, a 3-bit group 4)',
    );
  }
  const artifacts = recipe.formats.map((format) => ({ format, ...predictSizes(source, sites, plans, format) }));
  return {
    ...outlineOf(job, { modules: Object.fromEntries(plans) }, notes),
    averageBits: artifacts[0].averageBits,
    artifacts,
  };
}

function artifactsOf({ recipe }: Job, { formats }: WrittenArtifact) {
  return recipe.formats.map((format, i) => ({ format, ...sizesOf(formats[i].storage, formats[i].weightBytes, format) }));
}

/** The recipe without what this machine is: threads, and folders on the way to files. */
function portableRecipe(recipe: QuantizeRecipe, modelPath: string): Record<string, unknown> {
  const { threads: _, maxMemory: __, plan, ...portable } = recipe;
  return {
    model: basename(modelPath),
    ...portable,
    calibration: recipe.calibration.map((file) => basename(file)),
    ...(plan === undefined ? {} : { plan: basename(plan) }),
  };
}

async function hashInputs({ source, recipe, quantizer }: Job): Promise<Record<string, HashedFile>> {
  const files = new Map<string, string>();
  for (const { path } of source.files) files.set(`model/${basename(path)}`, path);
  files.set('model/config.json', source.configPath);
  if (quantizer.needsCalibration) {
    files.set('model/tokenizer.json', join(source.folder, 'tokenizer.json'));
    calibrationFiles(recipe).forEach((file, i) => {
      const { path } = parseTextFile(file);
      files.set(`calibration/${i}/${basename(path)}`, path);
    });
  }
  if (recipe.plan !== undefined) files.set(`plan/${basename(recipe.plan)}`, recipe.plan);
  const hashed: Record<string, HashedFile> = {};
  for (const [name, path] of files) hashed[name] = await hashFile(path);
  return hashed;
}
