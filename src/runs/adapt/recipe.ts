/** What adapter to make and how, as validated plain data. */
import { DEVICES, type DeviceRequest } from '../../compute/engine.ts';
import { RecipeError } from '../../errors.ts';
import { type ExpertProfile, parseProfile } from '../../methods/rank/experts.ts';
import { ADAPTER_KINDS, parseRankBudget, type RankBudget } from '../../methods/rank/rank-budget.ts';
import { SOLVERS } from '../../methods/rank/solve.ts';
import { SURROGATES } from '../../methods/rank/surrogate/index.ts';
import { TRAINING_SCHEDULES } from '../../methods/rank/training/index.ts';
import { boolean, bytes, dropUndefined, flag, integer, list, number, oneOf, text } from '../recipe-fields.ts';
import { parseSize } from '../size.ts';

export const ADAPT_PRESETS = ['best', 'paper'] as const;
export const ADAPT_INITS = ['kaiming', 'eva', 'pissa', 'olora', 'loftq'] as const;
export const GROWTH_LAWS = ['linear', 'exponential'] as const;
export const ROUTERS = ['topk', 'soft'] as const;
export const ADAPT_METHODS = Object.keys(TRAINING_SCHEDULES) as (keyof typeof TRAINING_SCHEDULES)[];

/** A validated request to adapt. Everything but threads, memory and device decides the output's bytes. */
export interface AdaptRecipe {
  readonly text: readonly string[];
  readonly budget: RankBudget;
  readonly method: keyof typeof TRAINING_SCHEDULES;
  readonly preset: (typeof ADAPT_PRESETS)[number];
  readonly steps: number;
  /** Globs of layers; empty: all linear layers of the blocks. */
  readonly targets: readonly string[];
  /** Scale is alpha over the rank, or over its root with `rslora`; absent: the method's own. */
  readonly alpha?: number;
  readonly rslora: boolean;
  /**
   * What the factors start as. `kaiming`: A random, or what the method finds. `eva`: A the principal directions of what enters the layer. `pissa`, `olora`:
   * the principal components of the weight, or a part of its QR factorization, taken out of it. `loftq`: the principal components of what quantization lost.
   */
  readonly init: (typeof ADAPT_INITS)[number];
  /** Trains the lengths of the weight's rows beside where they point. */
  readonly dora: boolean;
  /** qerror, loftq and surrogates: the float model that the base was quantized from. */
  readonly against?: string;
  /** lamda++: more rank where a spectrum is steep. */
  readonly invert: boolean;
  /** triadaptlora: how the number of layers that grow at once rises over the run. */
  readonly growth?: (typeof GROWTH_LAWS)[number];
  /** mola: experts over the depth, how tokens are routed, experts of a token, rank of every expert; absent: the method's own. */
  readonly profile?: ExpertProfile;
  readonly router?: (typeof ROUTERS)[number];
  readonly topK?: number;
  readonly expertRank?: number;
  /** Bounds on the rank of every layer, where gains or importance share ranks out; `rMax` absent: the method's own. */
  readonly rMin: number;
  readonly rMax?: number;
  /** Ranks are multiples of it; layers that read the same input have one rank; how ranks are found. */
  readonly rankMultiple: number;
  readonly tieInputs: boolean;
  readonly solver: (typeof SOLVERS)[number];
  /** Rank of every layer before any is cut or added; absent: the method's own. */
  readonly startRank?: number;
  /** Absent: the method's own. */
  readonly lr?: number;
  /** Windows of a step. */
  readonly batch: number;
  readonly sequenceLength: number;
  /** Looks at held-out text without a better one after which training ends; 0: never. */
  readonly patience: number;
  /** Store every layer at the largest rank, with zeros. */
  readonly padRanks: boolean;
  readonly seed: number;
  readonly device: DeviceRequest;
  readonly threads: number;
  readonly maxMemory: number;
}

/** A request as it comes in: every field optional, values as a flag parser yields them. */
export type AdaptRequest = { readonly [K in keyof AdaptRecipe]?: unknown };

const OWN_FACTORS: readonly string[] = ['gora', 'lamda', 'lamda++', 'qerror', 'mola', 'snella'];
/** Start from small random factors of ranks that change while they are trained. */
const CHANGING: readonly string[] = ['adalora', 'increlora', 'triadaptlora'];

export const ADAPT_DEFAULTS = {
  method: 'uniform',
  init: 'kaiming',
  dora: false,
  rMin: 0,
  rankMultiple: 1,
  tieInputs: false,
  solver: 'auto',
  preset: 'best',
  targets: [],
  rslora: false,
  invert: false,
  batch: 8,
  sequenceLength: 512,
  patience: 0,
  padRanks: false,
  seed: 0,
  device: 'cpu',
  maxMemory: 2 ** 30,
} as const;

