/** The work of a quantize run: share the budget out where the method allocates, then block after block into `parts`. */
import type { PartDetails, PartStore } from '../../artifacts/parts.ts';
import { Calibration } from '../../calibration/calibration.ts';
import type { Device, Engine } from '../../compute/engine.ts';
import { ENGINES } from '../../compute/engines.ts';
import { openKernels } from '../../compute/kernels/kernel-pool.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import type { Measuring, QuantizeContext, QuantizeOptions, Quantizer } from '../../methods/quantize/quantizer.ts';
import type { SpendableBudget } from '../../methods/rank/rank-budget.ts';
import { scoreModel } from '../evaluate/window-scores.ts';
import type { Progress, RunHooks } from '../run.ts';
import { allocationOf, bitBudget, branchBits, candidateWidths, type SharedBudget, shareBudget } from './bit-budget.ts';
import { type BlockDetails, contextOf, quantizeBlocks } from './blocks.ts';
import { mostRank, type SharedRanks, shareJointly, shareRanks } from './branches.ts';
import { quantizeEmbeddings } from './embeddings.ts';
import { fileCounts } from './file-budget.ts';
import type { QuantizeJob } from './job.ts';
import { type LossSearch, searchLossBudget } from './loss-budget.ts';
import { QuantizeProgress } from './progress.ts';
import { groupSizesOf, nominalGroupSize, type QuantizeRecipe } from './recipe.ts';
import { SensitivityProbe } from './sensitivity-probe.ts';
import { type ModelSurvey, surveyModel } from './survey.ts';
import { readSurvey, recordSurvey } from './survey-record.ts';

/** Where the work was done, and how the budget was shared out if it was. */
export interface Solved {
  readonly device: Device;
  readonly runtime: string;
  readonly shared?: SharedBudget | undefined;
  /** How ranks were shared out, with `--lowrank`. */
  readonly ranks?: SharedRanks | undefined;
  /** Where the finished blocks are. */
  readonly parts: PartStore;
  /** With `--max-loss`. */
  readonly search?: LossSearch;
}

/** The runtime multiplies in float32. */
const RUNTIME_PARAMETER_BITS = 32;

/** What a method is told of a recipe. */
function optionsOf(recipe: QuantizeRecipe, bits: number): QuantizeOptions {
  // The gptq layout has no place for a transform that a runtime would have to do.
  const transform = recipe.transform === 'auto' && recipe.formats.includes('gptq') ? 'free' : recipe.transform;
  return { ...recipe, transform, bits, groupSize: nominalGroupSize(recipe), groupSizes: groupSizesOf(recipe) };
}

/** How the run measures for a method that reads text. @param bits mean code bits */
export function measuringOf(quantizer: Quantizer, recipe: QuantizeRecipe, bits: number): Measuring {
  const own = quantizer.measuring?.(optionsOf(recipe, bits));
  return own ?? { sequential: recipe.trueSequential, drift: false, replay: quantizer.needsCalibration };
}

