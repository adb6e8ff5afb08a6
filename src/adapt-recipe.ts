/** What adapter to make and how, as validated plain data. */
import { DEVICES, type DeviceRequest } from './compute/engine.ts';
import { RecipeError } from './errors.ts';
import { parseRankBudget, type RankBudget } from './methods/rank/rank-budget.ts';
import { TRAINING_SCHEDULES } from './methods/rank/training/index.ts';
import { boolean, bytes, dropUndefined, flag, integer, list, number, oneOf, text } from './recipe-fields.ts';
import { parseSize } from './size.ts';

export const ADAPT_PRESETS = ['best', 'paper'] as const;
export const ADAPT_INITS = ['kaiming', 'eva'] as const;
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
  /** What A starts as: random, or the principal directions of what enters the layer. */
  readonly init: (typeof ADAPT_INITS)[number];
  /** qerror: the float model that the base was quantized from. */
  readonly against?: string;
  /** lamda++: more rank where a spectrum is steep. */
  readonly invert: boolean;
  /** Rank of every layer before any is cut; absent: the method's own. */
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

const OWN_FACTORS: readonly string[] = ['gora', 'lamda++', 'qerror'];

export const ADAPT_DEFAULTS = {
  method: 'uniform',
  steps: 0,
  init: 'kaiming',
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

/** Validates a request. Throws RecipeError naming the flag, the rule and the value. */
export function adaptRecipe(request: AdaptRequest, cores: number): AdaptRecipe {
  const known = new Set([...Object.keys(ADAPT_DEFAULTS), 'text', 'budget', 'alpha', 'against', 'startRank', 'lr', 'threads']);
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
    budget: parseRankBudget(text('budget', given['budget']), parseSize),
    method: oneOf('method', given['method'], ADAPT_METHODS),
    preset: oneOf('preset', given['preset'], ADAPT_PRESETS),
    steps: integer('steps', given['steps'], 0, 10_000_000),
    targets: list('targets', given['targets']),
    ...(given['alpha'] === undefined ? {} : { alpha: positive('alpha') }),
    rslora: boolean('rslora', given['rslora']),
    init: oneOf('init', given['init'], ADAPT_INITS),
    ...(given['against'] === undefined ? {} : { against: text('against', given['against']) }),
    invert: boolean('invert', given['invert']),
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
  if (recipe.startRank !== undefined && recipe.method !== 'adalora')
    throw new RecipeError(`--start-rank: ${recipe.method} has the same ranks from start to end`);
  const { method } = recipe;
  if (recipe.init === 'eva' && method === 'adalora')
    throw new RecipeError('--init eva: adalora starts from small random factors');
  if (recipe.init === 'eva' && OWN_FACTORS.includes(method))
    throw new RecipeError(`--init eva: ${method} starts from factors of its own`);
  if (method === 'qerror' && recipe.against === undefined)
    throw new RecipeError('--against: qerror needs the float model that the base was quantized from');
  if (method !== 'qerror' && recipe.against !== undefined)
    throw new RecipeError(`--against: ${method} compares with nothing; qerror does`);
  if (recipe.invert && method !== 'lamda++')
    throw new RecipeError(`--invert: ${method} looks at no spectra of weights; lamda++ does`);
  if (method === 'lamda++' && recipe.steps > 0)
    throw new RecipeError(`--steps ${recipe.steps}: lamda++ shares ranks out and starts factors; it is not trained here`);
  if (recipe.rslora && recipe.alpha === undefined)
    throw new RecipeError('--rslora: goes with --alpha, which it divides by the root of the rank');
  return recipe;
}
