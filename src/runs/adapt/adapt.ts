/** `adapt`: a low-rank adapter for a frozen model, float or quantized, trained on text within a budget. */
import { createHash } from 'node:crypto';
import { basename, resolve } from 'node:path';
import { writeReport } from '../../artifacts/manifest.ts';
import { assertNaturalOrder, openModelSource } from '../../artifacts/model-source.ts';
import { OutputFolder } from '../../artifacts/output-folder.ts';
import { Spool } from '../../calibration/state-store.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import { createEngine } from '../../compute/ort.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { RecipeError, UnsupportedError } from '../../errors.ts';
import { type SpendableBudget, spendable } from '../../methods/rank/rank-budget.ts';
import { TRAINING_SCHEDULES } from '../../methods/rank/training/index.ts';
import type { TrainedModule, TrainingSchedule } from '../../methods/rank/training/schedule.ts';
import type { Model } from '../../model/model.ts';
import { packageVersion } from '../../package-root.ts';
import { matchModules } from '../module-glob.ts';
import type { OutputMode } from '../quantize/quantize.ts';
import type { RunHooks } from '../run.ts';
import { loadCheckpoint, saveCheckpoint } from './checkpoint.ts';
import { portableRecipe, writeAdaptManifest } from './describe.ts';
import { hashInputs } from './inputs.ts';
import { type AdaptOutcome, outcomeOf, type PreparedRun, sizeOf } from './outcome.ts';
import { writeUpdates } from './output.ts';
import type { AdaptRecipe } from './recipe.ts';
import { type FoundStart, findStart } from './start.ts';
import { endOfText, readTrainingText } from './text.ts';
import { Trainer } from './train.ts';

/** Seconds between two checkpoints. */
const CHECKPOINT_SECONDS = 60;

/**
 * Trains an adapter and writes it as a PEFT folder. Throws RecipeError for a request that cannot be met, FormatError for a broken input,
 * TrainingError when numbers stay infinite; all checks come before the first step.
 */
