/** What to merge and how, as validated plain data. */
import { RecipeError } from '../../errors.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import { methodsWithLambda } from '../../methods/merge/lambda-search.ts';
import { LEARNED, learnedOf } from '../../methods/merge/learned.ts';
import { MOE } from '../../methods/merge/moe/layouts.ts';
import { GATES, type Gate } from '../../methods/merge/moe/router.ts';
import { boolean, bytes, dropUndefined, flag, integer, list, oneOf, text } from '../recipe-fields.ts';
import { asksForLambda } from './lambda-setting.ts';
import type { MergekitConfig } from './mergekit/config.ts';

export const MERGE_PRESETS = ['best', 'paper'] as const;
export const MERGE_DTYPES = ['f32', 'f16', 'bf16'] as const;
export const ON_MISSING = ['error', 'base'] as const;
export const ON_EXTRA = ['error', 'ignore', 'copy'] as const;

/** The method when none is named: with a base, and without. */
const DEFAULT_METHODS = { calibration: 'expert-merging++', base: 'tsv-m', alone: 'linear' } as const;

/** A validated request to merge. Everything but threads and memory decides the output's bytes. */
export interface MergeRecipe {
  /** The model that the experts were trained from. */
  readonly base?: string;
  readonly method: string;
  /** Texts to learn on, to measure, or to find lambda by: `label=FILE`, or a file for every expert. */
  readonly calibration: readonly string[];
  /** Let experts write the responses that prompts lack; otherwise the prompts themselves are what is compared. */
  readonly generate: boolean;
  /** A plan to follow instead of learning one: a plan file, or the pcomp.json of a merge. */
  readonly plan?: string;
  /** A mergekit configuration: names the models, the method and its parameters. */
  readonly mergekit?: MergekitConfig;
  /** Whether `method` is the default. */
  readonly chosen: 'default' | 'named';
  readonly preset: (typeof MERGE_PRESETS)[number];
  /** `0.5,0.3` in label order, or `label=0.5`. */
  readonly weights: readonly string[];
  /** `[glob:][label.]name=value`; the last that matches wins. */
  readonly set: readonly string[];
  /** Element type of every merged tensor; absent: each base tensor's own. */
  readonly dtype?: (typeof MERGE_DTYPES)[number];
  /** Bound on pcomp's buffers, in bytes. */
  readonly maxMemory: number;
  /** Bytes of tensors in one file. */
  readonly shardSize: number;
  readonly seed: number;
  readonly onMissing: (typeof ON_MISSING)[number];
  readonly onExtra: (typeof ON_EXTRA)[number];
  /** Whose tokens the result has: `base` (all models must have the same), `union`, or a model by its label or, in a mergekit file, its path. */
  readonly tokenizer: string;
  /** Rows of the embedding are a multiple of it. */
  readonly padVocab: number;
  /** Store the output head apart where the base ties it to the embedding. */
  readonly untie: boolean;
  /** moe: prompts for each expert, `label=FILE`, and such that are not for it. */
  readonly prompts: readonly string[];
  readonly negative: readonly string[];
  /** moe: what routers are made of. */
  readonly gate: Gate;
  /** moe: experts of a token. */
  readonly topK: number;
  /** Let NaN and infinities through. */
  readonly allowNonfinite: boolean;
  readonly compat?: 'mergekit';
  readonly threads: number;
  /** Write a model card. */
  readonly card: boolean;
}

/** A request as it comes in: every field optional, values as a flag parser yields them. */
export type MergeRequest = { readonly [K in Exclude<keyof MergeRecipe, 'chosen'>]?: unknown };

export const MERGE_DEFAULTS = {
  preset: 'best',
  calibration: [],
  generate: true,
  weights: [],
  set: [],
  maxMemory: 2 * 2 ** 30,
  shardSize: 5e9,
  seed: 0,
  onMissing: 'error',
  onExtra: 'error',
  tokenizer: 'base',
  padVocab: 1,
  untie: false,
  prompts: [],
  negative: [],
  gate: 'hidden',
  topK: 2,
  allowNonfinite: false,
  card: true,
} as const satisfies Partial<MergeRecipe>;

