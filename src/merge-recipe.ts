/** What to merge and how, as validated plain data. */
import { RecipeError } from './errors.ts';
import { mergerOf } from './methods/merge/index.ts';
import { boolean, bytes, dropUndefined, flag, integer, list, oneOf, text } from './recipe-fields.ts';

export const MERGE_PRESETS = ['best', 'paper'] as const;
export const MERGE_DTYPES = ['f32', 'f16', 'bf16'] as const;
export const ON_MISSING = ['error', 'base'] as const;
export const ON_EXTRA = ['error', 'ignore', 'copy'] as const;

/** The method when none is named: with a base, and without. */
const DEFAULT_METHODS = { base: 'task-arithmetic', alone: 'linear' } as const;

/** A validated request to merge. Everything but threads and memory decides the output's bytes. */
export interface MergeRecipe {
  /** The model that the experts were trained from. */
  readonly base?: string;
  readonly method: string;
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
  /** Store the output head apart where the base ties it to the embedding. */
  readonly untie: boolean;
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
  weights: [],
  set: [],
  maxMemory: 2 * 2 ** 30,
  shardSize: 5e9,
  seed: 0,
  onMissing: 'error',
  onExtra: 'error',
  untie: false,
  allowNonfinite: false,
  card: true,
} as const satisfies Partial<MergeRecipe>;

/** The least that buffers can be bounded to. */
const LEAST_MEMORY = 64 * 2 ** 20;

const KNOWN: ReadonlySet<string> = new Set([...Object.keys(MERGE_DEFAULTS), 'base', 'method', 'dtype', 'compat', 'threads']);

/** Validates a request. Throws RecipeError naming the flag, the rule and the value. `threads` defaults to the machine's cores. */
export function mergeRecipe(request: MergeRequest, cores: number): MergeRecipe {
  const unknown = Object.keys(request).filter((key) => !KNOWN.has(key));
  if (unknown.length > 0) throw new RecipeError(`${unknown.map(flag).join(', ')}: pcomp merge has no such option`);
  const given = dropUndefined(request);
  const all = { ...MERGE_DEFAULTS, threads: cores, ...given } as Record<string, unknown>;
  const base = all['base'] === undefined ? undefined : text('base', all['base']);
  const named = all['method'] === undefined ? undefined : mergerOf(text('method', all['method'])).name;
  const recipe: MergeRecipe = {
    ...(base === undefined ? {} : { base }),
    method: named ?? DEFAULT_METHODS[base === undefined ? 'alone' : 'base'],
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
    untie: boolean('untie', all['untie']),
    allowNonfinite: boolean('allowNonfinite', all['allowNonfinite']),
    ...(all['compat'] === undefined ? {} : { compat: oneOf('compat', all['compat'], ['mergekit']) }),
    threads: integer('threads', all['threads'], 1, 1024),
    card: boolean('card', all['card']),
  };
  if (recipe.maxMemory < LEAST_MEMORY) {
    throw new RecipeError(`--max-memory ${recipe.maxMemory}: at least ${LEAST_MEMORY} bytes (64 MiB) are needed`);
  }
  const merger = mergerOf(recipe.method);
  if (merger.base === 'required' && base === undefined) {
    throw new RecipeError(`--base: ${merger.name} needs the model that the experts were trained from`);
  }
  return recipe;
}
