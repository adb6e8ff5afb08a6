/** The loop of a quantize run: measure a block, decide and apply each site, store the block, move the text through it. */
import { fromFloat32, toFloat32 } from '../../../formats/dtype.ts';
import { freeInputs } from '../../artifacts/folds.ts';
import type { PartStore } from '../../artifacts/parts.ts';
import type { Calibration } from '../../calibration/calibration.ts';
import type { CalibrationStats } from '../../calibration/statistics.ts';
import type { Blas } from '../../compute/blas.ts';
import type { AsyncKernels } from '../../compute/kernels/kernels.ts';
import type { LowRankBranch } from '../../methods/quantize/low-rank.ts';
import { dequantize, type QuantizedLinear } from '../../methods/quantize/quantized-linear.ts';
import type {
  BitAllocation,
  BitPlan,
  LearnedBlock,
  Measuring,
  QuantizeContext,
  QuantizeOptions,
  Quantizer,
  SitePlan,
  SiteToLearn,
} from '../../methods/quantize/quantizer.ts';
import type { Block, LinearSite, Model, WeightReader } from '../../model/model.ts';
import type { RunHooks } from '../run.ts';
import { addBranchTo, type BranchWork, type RankSpectrum, surveyRanks } from './branches.ts';
import type { QuantizeProgress } from './progress.ts';

export interface BlocksRun {
  readonly model: Model;
  /** The float model's weights. */
  readonly weights: WeightReader;
  readonly quantizer: Quantizer;
  readonly options: QuantizeOptions;
  readonly blas: Blas;
  /** Absent for a method that needs no text. */
  readonly calibration: Calibration | undefined;
  readonly parts: PartStore;
  /** Module names to quantize. */
  readonly selected: ReadonlySet<string>;
  /** Widths to follow instead of deciding. */
  readonly given: BitPlan | undefined;
  readonly measuring: Measuring;
  /** What a survey gave each site. */
  readonly allocation: BitAllocation | undefined;
  /** What is done about low-rank branches; absent: nothing. */
  readonly branches?: BranchWork | undefined;
  readonly kernels?: AsyncKernels;
  /** Called when a block is safely stored. */
  readonly onStored: () => Promise<void>;
  readonly progress: QuantizeProgress;
  readonly hooks: RunHooks;
}

/** What is remembered of a finished block beside its weights. */
export interface BlockDetails {
  readonly sites: Readonly<Record<string, SiteDetails>>;
  /** Of a method that learns. */
  readonly learning?: BlockLearning;
}

/** What learning did for a block: mean squared error of its output on held-out windows before and after, and the step that was kept (0: none). */
export interface BlockLearning extends Pick<LearnedBlock, 'lossBefore' | 'lossAfter' | 'step'> {
  readonly seconds: number;
}

export interface SiteDetails {
  readonly plan: SitePlan;
  /** Relative output error on the calibration text, `tr(dW H dW^T) / tr(W H W^T)`; absent for methods that do not know H. */
  readonly relativeError?: number;
  /** What ranks would be worth, in a pass that asks. */
  readonly spectrum?: RankSpectrum;
  /** What else the method tells of the layer. */
  readonly details?: Readonly<Record<string, number>>;
  readonly seconds: number;
}

/** Quantizes every block that is not in `parts` yet. */
export async function quantizeBlocks(run: BlocksRun): Promise<void> {
  const { model, parts, calibration } = run;
  const lastOpen = model.blocks.findLast((block) => !parts.hasBlock(block.index));
  if (lastOpen === undefined) return;
  await calibration?.start(run.weights);
  for (const block of model.blocks) {
    run.hooks.signal?.throwIfAborted();
    if (!parts.hasBlock(block.index)) {
      await quantizeBlock(run, block);
      await run.onStored();
    }
    if (block === lastOpen) return;
    // The following blocks see what the artifact will make: weights decoded from what was stored.
    await calibration?.advance(block, decoded(run.weights, parts));
    if (run.measuring.drift || run.measuring.learns) await calibration?.advanceFloat(block, run.weights);
  }
}

async function quantizeBlock(run: BlocksRun, block: Block): Promise<void> {
  const finished = new Map<string, QuantizedLinear>();
  const sites: Record<string, SiteDetails> = {};
  const sitesOf = (input: string) => block.sites.filter((site) => site.input === input && run.selected.has(site.name));
  const inputs = block.inputs.filter((input) => sitesOf(input).length > 0);
  const stages = run.measuring.sequential ? inputs.map((input) => [input]) : [inputs];
  for (const stage of stages) {
    if (stage.length === 0) continue;
    const weights = decoded(run.weights, { has: (name) => finished.has(name), read: async (name) => finished.get(name)! });
    await using measured = await run.calibration?.measure(block, weights, {
      inputs: stage,
      replay: run.measuring.replay && run.given === undefined,
      float: run.measuring.drift ? run.weights : undefined,
      staged: run.measuring.sequential,
    });
    for (const input of stage) {
      for (const site of sitesOf(input)) {
        run.hooks.signal?.throwIfAborted();
        const started = performance.now();
        const weight = await run.weights.loadSite(site);
        const stats = measured?.get(input);
        const context = contextOf(run);
        const plan = run.given?.modules[site.name] ?? (await decide(run, context, site, weight, stats));
        let result = await run.quantizer.apply(context, site, weight, stats, plan);
        let spectrum: RankSpectrum | undefined;
        if (run.branches && stats) {
          const done = { context, quantizer: run.quantizer, site, weight, stats, plan, result };
          if (run.branches.kind === 'survey') spectrum = await surveyRanks(done, run.branches.mostRank);
          else result = await addBranchTo(done, run.branches.options);
        }
        const { quantized, relativeError, details } = result;
        finished.set(site.name, quantized);
        const seconds = (performance.now() - started) / 1000;
        sites[site.name] = {
          plan: withRank(plan, quantized.lowRank?.rank, widthOf(quantized.lowRank)),
          ...(relativeError === undefined ? {} : { relativeError }),
          ...(spectrum && { spectrum }),
          ...(details && { details }),
          seconds,
        };
        run.progress.siteDone(block, site);
      }
      await measured?.release(input);
    }
  }
  const learning = await refineBlock(run, block, finished, sites);
  await run.parts.addBlock(block.index, finished, { sites, ...(learning && { learning }) } satisfies BlockDetails);
}