/** The least that buffers can be bounded to. */
const LEAST_MEMORY = 64 * 2 ** 20;

const KNOWN: ReadonlySet<string> = new Set([
  ...Object.keys(MERGE_DEFAULTS),
  'base',
  'method',
  'plan',
  'mergekit',
  'dtype',
  'compat',
  'threads',
]);

/** Validates a request. Throws RecipeError naming the flag, the rule and the value. `threads` defaults to the machine's cores. */
export function mergeRecipe(request: MergeRequest, cores: number): MergeRecipe {
  const unknown = Object.keys(request).filter((key) => !KNOWN.has(key));
  if (unknown.length > 0) throw new RecipeError(`${unknown.map(flag).join(', ')}: pcomp merge has no such option`);
  const given = fromMergekit(dropUndefined(request));
  const all = { ...MERGE_DEFAULTS, threads: cores, ...given } as Record<string, unknown>;
  const base = all['base'] === undefined ? undefined : text('base', all['base']);
  const calibration = list('calibration', all['calibration']);
  const plan = all['plan'] === undefined ? undefined : text('plan', all['plan']);
  const named = all['method'] === undefined ? undefined : methodName(text('method', all['method']));
  const learns = calibration.length > 0 || plan !== undefined;
  const recipe: MergeRecipe = {
    ...(base === undefined ? {} : { base }),
    method: named ?? DEFAULT_METHODS[learns ? 'calibration' : base === undefined ? 'alone' : 'base'],
    calibration,
    generate: boolean('generate', all['generate']),
    ...(plan === undefined ? {} : { plan }),
    ...(given.mergekit === undefined ? {} : { mergekit: given.mergekit as MergekitConfig }),
    chosen: named === undefined ? 'default' : 'named',
    preset: oneOf('preset', all['preset'], MERGE_PRESETS),
    weights: list('weights', all['weights']),
    set: list('set', all['set']),
    ...(all['dtype'] === undefined ? {} : { dtype: oneOf('dtype', all['dtype'], MERGE_DTYPES) }),
    maxMemory: bytes('maxMemory', all['maxMemory']),
    shardSize: bytes('shardSize', all['shardSize']),
    seed: integer('seed', all['seed'], 0, Number.MAX_SAFE_INTEGER),
    onMissing: oneOf('onMissing', all['onMissing'], ON_MISSING),
    onExtra: oneOf('onExtra', all['onExtra'], ON_EXTRA),
    tokenizer: text('tokenizer', all['tokenizer']),
    padVocab: integer('padVocab', all['padVocab'], 1, 65_536),
    untie: boolean('untie', all['untie']),
    prompts: list('prompts', all['prompts']),
    negative: list('negative', all['negative']),
    gate: oneOf('gate', all['gate'], GATES),
    topK: integer('topK', all['topK'], 1, 65_536),
    allowNonfinite: boolean('allowNonfinite', all['allowNonfinite']),
    ...(all['compat'] === undefined ? {} : { compat: oneOf('compat', all['compat'], ['mergekit']) }),
    threads: integer('threads', all['threads'], 1, 1024),
    card: boolean('card', all['card']),
  };
  if (recipe.maxMemory < LEAST_MEMORY) {
    throw new RecipeError(`--max-memory ${recipe.maxMemory}: at least ${LEAST_MEMORY} bytes (64 MiB) are needed`);
  }
  if (recipe.method === MOE) checkSparse(recipe);
  else checkMethod(recipe);
  const own = (['prompts', 'negative', 'gate', 'topK'] as const).find((key) => given[key] !== undefined);
  const answers = recipe.method !== MOE && (learnedOf(recipe.method) !== undefined || asksForLambda(recipe));
  if (!recipe.generate && (!answers || plan !== undefined))
    throw new RecipeError('--no-generate: goes with methods that learn on --calibration; no responses are written otherwise');
  if (recipe.method !== MOE && own)
    throw new RecipeError(`${flag(own)}: --method ${recipe.method} makes no routers; ${MOE} does`);
  return recipe;
}

