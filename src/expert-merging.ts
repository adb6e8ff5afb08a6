/** Expert Merging and Expert Merging++: teachers once, a start, coefficients per tensor, then per chunk where it matters (merging.md, section 6). */
import { join } from 'node:path';
import { Spool } from './calibration/state-store.ts';
import { loadTokenizer } from './calibration/tokenizer.ts';
import { createEngine } from './compute/ort.ts';
import { createBlas } from './compute/ort-blas.ts';
import { RecipeError } from './errors.ts';
import { learnStage, type Stage, type StageResult, type StageRules } from './expert-learn.ts';
import { readSamples } from './expert-samples.ts';
import { findStart, START_METHODS } from './expert-start.ts';
import { type Distance, distances, type Forward, type Lesson, meanKl, teach } from './expert-teachers.ts';
import { LearnedWeights } from './learned-weights.ts';
import type { MergeInputs } from './merge-inputs.ts';
import type { TensorJob } from './merge-jobs.ts';
import type { MergeRecipe } from './merge-recipe.ts';
import { MergeWeights } from './merge-weights.ts';
import { evenChunks, floorChunks } from './methods/merge/expert-merging/chunk-budget.ts';
import { type ChunkBounds, flatChunks, rowChunks } from './methods/merge/expert-merging/chunks.ts';
import { type CoefficientRules, Coefficients, effectiveCoefficient } from './methods/merge/expert-merging/coefficients.ts';
import type { LearnedMethod, LearnedValues } from './methods/merge/learned.ts';
import type { MergePlan } from './methods/merge/merge-plan.ts';
import { createModel } from './model/architectures/index.ts';
import type { Block, LinearSite } from './model/model.ts';
import type { RunHooks } from './run.ts';

type Values = LearnedValues;

/** Strengths of the pull to the start that are compared, and how many samples of each expert that takes. */
const GAMMAS = [0.02, 0.1, 0.4, 1.5];
const VALIDATED_FROM = 32;
const UNVALIDATED_GAMMA = 0.8;
/** Part of --max-memory for task vectors that stay in memory; the rest is for activations, and what neither holds is on disk. */
const KEPT = 0.5;

const BEST: CoefficientRules = { parametrization: 'linear', anchor: 0, range: [-1, 1.5] };
/** AdaMerging: no bounds, and 0.3 of every expert to begin with. */
const UNBOUNDED: CoefficientRules = {
  parametrization: 'linear',
  anchor: 0.3,
  range: [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY],
};
const PAPER: CoefficientRules = { parametrization: 'sigmoid', anchor: 0.1, range: [0, 1] };

/** How far the result is from each expert, on samples that were held out where there are enough. */
export interface ExpertReport {
  readonly label: string;
  readonly samples: number;
  readonly base: Distance;
  readonly start: Distance;
  readonly merged: Distance;
  /** `1 - KL(merged) / KL(base)`. */
  readonly recovered: number;
}

/** What a reader of the report should know of the learning. */
export interface LearningReport {
  readonly experts: readonly ExpertReport[];
  readonly judgedOn: 'held-out samples' | 'training samples';
  readonly gamma: number;
  readonly start: Awaited<ReturnType<typeof findStart>>['tried'];
  readonly stages: readonly (StageResult & { readonly name: string; readonly coefficients: number })[];
}

export interface LearnedMerge {
  readonly plan: MergePlan;
  readonly report: LearningReport;
}