async function decide(
  { quantizer, branches }: BlocksRun,
  context: QuantizeContext,
  site: LinearSite,
  weight: Float32Array,
  stats: CalibrationStats | undefined,
): Promise<SitePlan> {
  const plan = await quantizer.decide(context, site, weight, stats);
  return withRank(plan, branches?.kind === 'add' ? branches.ranks?.get(site.name) : undefined);
}

/** The plan with the rank that the layer came to have: fewer than asked for where more would be nothing. */
function withRank({ rank: _, rankBits: __, ...plan }: SitePlan, rank: number | undefined, rankBits?: 8 | 4): SitePlan {
  return rank === undefined ? plan : { ...plan, rank, ...(rankBits && { rankBits }) };
}

function widthOf(branch: LowRankBranch | undefined): 8 | 4 | undefined {
  return branch?.dtype === 'Q8' ? 8 : branch?.dtype === 'Q4' ? 4 : undefined;
}

/** Lets a method that learns replace what is finished of the block by something better. */
async function refineBlock(
  run: BlocksRun,
  block: Block,
  finished: Map<string, QuantizedLinear>,
  details: Record<string, SiteDetails>,
): Promise<BlockLearning | undefined> {
  const { quantizer, calibration, measuring } = run;
  if (!quantizer.refine || !measuring.learns || !calibration || finished.size === 0) return undefined;
  const started = performance.now();
  const sites: SiteToLearn[] = [];
  for (const site of block.sites) {
    const quantized = finished.get(site.name);
    if (quantized) sites.push({ site, weight: await run.weights.loadSite(site), quantized });
  }
  const weights = decoded(run.weights, { has: (name) => finished.has(name), read: async (name) => finished.get(name)! });
  await using objective = await calibration.objective(block, weights, run.weights, measuring.learns === 'dual');
  const context = { ...contextOf(run), onStep: (done: number, total: number) => run.progress.learned(block, done, total) };
  const { quantized, lossBefore, lossAfter, step } = await quantizer.refine(context, sites, objective);
  if (step === 0) run.hooks.note?.(`${block.name}: learning did not lower the error on held-out text; it stays as it was`);
  else {
    for (const [name, layer] of quantized) {
      finished.set(name, layer);
      // It was of other codes.
      const { relativeError: _, ...rest } = details[name];
      details[name] = rest;
    }
  }
  return { lossBefore, lossAfter, step, seconds: (performance.now() - started) / 1000 };
}

/** What a method is given in this run. */
export function contextOf(
  run: Pick<BlocksRun, 'model' | 'selected' | 'blas' | 'options' | 'weights' | 'hooks' | 'allocation' | 'kernels'>,
): QuantizeContext {
  const free = freeInputs(run.model, run.selected);
  return {
    sortsFreely: (input) => free.has(input),
    blas: run.blas,
    options: run.options,
    note: (site, message) => run.hooks.note?.(`${site.name}: ${message}`),
    loadBias: (site) => run.weights.load(`${site.name}.bias`),
    roundBias: (site, bias) => {
      const dtype = run.weights.info(`${site.name}.bias`)?.dtype ?? 'F32';
      if (dtype !== 'F16' && dtype !== 'BF16') return bias;
      return toFloat32(dtype, fromFloat32(dtype, bias));
    },
    ...(run.allocation && { allocation: run.allocation }),
    ...(run.kernels && { kernels: run.kernels }),
  };
}

/** Weights as float32, with the sites that are quantized already decoded from their codes. */
export function decoded(
  weights: WeightReader,
  quantized: { has(name: string): boolean; read(name: string): Promise<QuantizedLinear> },
): WeightReader {
  return {
    load: async (name) => {
      const module = name.endsWith('.bias') ? name.slice(0, -'.bias'.length) : '';
      return (quantized.has(module) && (await quantized.read(module)).bias) || weights.load(name);
    },
    loadRows: (name, start, end) => weights.loadRows(name, start, end),
    info: (name) => weights.info(name),
    loadSite: async (site: LinearSite) =>
      quantized.has(site.name) ? dequantize(await quantized.read(site.name)) : weights.loadSite(site),
  };
}