/** The configuration says what these flags say, so they do not go together. */
function fromMergekit(request: MergeRequest): MergeRequest {
  if (request.mergekit === undefined) return request;
  const {
    method,
    base,
    dtype,
    vocabulary: { tokenizer, padVocab },
  } = request.mergekit as MergekitConfig;
  for (const key of ['method', 'base', 'dtype', 'tokenizer', 'padVocab', 'weights', 'set', 'calibration', 'plan'] as const) {
    if (request[key] !== undefined) throw new RecipeError(`${flag(key)}: has no place beside --config; write it into the file`);
  }
  return dropUndefined({ ...request, method, base, dtype, tokenizer, padVocab });
}

function methodName(written: string): string {
  if (written === MOE) return MOE;
  return (learnedOf(written) ?? mergerOf(written)).name;
}

/** A sparse model copies tensors: nothing of what weighs or changes them has a use. */
function checkSparse({
  base,
  calibration,
  plan,
  weights,
  set,
  dtype,
  compat,
  gate,
  prompts,
  negative,
  mergekit,
}: MergeRecipe): void {
  if (base === undefined) throw new RecipeError(`--base: ${MOE} needs the model whose attention and embeddings the result has`);
  const [used] = [
    ...(calibration.length > 0 ? ['--calibration'] : []),
    ...(plan === undefined ? [] : ['--plan']),
    ...(weights.length > 0 ? ['--weights'] : []),
    ...(set.length > 0 ? ['--set'] : []),
    ...(dtype === undefined ? [] : ['--dtype']),
    ...(compat === undefined ? [] : ['--compat']),
    ...(mergekit === undefined ? [] : ['--config']),
  ];
  if (used) throw new RecipeError(`${used}: --method ${MOE} copies tensors as they are`);
  if (gate === 'random' && prompts.length + negative.length > 0)
    throw new RecipeError('--gate random: reads no prompts; leave --prompts and --negative out');
  if (gate !== 'random' && prompts.length === 0)
    throw new RecipeError(`--prompts: ${MOE} makes routers from prompts; give label=FILE for each expert, or --gate random`);
}

/** What a method needs, and what it has no use for. */
function checkMethod({ method, base, calibration, plan, weights, set, compat }: MergeRecipe): void {
  const learned = learnedOf(method);
  if (base === undefined && (learned || mergerOf(method).base === 'required')) {
    throw new RecipeError(`--base: ${method} needs the model that the experts were trained from`);
  }
  const auto = asksForLambda({ method, set });
  if (!learned && mergerOf(method).statistics) {
    if (plan !== undefined)
      throw new RecipeError(`--plan: --method ${method} learns nothing; ${Object.keys(LEARNED).join(', ')} do`);
    if (calibration.length > 0) return;
    throw new RecipeError(`--calibration: ${method} measures every expert on text of its own; give label=FILE for each`);
  }
  if (!learned) {
    if (auto && calibration.length === 0)
      throw new RecipeError('--set lambda=auto: is found on text of every expert; give --calibration label=FILE for each');
    const unused = calibration.length > 0 && !auto;
    const [flag] = [...(unused ? ['--calibration'] : []), ...(plan === undefined ? [] : ['--plan'])];
    if (flag === undefined) return;
    const finds = unused && methodsWithLambda().includes(method) ? '; --set lambda=auto finds its lambda on text' : '';
    throw new RecipeError(`${flag}: --method ${method} learns nothing; ${Object.keys(LEARNED).join(', ')} do${finds}`);
  }
  if (calibration.length === 0 && plan === undefined) {
    throw new RecipeError(`--calibration: ${method} learns on text of every expert; give label=FILE for each`);
  }
  if (weights.length > 0) throw new RecipeError(`--weights: ${method} learns them`);
  if (compat !== undefined) throw new RecipeError(`--compat ${compat}: has no ${method}`);
  const narrow = set.find((setting) => /^[^=]*[:.]/.test(setting));
  if (narrow !== undefined)
    throw new RecipeError(`--set ${narrow}: ${method} takes its parameters for all tensors and experts at once`);
}
