/** What to do, as validated plain data. Flags and a YAML/JSON file are two spellings of it. */
import { ONNX_CONTAINERS, type OnnxContainer, type OnnxStorageOptions } from '../../artifacts/onnx/linear-layout.ts';
import type { ArtifactFormat } from '../../artifacts/write-artifact.ts';
import { DEVICES, type DeviceRequest } from '../../compute/engine.ts';
import { ENGINES, type EngineName } from '../../compute/engines.ts';
import { RecipeError } from '../../errors.ts';
import { BEST_STEPS, type BestStep } from '../../methods/quantize/best/steps.ts';
import { QUANTIZERS } from '../../methods/quantize/index.ts';
import { FACTOR_BITS, type FactorBits } from '../../methods/quantize/low-rank.ts';
import { TRANSFORMS, type TransformKind } from '../../methods/quantize/quantizer.ts';
import { COMPENSATION_VARIANTS, type CompensationVariant } from '../../methods/rank/compensation.ts';
import { parseRankBudget } from '../../methods/rank/rank-budget.ts';
import { boolean, bytes, dropUndefined, flag, integer, list, number, oneOf, part, range, text } from '../recipe-fields.ts';
import { parseSize } from '../size.ts';
import { checkRecipe } from './recipe-rules.ts';

export type { ArtifactFormat };

export const FORMATS = ['onnx', 'safetensors', 'gptq'] as const satisfies readonly ArtifactFormat[];

export type QuantizerName = keyof typeof QUANTIZERS;

export const GROUP_SIZES = [32, 64, 128, 256] as const;
/** The size of groups where one is needed before any is chosen. */
const NOMINAL_GROUP_SIZE = 128;
/** Blocks of 256 are slow in onnxruntime. */
const LARGEST_BLOCK = 128;
export const PRESETS = ['best', 'paper'] as const;
export const SENSITIVITIES = ['probe', 'relative', 'none'] as const;

/** Where a run happens; the part of a request that does not change what is asked for. */
export interface MachineOptions {
  readonly device: DeviceRequest;
  readonly engine: EngineName;
  /** Threads of the engine. */
  readonly threads: number;
}

/** A validated request to quantize. Everything that decides the output's bytes is in here. */
export interface QuantizeRecipe extends MachineOptions {
  readonly method: QuantizerName;
  readonly preset: (typeof PRESETS)[number];
  /** The budget: exactly one of the next five, or a plan that says every width. Mean code bits over the quantized weights. */
  readonly bits?: number;
  /** All stored bits of the quantized modules over their weights. */
  readonly bpw?: number;
  /** Bytes of all weight files. */
  readonly size?: number;
  /** Bytes of the operands as the runtime holds them. */
  readonly runtimeMemory?: number;
  /** Rise of the perplexity on held-out calibration text that is tolerated, as a part of it. */
  readonly maxLoss?: number;
  /** Columns that share a scale; `auto`: chosen for each input, within the budget. */
  readonly groupSize: number | 'auto';
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
  /** best: what may be done to inputs; `auto` takes what predicts the least loss for each. */
  readonly transform: TransformKind | 'auto';
  /** best: steps to leave out. */
  readonly without: readonly BestStep[];
  /** best: part of the drift correction to take, 0..1; absent: the best on held-out tokens. */
  readonly alpha?: number;
  /** best: how a layer's loss is weighed against another's: by what it does to the logits, by its own output's energy, or not. */
  readonly sensitivity: (typeof SENSITIVITIES)[number];
  /** Learned methods: steps a block; absent: the method's own number. */
  readonly steps?: number;
  /** What may be spent on low-rank branches beside the codes, such as `bpw=0.1`; absent: there are none. */
  readonly lowrank?: string;
  /** Ranks and widths compete for one budget, the sum of both. */
  readonly joint: boolean;
  /** Times that codes and branch are made, each for what the other leaves. */
  readonly lowrankOuter: number;
  /** What branches take inputs for: `exact` for what they are. */
  readonly lowrankInputs: CompensationVariant;
  /** Bits of a branch's factors in the file. */
  readonly lowrankBits: FactorBits;
  /** ONNX: codes at their true width in the file, expanded when it is loaded. */
  readonly compact: boolean;
  /** ONNX: which operands the runtime is to hold. */
  readonly onnxContainer: OnnxContainer;
  /** A plan file, or an artifact's pcomp.json. */
  readonly plan?: string;
  /** Bound on pcomp's own buffers for activations, in bytes; what does not fit is spooled to disk. */
  readonly maxMemory: number;
}

/** A request as it comes in: every field optional, values as a flag parser or a YAML file yields them. */
export type QuantizeRequest = { readonly [K in keyof QuantizeRecipe]?: unknown };