export async function adapt(
  path: string,
  outputPath: string,
  recipe: AdaptRecipe,
  mode: OutputMode,
  hooks: RunHooks = {},
): Promise<AdaptOutcome> {
  const started = performance.now();
  const notes: string[] = [];
  const note = (message: string): void => {
    notes.push(message);
    hooks.note?.(message);
  };
  const request = { path: outputPath, overwrite: mode.overwrite, resume: mode.resume };
  if (!mode.dryRun)
    await OutputFolder.check({ ...request, resume: false, overwrite: mode.overwrite || mode.resume, recipeHash: '' });
  await using source = await openModelSource(path);
  assertNaturalOrder(source, 'adapt');
  const { model } = source;
  const routed = model.blocks.flatMap(({ sites }) => sites).find((site) => source.weights.routed?.(site));
  if (routed) throw new UnsupportedError(`${path}: "${routed.name}" has experts beside it, and takes no adapter in training`);
  const modules = modulesOf(model, recipe.targets);
  const budget = budgetOf(recipe, modules);
  const { steps, preset, seed, method } = recipe;
  const tokenizer = await loadTokenizer(source.folder, model.shape.vocabSize);
  const length = Math.min(recipe.sequenceLength, model.shape.contextLength);
  const text = await readTrainingText(tokenizer, recipe.text, length, endOfText(source.config));
  await using engine = await createEngine({ device: recipe.device, threads: recipe.threads, onNote: note });
  await using spool = new Spool({ ramBytes: recipe.maxMemory / 2 });
  const forward = { model, engine, blas: createBlas(engine), spool, path, signal: hooks.signal };
  if (recipe.against !== undefined && source.kind === 'float') {
    throw new RecipeError(
      `${recipe.init === 'loftq' ? '--init loftq' : `--method ${method}${method === 'qerror' ? '' : ' --against'}`}: repairs what quantization lost, and ${path} is float; gora and eva are for float models`,
    );
  }
  const job = { recipe, forward, weights: source.weights, modules, budget, training: text.training, progress: hooks.progress };
  const start = await findStart(job);
  const schedule: TrainingSchedule = TRAINING_SCHEDULES[method]({
    steps,
    budget,
    preset,
    seed,
    scale: scaleOf(recipe, modules, start),
    startRank: recipe.startRank,
    growth: recipe.growth,
    start,
  });
  schedule.init(modules);
  const windows = { training: text.training.length, heldOut: text.heldOut.length, tokens: length };
  const learningRate = recipe.lr ?? schedule.learningRate;
  const prepared: PreparedRun = { recipe, modules, budget, schedule, start, windows, learningRate };
  const spent = modules.reduce((sum, module) => sum + sizeOf(prepared, module, module.rank).spent, 0);
  const overspent = (total: number): void => {
    if (total > budget.total) note(`${method}, preset ${preset}: spends ${total} of ${Math.floor(budget.total)}, as published`);
  };
  if (method === 'gora' || start?.surrogate) overspent(spent);
  if (start?.surrogate) {
    const { components, windows, concentration } = start.surrogate;
    note(
      `calibration surrogate of ${method}: ranks from ${windows} windows' gradients of components of ${components === 'error' ? 'what quantization lost' : 'the gradient'}, nothing is trained; results published for ${method} say nothing about it (Gini coefficient of the layers' scores: ${concentration.toFixed(2)})`,
    );
  }
  if (mode.dryRun) return outcomeOf(prepared, notes);

  const inputs = await hashInputs(source, recipe);
  const recipeHash = createHash('sha256')
    .update(JSON.stringify([portableRecipe(recipe), inputs, packageVersion()]))
    .digest('hex');
  await using output = await OutputFolder.open({ ...request, recipeHash });
  const rules = { steps, batch: recipe.batch, learningRate, patience: recipe.patience, seed, keptBytes: recipe.maxMemory / 2 };
  const trainer = new Trainer(forward, source.weights, modules, schedule, text, rules);
  const before = await trainer.heldOutOfBase();
  const begun = await firstStep(trainer, start, before, note);
  if (output.resumed && (await loadCheckpoint(output.partsPath, trainer)))
    note(`resuming after step ${trainer.progress.step} of ${steps}`);
  await train(trainer, output, steps, hooks);

  const best = trainer.best ?? (await trainer.updates());
  const { looks, losses, skipped } = trainer.progress;
  const bestLook = trainer.progress.best ?? { step: 0, nll: begun };
  if (steps === 0) note(`nothing was trained${start?.loraB ? '' : ': the adapter changes nothing until it is'}`);
  if (bestLook.nll > before || (steps > 0 && bestLook.nll === before))
    note(`held-out loss did not fall: ${before.toFixed(4)} before, ${bestLook.nll.toFixed(4)} at best`);
  if (start?.subtracted)
    note(`--init ${recipe.init}: stored with twice the ranks, what was learned less the start, to go on the base as it is`);
  if (recipe.dora)
    note('a DoRA adapter: PEFT reads it; many servers and ONNX exporters do not; adapt convert --to merged folds it');
  await writeUpdates(output.artifactPath, modules, best, {
    base: basename(resolve(path)),
    padRanks: recipe.padRanks,
    transposed: model.blocks.some(({ sites }) => sites.some(({ transposed }) => transposed)),
  });
  const made = outcomeOf(prepared, notes);
  if (method === 'increlora' && steps > 0) overspent(made.budget.spent);
  await writeAdaptManifest(output.artifactPath, prepared, made, { device: engine.device, inputs });
  const run = {
    output: outputPath,
    heldOut: { before, after: looks.at(-1)?.nll ?? begun, best: bestLook.nll, bestStep: bestLook.step },
    losses,
    looks,
    skippedSteps: skipped,
    seconds: (performance.now() - started) / 1000,
    peakBytes: process.resourceUsage().maxRSS * 1024,
    device: engine.device,
  };
  await writeReport(output.artifactPath, { ...made, run });
  await output.finalize();
  return { ...made, run };
}