const EXPERT_FIELDS = ['profile', 'router', 'topK', 'expertRank'] as const;

/** Validates a request. Throws RecipeError naming the flag, the rule and the value. */
export function adaptRecipe(request: AdaptRequest, cores: number): AdaptRecipe {
  const known = new Set([
    ...Object.keys(ADAPT_DEFAULTS),
    'text',
    'budget',
    'alpha',
    'against',
    'growth',
    ...EXPERT_FIELDS,
    'rMax',
    'startRank',
    'steps',
    'lr',
    'threads',
  ]);
  const unknown = Object.keys(request).filter((key) => !known.has(key));
  if (unknown.length > 0) throw new RecipeError(`${unknown.map(flag).join(', ')}: pcomp adapt has no such option`);
  const given = { ...ADAPT_DEFAULTS, threads: cores, ...dropUndefined(request) } as Record<string, unknown>;
  if (given['budget'] === undefined)
    throw new RecipeError('--budget: what the adapter may cost is needed, such as r=8 or pct=0.5%');
  if (given['text'] === undefined) throw new RecipeError('--text: files to train on are needed');
  const positive = (key: string) => {
    const value = number(key, given[key]);
    if (!(value > 0)) throw new RecipeError(`${flag(key)} ${value}: must be above 0`);
    return value;
  };
  const recipe: AdaptRecipe = {
    text: list('text', given['text']),
    budget: parseRankBudget(text('budget', given['budget']), parseSize, '--budget', ADAPTER_KINDS),
    method: oneOf('method', given['method'], ADAPT_METHODS),
    preset: oneOf('preset', given['preset'], ADAPT_PRESETS),
    steps: integer('steps', given['steps'] ?? 0, 0, 10_000_000),
    targets: list('targets', given['targets']),
    ...(given['alpha'] === undefined ? {} : { alpha: positive('alpha') }),
    rslora: boolean('rslora', given['rslora']),
    init: oneOf('init', given['init'], ADAPT_INITS),
    dora: boolean('dora', given['dora']),
    ...(given['against'] === undefined ? {} : { against: text('against', given['against']) }),
    invert: boolean('invert', given['invert']),
    ...(given['growth'] === undefined ? {} : { growth: oneOf('growth', given['growth'], GROWTH_LAWS) }),
    ...(given['profile'] === undefined ? {} : { profile: parseProfile(text('profile', given['profile'])) }),
    ...(given['router'] === undefined ? {} : { router: oneOf('router', given['router'], ROUTERS) }),
    ...(given['topK'] === undefined ? {} : { topK: integer('topK', given['topK'], 1, 1024) }),
    ...(given['expertRank'] === undefined ? {} : { expertRank: integer('expertRank', given['expertRank'], 1, 65_536) }),
    rMin: integer('rMin', given['rMin'], 0, 65_536),
    ...(given['rMax'] === undefined ? {} : { rMax: integer('rMax', given['rMax'], 1, 65_536) }),
    rankMultiple: integer('rankMultiple', given['rankMultiple'], 1, 65_536),
    tieInputs: boolean('tieInputs', given['tieInputs']),
    solver: oneOf('solver', given['solver'], SOLVERS),
    ...(given['startRank'] === undefined ? {} : { startRank: integer('startRank', given['startRank'], 1, 65_536) }),
    ...(given['lr'] === undefined ? {} : { lr: positive('lr') }),
    batch: integer('batch', given['batch'], 1, 65_536),
    sequenceLength: integer('sequenceLength', given['sequenceLength'], 2, 1_048_576),
    patience: integer('patience', given['patience'], 0, 1_000_000),
    padRanks: boolean('padRanks', given['padRanks']),
    seed: integer('seed', given['seed'], 0, Number.MAX_SAFE_INTEGER),
    device: oneOf('device', given['device'], DEVICES),
    threads: integer('threads', given['threads'], 1, 1024),
    maxMemory: bytes('maxMemory', given['maxMemory']),
  };
  const surrogate = recipe.method in SURROGATES && recipe.steps === 0;
  if (recipe.startRank !== undefined && !CHANGING.includes(recipe.method))
    throw new RecipeError(`--start-rank: ${recipe.method} has the same ranks from start to end`);
  const { method, init } = recipe;
  const scaled = recipe.rslora ? 'rslora' : recipe.alpha === undefined ? undefined : 'alpha';
  if (surrogate && scaled !== undefined)
    throw new RecipeError(
      `${flag(scaled)}: ${method} with --steps 0 has no scale; the length of its step is found on held-out text`,
    );
  if (surrogate && method === 'adalora' && recipe.preset === 'best' && recipe.startRank !== undefined)
    throw new RecipeError(
      '--start-rank: adalora with --steps 0 cuts once, from all that a layer may get; --preset paper starts from a rank',
    );
  if (init !== 'kaiming' && CHANGING.includes(method))
    throw new RecipeError(`--init ${init}: ${method} starts from small random factors`);
  if (surrogate && given['steps'] === undefined)
    throw new RecipeError(
      `--steps: ${recipe.method} trains; say for how many steps, or 0 for a calibration surrogate that trains nothing`,
    );
  checkRankRules(recipe, given);
  checkExperts(recipe);
  if (recipe.growth !== undefined && method !== 'triadaptlora')
    throw new RecipeError(`--growth: ${method} has no such law; triadaptlora does`);
  if (init !== 'kaiming' && OWN_FACTORS.includes(method))
    throw new RecipeError(`--init ${init}: ${method} starts from factors of its own`);
  if ((init === 'pissa' || init === 'olora') && recipe.steps === 0)
    throw new RecipeError(`--init ${init}: takes its start from the weights, so that nothing is left without --steps`);
  if (recipe.dora && method !== 'uniform' && method !== 'eva')
    throw new RecipeError(`--dora: goes with uniform and eva, and ${method} was asked for`);
  if (recipe.dora && (init === 'pissa' || init === 'olora' || init === 'loftq'))
    throw new RecipeError(`--dora: goes with --init kaiming and eva, and ${init} was asked for`);
  const asks = method === 'qerror' ? 'qerror' : init === 'loftq' ? '--init loftq' : undefined;
  if (asks !== undefined && recipe.against === undefined)
    throw new RecipeError(`--against: ${asks} needs the float model that the base was quantized from`);
  if (asks === undefined && !surrogate && recipe.against !== undefined)
    throw new RecipeError(
      `--against: ${method} compares with nothing; qerror, --init loftq and methods that train do, the last with --steps 0`,
    );
  if (recipe.invert && method !== 'lamda++')
    throw new RecipeError(`--invert: ${method} looks at no spectra of weights; lamda++ does`);
  if (recipe.rslora && recipe.alpha === undefined)
    throw new RecipeError('--rslora: goes with --alpha, which it divides by the root of the rank');
  return recipe;
}