/** Learns a plan. @param jobs of any schedule over the same inputs: where every tensor's parts are */
export async function learnMerge(
  method: LearnedMethod,
  values: Values,
  inputs: MergeInputs,
  jobs: readonly TensorJob[],
  recipe: MergeRecipe,
  hooks: RunHooks,
): Promise<LearnedMerge> {
  const { config, folder, template } = inputs;
  if (config === undefined)
    throw new RecipeError(`${folder}: ${method.name} runs the model, and there is no config.json to tell how`);
  const model = createModel(config, join(folder, 'config.json'), template.tensors);
  const tokenizer = await loadTokenizer(folder, model.shape.vocabSize);
  const labels = inputs.experts.map(({ label }) => label);
  const paper = recipe.preset === 'paper';
  const { training, heldOut, notes } = await readSamples(tokenizer, {
    calibration: recipe.calibration,
    labels,
    count: values.samples,
    sequenceLength: Math.min(values.length, model.shape.contextLength),
    seed: recipe.seed,
    holdOut: !paper,
  });
  for (const note of notes) hooks.note?.(note);
  await using engine = await createEngine({ threads: recipe.threads, onNote: (note) => hooks.note?.(note) });
  await using spool = new Spool({ ramBytes: recipe.maxMemory * (1 - KEPT) });
  using weights = new MergeWeights(inputs, jobs, recipe.maxMemory * KEPT);
  const forward: Forward = { model, engine, blas: createBlas(engine), spool, path: folder, signal: hooks.signal };
  const progress = (phase: string) => (done: number, total: number) => hooks.progress?.({ phase, done, total });
  const reader = (k: number) => weights.expert(k);
  const onTeacher = (k: number) => progress(`teacher ${labels[k]}`)(k, labels.length);
  await using teachers = await teach(forward, [...training, ...heldOut], labels.length, reader, onTeacher);
  const lessons = teachers.lessons.slice(0, training.length);
  const judges = heldOut.length > 0 ? teachers.lessons.slice(training.length) : lessons;

  const found = await findStart({
    forward,
    teachers,
    weights,
    labels,
    lessons,
    seed: recipe.seed,
    methods: values.start === 'auto' ? START_METHODS : values.start === 'none' ? [] : [values.start],
    passive: values.passive,
    onCandidate: progress('start'),
  });
  const { updates, passive } = found;
  const { scale } = found.start;
  const learnedBy = (coefficients?: Coefficients) =>
    new LearnedWeights({ weights, expertCount: labels.length, updates, scale, passive, coefficients });
  const distance = (reader: ReturnType<typeof learnedBy>) => distances(forward, teachers, judges, labels.length, reader);

  const sites = model.blocks.flatMap((block) => block.sites.map((site) => ({ block, site })));
  const rules = method.objective === 'entropy' ? UNBOUNDED : paper ? PAPER : BEST;
  const make = (bounds: (index: number) => ChunkBounds) =>
    new Coefficients(
      sites.map(({ site }, index) => ({ name: site.name, bounds: bounds(index) })),
      labels.length,
      rules,
    );
  const whole = () => make((index) => [0, sizeOf(sites[index].site)]);
  const stageOf = (name: string, coefficients: Coefficients, own: readonly Lesson[], looks: readonly Lesson[]): Stage => ({
    forward,
    teachers,
    weights,
    expertCount: labels.length,
    training: own,
    heldOut: looks,
    coefficients,
    learned: learnedBy(coefficients),
    seed: recipe.seed,
    name,
    onUpdate: progress(name),
  });
  const looks = heldOut.length > 0 ? judges : [];
  const run = (stage: Stage, own: StageRules) => learnStage(stage, own);

  const gamma = await gammaOf(values, training.length / labels.length, async (candidate) => {
    let sum = 0;
    for (const fold of [0, 1]) {
      const [rest, judged] = [lessons.filter((_, i) => i % 2 !== fold), lessons.filter((_, i) => i % 2 === fold)];
      const coefficients = whole();
      const stage = stageOf(`gamma ${candidate}`, coefficients, rest, []);
      await run(stage, { ...rulesOf(method, values, paper, candidate), selects: false });
      sum += meanKl(await distances(forward, teachers, judged, labels.length, learnedBy(coefficients)));
    }
    return sum;
  });
  const stages: {
    name: string;
    coefficients: number;
    losses: StageResult['losses'];
    looks: StageResult['looks'];
    clamped: number;
  }[] = [];
  let coefficients = whole();
  const first = await run(
    stageOf('coefficients per tensor', coefficients, lessons, looks),
    rulesOf(method, values, paper, gamma, labels.length),
  );
  stages.push({ name: 'coefficients per tensor', coefficients: coefficients.parameters.length, ...first });
  if (method.chunked) {
    const bounds = await chunkBounds(values, paper, training.length / labels.length);
    const chunked = make((index) => bounds[index]);
    if (!paper)
      for (let l = 0; l < sites.length; l++) for (let k = 0; k < labels.length; k++) repeat(coefficients, chunked, l, k);
    const own = { ...rulesOf(method, values, paper, gamma), ...(paper ? {} : { updates: values.chunk_updates }) };
    const second = await run(stageOf('coefficients per chunk', chunked, lessons, looks), own);
    stages.push({ name: 'coefficients per chunk', coefficients: chunked.parameters.length, ...second });
    coefficients = chunked;
  }

  const [atBase, atStart, merged] = [
    await distance(new LearnedWeights({ weights, expertCount: labels.length, updates: undefined, scale: 0, passive: 'base' })),
    await distance(learnedBy()),
    await distance(learnedBy(coefficients)),
  ];
  const experts = labels.map((label, k) => ({
    label,
    samples: training.filter(({ expert }) => expert === k).length,
    base: atBase[k],
    start: atStart[k],
    merged: merged[k],
    recovered: atBase[k].kl > 0 ? 1 - merged[k].kl / atBase[k].kl : 0,
  }));
  const plan: MergePlan = {
    method: method.name,
    experts: labels,
    start: found.start,
    passive,
    tensors: Object.fromEntries(
      sites.map(({ site }, l) => {
        const { bounds } = coefficients.tensors[l];
        const own = labels.map((_, k) => coefficients.of(l, k));
        return [`${site.name}.weight`, { bounds: bounds.length > 1 ? bounds : [0, sizeOf(site)], coefficients: own }];
      }),
    ),
  };
  const judgedOn = heldOut.length > 0 ? 'held-out samples' : 'training samples';
  return { plan, report: { experts, judgedOn, gamma, start: found.tried, stages } };

  async function chunkBounds(own: Values, published: boolean, samples: number): Promise<ChunkBounds[]> {
    const perTensor = own.chunks > 0 ? own.chunks : samples >= 56 ? 8 : samples >= 28 ? 4 : 1;
    const reader = learnedBy(coefficients);
    const tensors = [];
    for (const [l, { block, site }] of sites.entries()) {
      const update = published ? undefined : await reader.update(site);
      const vectors = labels.map((_, k) => weights.taskVector(k, site));
      const unit = headUnit(block, site);
      tensors.push({
        coefficients: vectors.map((vector, k) => (update ? effectiveCoefficient(update, vector) : coefficients.of(l, k)[0])),
        magnitudes: vectors.map(meanMagnitude),
        elements: sizeOf(site),
        limit: published ? sizeOf(site) : Math.floor(site.outFeatures / unit),
      });
    }
    const budget = { perTensor, sharpness: own.sharpness };
    const chunks = published ? floorChunks(tensors, budget) : evenChunks(tensors, budget);
    return sites.map(({ block, site }, l) => {
      if (published) return chunks[l] === 0 ? [0] : flatChunks(sizeOf(site), chunks[l]);
      return rowChunks(site.outFeatures, site.inFeatures, chunks[l], headUnit(block, site));
    });
  }

  /** Rows that stay together: a head's, where rows are heads. */
  function headUnit(block: Block, site: LinearSite): number {
    const { headDim } = model.shape;
    return site.input === block.inputs[0] && site.outFeatures % headDim === 0 ? headDim : 1;
  }
}