export const QUANTIZE_DEFAULTS = {
  method: 'slim-llm',
  preset: 'best',
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
  transform: 'auto',
  without: [],
  sensitivity: 'probe',
  joint: false,
  lowrankOuter: 2,
  lowrankInputs: 'exact',
  lowrankBits: 16,
  compact: true,
  onnxContainer: 'auto',
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
  const method = oneOf('method', given.method, Object.keys(QUANTIZERS) as QuantizerName[]);
  const recipe: QuantizeRecipe = {
    method,
    preset: oneOf('preset', given.preset, PRESETS),
    ...(given.bits === undefined ? {} : { bits: range('bits', given.bits, 1, 8) }),
    ...(given.bpw === undefined ? {} : { bpw: range('bpw', given.bpw, 1, 16) }),
    ...(given.size === undefined ? {} : { size: bytes('size', given.size) }),
    ...(given.runtimeMemory === undefined ? {} : { runtimeMemory: bytes('runtimeMemory', given.runtimeMemory) }),
    ...(given.maxLoss === undefined ? {} : { maxLoss: part('maxLoss', given.maxLoss) }),
    groupSize: given.groupSize === 'auto' ? 'auto' : oneOf('groupSize', number('groupSize', given.groupSize), GROUP_SIZES),
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
    transform: oneOf('transform', given.transform, ['auto', ...TRANSFORMS] as const),
    without: list('without', given.without).map((step) => oneOf('without', step, BEST_STEPS)),
    ...(given.alpha === undefined ? {} : { alpha: range('alpha', given.alpha, 0, 1) }),
    ...(given.steps === undefined ? {} : { steps: integer('steps', given.steps, 1, 1_000_000) }),
    sensitivity: oneOf('sensitivity', given.sensitivity, SENSITIVITIES),
    ...(given.lowrank === undefined ? {} : { lowrank: rankBudget(text('lowrank', given.lowrank)) }),
    joint: boolean('joint', given.joint),
    lowrankOuter: integer('lowrankOuter', given.lowrankOuter, 1, 4),
    lowrankInputs: oneOf('lowrankInputs', given.lowrankInputs, COMPENSATION_VARIANTS),
    lowrankBits: factorBits(given.lowrankBits),
    compact: boolean('compact', given.compact),
    onnxContainer: oneOf('onnxContainer', String(given.onnxContainer), ONNX_CONTAINERS),
    device: oneOf('device', given.device, DEVICES),
    engine: oneOf('engine', given.engine, Object.keys(ENGINES) as EngineName[]),
    threads: integer('threads', given.threads ?? cores, 1, 1024),
    maxMemory: integer('maxMemory', given.maxMemory, 2 ** 20, Number.MAX_SAFE_INTEGER),
    ...(given.plan === undefined ? {} : { plan: text('plan', given.plan) }),
  };
  checkRecipe(recipe, request, QUANTIZE_DEFAULTS);
  return recipe;
}

/** How ONNX files are to store codes. Where operands are what is counted or stored, the default is the smallest. */
export function onnxStorageOf({ compact, onnxContainer, runtimeMemory }: QuantizeRecipe): Required<OnnxStorageOptions> {
  const counted = !compact || runtimeMemory !== undefined;
  return { compact, container: onnxContainer === 'auto' && counted ? '2' : onnxContainer };
}

/** Sizes that groups may have, descending. */
export function groupSizesOf({ groupSize, formats }: Pick<QuantizeRecipe, 'groupSize' | 'formats'>): readonly number[] {
  if (groupSize !== 'auto') return [groupSize];
  return GROUP_SIZES.filter((size) => size <= LARGEST_BLOCK || !formats.includes('onnx')).reverse();
}

/** The one size of groups, or the one that stands for all as long as none is chosen. */
export function nominalGroupSize({ groupSize }: Pick<QuantizeRecipe, 'groupSize'>): number {
  return groupSize === 'auto' ? NOMINAL_GROUP_SIZE : groupSize;
}

const KNOWN: ReadonlySet<string> = new Set([
  ...Object.keys(QUANTIZE_DEFAULTS),
  ...['bits', 'bpw', 'size', 'runtimeMemory', 'maxLoss', 'alpha', 'steps', 'lowrank', 'threads', 'plan'],
]);

/** Checked here, and kept as it was written. */
function rankBudget(written: string): string {
  parseRankBudget(written, parseSize, '--lowrank');
  return written;
}

function formats(names: readonly string[]): ArtifactFormat[] {
  const result = [...new Set(names.map((name) => oneOf('formats', name, FORMATS)))];
  if (result.length === 0) throw new RecipeError(`--format: at least one of ${FORMATS.join(', ')}`);
  if (result.includes('safetensors') && result.includes('gptq')) {
    throw new RecipeError('--format safetensors,gptq: both write model.safetensors; take one of them (either may go with onnx)');
  }
  return result;
}

function factorBits(given: unknown): FactorBits {
  const bits = integer('lowrankBits', given, 1, 32);
  const known = FACTOR_BITS.find((width) => width === bits);
  if (known === undefined) throw new RecipeError(`--lowrank-bits ${bits}: branches are stored in ${FACTOR_BITS.join(', ')} bits`);
  return known;
}