/** Quantizes what is not in `store` yet. @param onStored called when a part is safely stored */
export async function solve(job: QuantizeJob, store: PartStore, onStored: () => Promise<void>, hooks: RunHooks): Promise<Solved> {
  const { source, recipe, quantizer } = job;
  const { model, weights } = source;
  await using engine = await ENGINES[recipe.engine]({
    device: recipe.device,
    threads: recipe.threads,
    onNote: (note) => hooks.note?.(note),
  });
  await using kernels = openKernels(recipe.threads);
  const blas = createBlas(engine);
  const options = optionsOf(recipe, job.nominalBits);
  const measuring = measuringOf(quantizer, recipe, job.nominalBits);
  const { surveys } = job;
  let progress = new QuantizeProgress(model, hooks, surveys, measuring.learns !== undefined);
  await using calibration = job.readsText
    ? new Calibration({
        model,
        engine,
        blas,
        windows: job.windows,
        path: source.path,
        ramBytes: recipe.maxMemory,
        followFloat: measuring.drift || measuring.learns !== undefined,
        onProgress: (event) => progress.calibration(event),
        ...(hooks.signal && { signal: hooks.signal }),
      })
    : undefined;
  const run = { model, weights, quantizer, options, blas, kernels, calibration, measuring, onStored, selected: job.selected };
  const survey = () => surveyOf(job, engine, contextOf({ ...run, hooks, allocation: undefined }), calibration, progress, hooks);
  /** What ranks would be worth after codes, block by block, and who gets them. */
  const rankPass = async (parts: PartStore, shared: SharedBudget | undefined, budget: SpendableBudget): Promise<SharedRanks> => {
    const first = await parts.firstPass();
    const told = { ...hooks, progress: (event: Progress) => hooks.progress?.({ ...event, phase: `ranks: ${event.phase}` }) };
    progress = new QuantizeProgress(model, told);
    const { learns: _, ...unlearned } = measuring;
    const branches = { kind: 'survey', mostRank: mostRank(budget, [...job.expected.keys()]) } as const;
    const allocation = shared && allocationOf(shared);
    await quantizeBlocks({
      ...run,
      parts: first,
      measuring: unlearned,
      progress,
      hooks: told,
      given: job.given,
      allocation,
      branches,
    });
    const sites = model.blocks.flatMap((block) => {
      const { sites: details } = first.blockDetails(block.index) as unknown as BlockDetails;
      return block.sites.flatMap((site) => {
        const { plan, spectrum } = details[site.name] ?? {};
        return plan && spectrum ? [{ site, plan, spectrum }] : [];
      });
    });
    progress = new QuantizeProgress(model, hooks, false, measuring.learns !== undefined);
    if (!recipe.joint || !shared) return shareRanks(sites, budget, shared?.sensitivities);
    const surveyed = readSurvey(store.finding('survey')!, model);
    const parameterBits = recipe.runtimeMemory === undefined ? branchBits(recipe) : RUNTIME_PARAMETER_BITS;
    const codes = bitBudget(recipe, job.fixed, await fileCounts(job, 'planned'));
    // A budget of files has the ranks in it.
    const both = codes.files ? codes : { ...codes, bits: codes.bits + parameterBits * budget.total };
    const found = await shareJointly(sites, budget, parameterBits, shared.predictedLoss, (repairs) =>
      shareBudget(surveyed, candidateWidths(recipe), both, repairs),
    );
    if (found.spent === 0) hooks.note?.('--joint: no layer got a branch, since bits are worth more in all of them');
    return found;
  };
  let ranks: SharedRanks | undefined;
  const quantize = async (parts: PartStore, shared: SharedBudget | undefined, hooks: RunHooks) => {
    progress.startBlocks();
    if (job.rankBudget) {
      ranks = parts.ranks as unknown as SharedRanks | undefined;
      if (ranks === undefined) {
        ranks = await rankPass(parts, shared, job.rankBudget);
        await parts.addRanks(ranks as unknown as PartDetails);
        await onStored();
      }
    }
    // Ranks were counted on these widths.
    const given = ranks?.plan ?? job.given;
    const joint = ranks?.joint;
    const budget = joint ?? shared;
    const allocation = given || !budget ? undefined : allocationOf(budget);
    const { lowrankInputs: variant, lowrankOuter: rounds, lowrankBits: bits } = recipe;
    const own =
      joint && new Map(Object.entries(joint.sites).flatMap(([name, { rank }]) => (rank ? [[name, rank] as const] : [])));
    const branches = job.branches ? ({ kind: 'add', options: { variant, rounds, bits }, ranks: own } as const) : undefined;
    await quantizeBlocks({ ...run, parts, progress, hooks, given, allocation, branches });
    if (recipe.embeddings !== 'float' && !parts.hasEmbeddings) {
      await quantizeEmbeddings(weights, job.expectedEmbeddings, options, blas, parts, hooks);
    }
  };
  const { device, runtime } = engine;
  if (recipe.maxLoss !== undefined) {
    const known = store.finding('survey');
    const surveyed = known ? readSurvey(known, model) : await survey();
    if (known === undefined) await store.addFinding('survey', recordSurvey(surveyed));
    await onStored();
    const found = await searchLossBudget({
      job,
      parts: store,
      survey: surveyed,
      hooks,
      onStored,
      quantize: async (parts, shared, hooks) => {
        progress = new QuantizeProgress(model, hooks, false, measuring.learns !== undefined);
        await quantize(parts, shared, hooks);
      },
      evaluate: (weights) =>
        scoreModel({ ...source, weights }, { engine, blas, windows: job.heldOut, ramBytes: recipe.maxMemory / 2, hooks }),
    });
    return { device, runtime, ...found };
  }
  let shared = store.allocation as unknown as SharedBudget | undefined;
  if (surveys && shared === undefined) {
    const budget = bitBudget(recipe, job.fixed, await fileCounts(job, 'reserved'));
    const surveyed = await survey();
    // Asked again when it is known what ranks are worth.
    if (recipe.joint && !store.finding('survey')) await store.addFinding('survey', recordSurvey(surveyed));
    shared = await shareBudget(surveyed, candidateWidths(recipe), budget);
    await store.addAllocation(shared as unknown as Record<string, unknown>);
    await onStored();
  }
  await quantize(store, shared, hooks);
  return { device, runtime, shared: ranks?.joint ?? shared, ranks, parts: store };
}

/** One pass over the float model, and what errors in its layers do to the logits. */
async function surveyOf(
  job: QuantizeJob,
  engine: Engine,
  context: QuantizeContext,
  calibration: Calibration | undefined,
  progress: QuantizeProgress,
  hooks: RunHooks,
): Promise<ModelSurvey> {
  const { source, recipe, quantizer, selected, windows } = job;
  const { model, weights, path } = source;
  // A method that reads no text does not weigh by it either, even where branches will.
  const probes = quantizer.needsCalibration && recipe.sensitivity === 'probe';
  await using probe = probes
    ? await SensitivityProbe.start({
        model,
        weights,
        engine,
        blas: context.blas,
        windows,
        path,
        ramBytes: recipe.maxMemory / 4,
        signal: hooks.signal,
      })
    : undefined;
  return await surveyModel({
    model,
    weights,
    quantizer,
    context,
    calibration: quantizer.needsCalibration ? calibration : undefined,
    probe,
    selected,
    widths: candidateWidths(recipe),
    relative: recipe.sensitivity === 'relative',
    signal: hooks.signal,
    onBlock: (done) => progress.surveyed(done),
  });
}
