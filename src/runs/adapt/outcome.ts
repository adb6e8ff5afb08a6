/** What came of an adaptation, or would come of it: for people, for report.json, and what may be said of it. */
import type { Device } from '../../compute/engine.ts';
import type { SpendableBudget } from '../../methods/rank/rank-budget.ts';
import { SURROGATES } from '../../methods/rank/surrogate/index.ts';
import type { TrainedModule, TrainingSchedule } from '../../methods/rank/training/schedule.ts';
import type { AdaptRecipe } from './recipe.ts';
import type { FoundStart } from './start.ts';

/** What came of a run, or would come of it. */
export interface AdaptOutcome {
  readonly method: string;
  /** What may be said of results: of the published method, of one with changes, of what is known of one, of pcomp's own, of what stands in for a training. */
  readonly label: 'published' | 'published+changes' | 'reconstructed' | 'own' | 'surrogate';
  readonly modules: readonly AdaptedLayer[];
  readonly parameters: number;
  readonly budget: { readonly requested: string; readonly unit: string; readonly total: number; readonly spent: number };
  /** Where gains share ranks out: by which solver, what they are worth, and what no ranks can exceed. */
  readonly solved?: FoundStart['solved'];
  readonly windows: { readonly training: number; readonly heldOut: number; readonly tokens: number };
  readonly learningRate: number;
  readonly notes: readonly string[];
  readonly run?: {
    readonly output: string;
    /** Held-out nats per token. */
    readonly heldOut: { readonly before: number; readonly after: number; readonly best: number; readonly bestStep: number };
    readonly losses: readonly number[];
    readonly looks: readonly { readonly step: number; readonly nll: number }[];
    readonly skippedSteps: number;
    readonly seconds: number;
    readonly peakBytes: number;
    readonly device: Device;
  };
}

/** What a layer got. */
export interface AdaptedLayer {
  readonly name: string;
  /** Of all its experts together; 0 for a sparse update, which has none. */
  readonly rank: number;
  readonly scale: number;
  readonly experts?: number;
  /** Non-zeros over weights, of a sparse update. */
  readonly density?: number;
}

/** A run that is ready for its first step, and what it is after its last. */
export interface PreparedRun {
  readonly recipe: AdaptRecipe;
  readonly modules: readonly TrainedModule[];
  readonly budget: SpendableBudget;
  readonly schedule: TrainingSchedule;
  readonly start: FoundStart | undefined;
  readonly windows: AdaptOutcome['windows'];
  readonly learningRate: number;
}

/** What a layer costs of the budget at a rank, and the numbers that are stored of it. */
export function sizeOf(
  { schedule, budget }: Pick<PreparedRun, 'schedule' | 'budget'>,
  module: TrainedModule,
  rank: number,
): { readonly spent: number; readonly parameters: number } {
  const { outFeatures, inFeatures } = module;
  return schedule.size?.(module) ?? { spent: rank * budget.cost(module), parameters: rank * (outFeatures + inFeatures) };
}

/** Ranks as they are now. */
export function outcomeOf(run: PreparedRun, notes: readonly string[]): Omit<AdaptOutcome, 'run'> {
  const { recipe, modules, budget, schedule, start, windows, learningRate } = run;
  const ranks = schedule.ranks(modules);
  const sizes = modules.map((module) => sizeOf(run, module, ranks.get(module.name)!));
  return {
    method: `${start?.surrogate ? 'calibration surrogate of ' : ''}${recipe.method}, preset ${recipe.preset}`,
    label: labelOf(recipe),
    modules: modules.map(({ name, scale, routed, kernel, outFeatures, inFeatures }, i) => ({
      name,
      rank: ranks.get(name)!,
      scale,
      ...(routed ? { experts: routed.experts } : {}),
      ...(kernel ? { density: sizes[i].parameters / (outFeatures * inFeatures) } : {}),
    })),
    parameters: sizes.reduce((sum, { parameters }) => sum + parameters, 0),
    budget: {
      requested: `${recipe.budget.kind}=${recipe.budget.amount}`,
      total: budget.total,
      unit: schedule.form === 'kernel' ? 'non-zeros' : budget.unit,
      spent: Math.round(sizes.reduce((sum, one) => sum + one.spent, 0)),
    },
    ...(start?.solved ? { solved: start.solved } : {}),
    windows,
    learningRate,
    notes,
  };
}

/** Methods that preset best does not follow to the letter; mola is without dropout in both presets. */
const CHANGED_BY_BEST: readonly string[] = ['adalora', 'gora', 'increlora', 'triadaptlora', 'snella'];

function labelOf({ method, preset, steps }: AdaptRecipe): AdaptOutcome['label'] {
  if (steps === 0 && method in SURROGATES) return 'surrogate';
  if (method === 'qerror') return 'own';
  if (method === 'lamda++' || method === 'lamda') return 'reconstructed';
  if (method === 'mola') return 'published+changes';
  return preset === 'best' && CHANGED_BY_BEST.includes(method) ? 'published+changes' : 'published';
}
