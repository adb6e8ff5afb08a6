/** What to do, as validated plain data. Flags and a YAML/JSON file are two spellings of it. */
import type { ArtifactFormat } from './artifacts/write-artifact.ts';
import { DEVICES, type DeviceRequest } from './compute/engine.ts';
import { RecipeError } from './errors.ts';
import { QUANTIZERS } from './methods/quantize/index.ts';

export type { ArtifactFormat };

export const FORMATS = ['onnx', 'safetensors', 'gptq'] as const satisfies readonly ArtifactFormat[];

export type QuantizerName = keyof typeof QUANTIZERS;

export const GROUP_SIZES = [32, 64, 128, 256] as const;
export const PRESETS = ['paper'] as const;

/** Where a run happens; the part of a request that does not change what is asked for. */
export interface MachineOptions {
  readonly device: DeviceRequest;
  readonly engine: 'ort';
  /** Threads of the engine. */
  readonly threads: number;
}

/** A validated request to quantize. Everything that decides the output's bytes is in here. */
export interface QuantizeRecipe extends MachineOptions {
  readonly method: QuantizerName;
  readonly preset: (typeof PRESETS)[number];
  /** Mean code bits over the quantized weights; absent when a plan says every width. */
  readonly bits?: number;
  readonly groupSize: number;
  readonly formats: readonly ArtifactFormat[];
  /** Globs on module names. */
  readonly skip: readonly string[];
  readonly only: readonly string[];
  /** Width of embeddings and output head; 'float' keeps them as they are. */
  readonly embeddings: 'float' | 4 | 8;
  /** Text files; none: the text that ships with pcomp. */
  readonly calibration: readonly string[];
  readonly samples: number;
  readonly sequenceLength: number;
  readonly seed: number;
  readonly dampening: number;
  readonly actOrder: boolean;
  readonly staticGroups: boolean;
  readonly trueSequential: boolean;
  readonly symmetric: boolean;
  readonly salience: 'code' | 'inverse-diag';
  readonly lambdaSalience: number;
  /** A plan file, or an artifact's pcomp.json. */
  readonly plan?: string;
  /** Bound on pcomp's own buffers for activations, in bytes; what does not fit is spooled to disk. */
  readonly maxMemory: number;
}

/** A request as it comes in: every field optional, values as a flag parser or a YAML file yields them. */
export type QuantizeRequest = { readonly [K in keyof QuantizeRecipe]?: unknown };

export const QUANTIZE_DEFAULTS = {
  method: 'slim-llm',
  preset: 'paper',
  groupSize: 128,
  formats: ['onnx'],
  skip: [],
  only: [],
  embeddings: 'float',
  calibration: [],
  samples: 128,
  sequenceLength: 2048,
  seed: 0,
  dampening: 0.01,
  actOrder: false,
  staticGroups: false,
  trueSequential: false,
  symmetric: false,
  salience: 'code',
  lambdaSalience: 1,
  device: 'cpu',
  engine: 'ort',
  maxMemory: 2 ** 30,
} as const satisfies Partial<QuantizeRecipe>;

/** Validates a request. Throws RecipeError naming the flag, the rule and the value. `threads` defaults to the machine's cores. */
export function quantizeRecipe(request: QuantizeRequest, cores: number): QuantizeRecipe {
  const unknown = Object.keys(request).filter((key) => !KNOWN.has(key));
  if (unknown.length > 0)
    throw new RecipeError(`${flag(unknown[0])}: no such option of quantize; known: ${[...KNOWN].map(flag).join(' ')}`);
  const given: QuantizeRequest = { ...QUANTIZE_DEFAULTS, ...dropUndefined(request) };
  if (given.preset === 'best') {
    throw new RecipeError('--preset best: not in this version yet; use --preset paper, the published SliM-LLM');
  }
  if (given.bits === undefined && given.plan === undefined) throw new RecipeError('--bits: a budget is required, e.g. --bits 2');
  const method = oneOf('method', given.method, Object.keys(QUANTIZERS) as QuantizerName[]);
  const recipe: QuantizeRecipe = {
    method,
    preset: oneOf('preset', given.preset, PRESETS),
    ...(given.bits === undefined ? {} : { bits: integer('bits', given.bits, 1, 8) }),
    groupSize: oneOf('groupSize', number('groupSize', given.groupSize), GROUP_SIZES),
    formats: formats(list('formats', given.formats)),
    skip: list('skip', given.skip),
    only: list('only', given.only),
    embeddings:
      given.embeddings === 'float' ? 'float' : oneOf('embeddings', number('embeddings', given.embeddings), [4, 8] as const),
    calibration: list('calibration', given.calibration),
    samples: integer('samples', given.samples, 1, 1_000_000),
    sequenceLength: integer('sequenceLength', given.sequenceLength, 2, 1_048_576),
    seed: integer('seed', given.seed, 0, 2 ** 32 - 1),
    dampening: range('dampening', given.dampening, 0, 1),
    actOrder: boolean('actOrder', given.actOrder),
    staticGroups: boolean('staticGroups', given.staticGroups),
    trueSequential: boolean('trueSequential', given.trueSequential),
    symmetric: boolean('symmetric', given.symmetric),
    salience: oneOf('salience', given.salience, ['code', 'inverse-diag'] as const),
    lambdaSalience: range('lambdaSalience', given.lambdaSalience, 0, 1e6),
    device: oneOf('device', given.device, DEVICES),
    engine: oneOf('engine', given.engine, ['ort'] as const),
    threads: integer('threads', given.threads ?? cores, 1, 1024),
    maxMemory: integer('maxMemory', given.maxMemory, 2 ** 20, Number.MAX_SAFE_INTEGER),
    ...(given.plan === undefined ? {} : { plan: text('plan', given.plan) }),
  };
  checkTogether(recipe, request);
  return recipe;
}