/** Steps until the end, with a checkpoint now and then, and one when the run is stopped. */
async function train(trainer: Trainer, output: OutputFolder, steps: number, { progress, signal }: RunHooks): Promise<void> {
  let saved = performance.now();
  const save = async () => {
    await output.keepForResume();
    await saveCheckpoint(output.partsPath, trainer);
    saved = performance.now();
  };
  while (!trainer.done) {
    const { step, losses } = trainer.progress;
    progress?.({ phase: `step ${step + 1}, loss ${losses.at(-1)?.toFixed(3) ?? '-'}`, done: step, total: steps });
    try {
      signal?.throwIfAborted();
      await trainer.step();
    } catch (error) {
      // Whatever stopped it, the step has changed nothing.
      if (signal?.aborted && trainer.progress.step > 0) await save();
      throw error;
    }
    if (performance.now() - saved > CHECKPOINT_SECONDS * 1000) await save();
  }
}

function modulesOf(model: Model, targets: readonly string[]): TrainedModule[] {
  const sites = model.blocks.flatMap(({ index, sites: own }) => own.map((site) => ({ site, block: index })));
  const wanted =
    targets.length === 0
      ? undefined
      : matchModules(
          '--targets',
          targets,
          sites.map(({ site }) => site.name),
        );
  return sites
    .filter(({ site }) => wanted?.has(site.name) ?? true)
    .map(({ site: { name, outFeatures, inFeatures }, block }) => ({
      name,
      block,
      outFeatures,
      inFeatures,
      scale: 1,
      rank: 0,
      parameters: new Map(),
    }));
}

/** Bits of a non-zero as it is stored: its value, and where it stands. */
const NON_ZERO_BITS = 64;

function budgetOf({ budget, method }: AdaptRecipe, modules: readonly TrainedModule[]): SpendableBudget {
  if (method === 'snella') return spendable(budget, modules, { parameterBits: NON_ZERO_BITS, least: 1 });
  return spendable(budget, modules, method === 'mola' ? { least: 1 } : {});
}

/** alpha over the rank of an expert, or that the budget allows on average; or over its root. */
function scaleOf(recipe: AdaptRecipe, modules: readonly TrainedModule[], start: FoundStart | undefined): number | undefined {
  const { alpha, rslora } = recipe;
  if (alpha === undefined) return undefined;
  const { total, cost } = budgetOf(recipe, modules);
  const mean = Math.max(1, Math.floor(total / modules.reduce((sum, module) => sum + cost(module), 0)));
  const rank = start?.routed?.(modules[0].name).rank ?? mean;
  return alpha / (rslora ? Math.sqrt(rank) : rank);
}

/** Held-out loss of the start; where a method takes a first step, of the length of it that loses least. @param before that of the base */
async function firstStep(
  trainer: Trainer,
  start: FoundStart | undefined,
  before: number,
  note: (message: string) => void,
): Promise<number> {
  if (!start?.loraB) return before;
  const factors = trainer.modules.map(({ parameters }) => parameters.get('loraB')!.values);
  const whole = factors.map((values) => values.slice());
  const scaled = (length: number) => {
    for (const [i, values] of factors.entries()) values.set(whole[i].map((value) => length * value));
  };
  const { steps = [1] } = start;
  let best = { length: 0, nll: Infinity };
  for (const length of steps) {
    scaled(length);
    const nll = length === 0 ? before : await trainer.heldOut();
    if (nll < best.nll) best = { length, nll };
  }
  scaled(best.length);
  if (start.steps)
    note(
      `first step: ${best.length} of the gradient's length, held-out loss ${before.toFixed(4)} before and ${best.nll.toFixed(4)} after`,
    );
  return best.nll;
}