/** The coefficient of a tensor becomes that of each of its chunks. */
function repeat(from: Coefficients, to: Coefficients, tensor: number, expert: number): void {
  const [value] = from.of(tensor, expert);
  to.set(tensor, expert, new Array<number>(to.tensors[tensor].bounds.length - 1).fill(value));
}

function rulesOf(method: LearnedMethod, values: Values, paper: boolean, gamma: number, experts = 1): StageRules {
  const common = { gamma, hiddenWeight: values.hidden, weightDecay: 0 };
  if (method.objective === 'entropy') {
    const { updates } = values;
    const objective = { kind: 'entropy' } as const;
    // The same way in fewer steps, from which the one nearest to the experts is kept; published: all of them, sixteen samples of each expert.
    return paper
      ? { ...common, objective, batch: 16 * experts, updates, learningRate: 1e-3, schedule: 'constant', selects: false }
      : { ...common, objective, batch: 8, updates, learningRate: 1e-2, schedule: 'cosine', selects: true };
  }
  const divergence = { ...common, batch: 8, objective: { kind: 'divergence', temperature: values.temperature } } as const;
  return paper
    ? { ...divergence, updates: 'epoch', learningRate: 0.5, weightDecay: 1e-5, schedule: 'restarts', clipNorm: 1, selects: false }
    : { ...divergence, updates: values.updates, learningRate: 0.05, schedule: 'cosine', selects: true };
}

/** The pull to the start that generalizes best, or the one asked for. */
async function gammaOf({ gamma }: Values, samples: number, validate: (gamma: number) => Promise<number>): Promise<number> {
  if (gamma >= 0) return gamma;
  // An eighth of what was given is held out.
  if (samples < (VALIDATED_FROM * 7) / 8) return UNVALIDATED_GAMMA;
  let best = { gamma: UNVALIDATED_GAMMA, kl: Number.POSITIVE_INFINITY };
  for (const candidate of GAMMAS) {
    const kl = await validate(candidate);
    if (kl < best.kl) best = { gamma: candidate, kl };
  }
  return best.gamma;
}

function sizeOf({ outFeatures, inFeatures }: LinearSite): number {
  return outFeatures * inFeatures;
}

function meanMagnitude(values: Float32Array): number {
  let sum = 0;
  for (const value of values) sum += Math.abs(value);
  return sum / Math.max(1, values.length);
}