const KNOWN: ReadonlySet<string> = new Set([...Object.keys(QUANTIZE_DEFAULTS), 'bits', 'threads', 'plan']);

/** An option a method does not read is refused: nothing is parsed and ignored. */
function checkTogether(recipe: QuantizeRecipe, request: QuantizeRequest): void {
  const readers: readonly [keyof QuantizeRecipe, readonly QuantizerName[]][] = [
    ['actOrder', ['gptq']],
    ['staticGroups', ['gptq']],
    ['symmetric', ['rtn', 'gptq']],
    ['salience', ['slim-llm']],
    ['lambdaSalience', ['slim-llm']],
    ['dampening', ['gptq', 'slim-llm']],
    ['trueSequential', ['gptq', 'slim-llm']],
    ['calibration', ['gptq', 'slim-llm']],
    ['samples', ['gptq', 'slim-llm']],
    ['sequenceLength', ['gptq', 'slim-llm']],
  ];
  for (const [key, methods] of readers) {
    const asked = request[key] !== undefined && JSON.stringify(request[key]) !== JSON.stringify(defaultOf(key));
    if (asked && !methods.includes(recipe.method)) {
      throw new RecipeError(`${flag(key)}: --method ${recipe.method} does not use it; it goes with ${methods.join(', ')}`);
    }
  }
  if (recipe.plan !== undefined && recipe.bits !== undefined) {
    throw new RecipeError(`--bits ${recipe.bits}: the plan says every width; give --bits or --plan`);
  }
  if (recipe.plan !== undefined && request.groupSize !== undefined && recipe.embeddings === 'float') {
    throw new RecipeError(`--group-size ${recipe.groupSize}: the plan says the size of every group; give --group-size or --plan`);
  }
  if (recipe.method === 'slim-llm' && recipe.bits !== undefined && (recipe.bits < 2 || recipe.bits > 7)) {
    throw new RecipeError(
      `--bits ${recipe.bits}: slim-llm under preset paper mixes widths N-1, N and N+1, so N is 2..7; for ${recipe.bits} bits use --method gptq`,
    );
  }
  if (recipe.formats.includes('gptq') && recipe.embeddings !== 'float') {
    throw new RecipeError(
      `--embeddings ${recipe.embeddings}: the gptq layout keeps embeddings in float; drop the flag or the format`,
    );
  }
  if (recipe.formats.includes('gptq') && recipe.method === 'slim-llm') {
    throw new RecipeError(
      '--format gptq: the layout has one width per module and slim-llm mixes widths inside a module; use --method gptq, or --format safetensors',
    );
  }
}

function defaultOf(key: keyof QuantizeRecipe): unknown {
  return (QUANTIZE_DEFAULTS as Partial<Record<keyof QuantizeRecipe, unknown>>)[key];
}

function formats(names: readonly string[]): ArtifactFormat[] {
  const result = [...new Set(names.map((name) => oneOf('formats', name, FORMATS)))];
  if (result.length === 0) throw new RecipeError(`--format: at least one of ${FORMATS.join(', ')}`);
  if (result.includes('safetensors') && result.includes('gptq')) {
    throw new RecipeError('--format safetensors,gptq: both write model.safetensors; take one of them (either may go with onnx)');
  }
  return result;
}

/** `groupSize` -> `--group-size`; `formats` is spelled `--format` on the command line. */
function flag(key: string): string {
  if (key === 'formats') return '--format';
  return `--${key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

function dropUndefined(request: QuantizeRequest): QuantizeRequest {
  return Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined));
}

function number(key: string, value: unknown): number {
  const result = typeof value === 'string' && value.trim() !== '' ? Number(value) : value;
  if (typeof result !== 'number' || !Number.isFinite(result))
    throw new RecipeError(`${flag(key)} ${show(value)}: a number is expected`);
  return result;
}

function range(key: string, value: unknown, low: number, high: number): number {
  const result = number(key, value);
  if (result < low || result > high) throw new RecipeError(`${flag(key)} ${result}: must be within ${low}..${high}`);
  return result;
}

export function integer(key: string, value: unknown, low: number, high: number): number {
  const result = number(key, value);
  if (key === 'bits' && (result < low || result > high)) {
    throw new RecipeError(`--bits ${result}: pcomp quantizes to ${low}..${high} bits. To keep a layer as it is, use --skip.`);
  }
  if (!Number.isInteger(result)) {
    const why = key === 'bits' ? ' under preset paper' : '';
    throw new RecipeError(`${flag(key)} ${result}: must be a whole number${why}`);
  }
  return range(key, result, low, high);
}

function boolean(key: string, value: unknown): boolean {
  if (typeof value !== 'boolean') throw new RecipeError(`${flag(key)} ${show(value)}: true or false is expected`);
  return value;
}

function text(key: string, value: unknown): string {
  if (typeof value !== 'string' || value === '') throw new RecipeError(`${flag(key)} ${show(value)}: a text is expected`);
  return value;
}

function list(key: string, value: unknown): string[] {
  const items = typeof value === 'string' ? value.split(',') : value;
  if (!Array.isArray(items)) throw new RecipeError(`${flag(key)} ${show(value)}: a list is expected`);
  return items.map((item) => text(key, item));
}

function oneOf<const T extends string | number>(key: string, value: unknown, allowed: readonly T[]): T {
  const found = allowed.find((item) => item === value);
  if (found === undefined) throw new RecipeError(`${flag(key)} ${show(value)}: must be one of ${allowed.join(', ')}`);
  return found;
}

function show(value: unknown): string {
  return typeof value === 'string' ? value : JSON.stringify(value);
}