/** What goes with experts and sparse updates, and what does not. */
function checkExperts(recipe: AdaptRecipe): void {
  const { method, budget, router, topK, padRanks, alpha } = recipe;
  const used = EXPERT_FIELDS.find((key) => recipe[key] !== undefined);
  if (used !== undefined && method !== 'mola') throw new RecipeError(`${flag(used)}: ${method} has no experts; mola does`);
  if (router === 'soft' && topK !== undefined)
    throw new RecipeError('--top-k: with --router soft a token goes through all experts');
  if (budget.kind === 'experts' && method !== 'mola')
    throw new RecipeError(`--budget experts=: ${method} has no experts; mola does`);
  if (budget.kind === 'density' && method !== 'snella')
    throw new RecipeError(`--budget density=: ${method} changes all weights of a layer; snella does not`);
  if (method !== 'mola' && method !== 'snella') return;
  if (padRanks) throw new RecipeError(`--pad-ranks: goes with plain factors, and ${method} was asked for`);
  if (method === 'mola') return;
  if (budget.kind === 'r') throw new RecipeError('--budget r=: snella has no ranks; give density=0.01, params= or pct=');
  if (alpha !== undefined) throw new RecipeError('--alpha: snella has no scale');
}

/** Which methods the rules on ranks mean something to. */
function checkRankRules(
  { method, preset, steps, rMin, rMax, rankMultiple }: AdaptRecipe,
  given: Readonly<Record<string, unknown>>,
): void {
  const solves = preset === 'best' && (method === 'eva' || method === 'qerror');
  const bounds = solves || (preset === 'best' && method === 'gora');
  const asked = (key: keyof typeof ADAPT_DEFAULTS) => given[key] !== ADAPT_DEFAULTS[key];
  const used = [
    ...(!bounds && rMin > 0 ? ['rMin'] : []),
    ...(!bounds && !(steps === 0 && method in SURROGATES) && rMax !== undefined ? ['rMax'] : []),
    ...(!solves && asked('rankMultiple') ? ['rankMultiple'] : []),
    ...(!solves && asked('tieInputs') ? ['tieInputs'] : []),
    ...(!solves && asked('solver') ? ['solver'] : []),
  ][0];
  if (used !== undefined)
    throw new RecipeError(
      `${flag(used)}: ${method}, preset ${preset}, shares no ranks out by it; eva and qerror do${used === 'rMin' || used === 'rMax' ? ', and gora' : ''}`,
    );
  if (rMax !== undefined && rMax < Math.max(rMin, rankMultiple))
    throw new RecipeError(`--r-max ${rMax}: is below ${rMax < rMin ? `--r-min ${rMin}` : `--rank-multiple ${rankMultiple}`}`);
}
