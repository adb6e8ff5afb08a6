/** A PEFT adapter read as task vectors: which base tensor each of its tensors changes, and by which formula. */
import { quote } from '../../../formats/safetensors/header.ts';
import type { TensorInfo } from '../../../formats/tensor.ts';
import { FormatError, RecipeError, UnsupportedError } from '../../errors.ts';
import { ConfigReader } from '../../model/config.ts';
import type { TensorOrigin } from './tensor-origin.ts';

interface AdapterInput {
  /** The adapter's folder, for messages. */
  readonly path: string;
  /** adapter_config.json. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly configPath: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
}

/** What the tensors of one module are, by their role in it. */
type Parts = Map<string, TensorInfo>;

/** Ends of PEFT's tensor names -> role. An adapter's name ("default") may stand inside or at the end. */
const PARTS: readonly (readonly [RegExp, string])[] = [
  [/\.(lora_[ABE])(?:\.[^.]+)?\.weight$/, '$1'],
  [/\.lora_B(?:\.[^.]+)?\.bias$/, 'lora_bias'],
  [/\.lora_embedding_([AB])(?:\.[^.]+)?$/, 'lora_$1'],
  // What pcomp makes of a sparse update.
  [/\.delta_weight$/, 'delta'],
  [/\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$/, 'magnitude'],
  // AdaLoRA keeps its factors as bare parameters.
  [/\.(lora_[ABE])(?:\.[^.]+)?$/, '$1'],
  [/\.ranknum(?:\.[^.]+)?$/, 'ranknum'],
  [/(?:\.base_layer)?(?:\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)$/, '$1'],
];
/** Ways of initialising that change the base itself: the adapter then belongs to another base. */
const CHANGES_BASE = /^(pissa|olora|corda|loftq)/i;
const PREFIXES = ['', 'model.', 'transformer.', 'language_model.'];

/**
 * The origins of the base tensors that an adapter changes, by base name; without a base, by the adapter's own names. Every tensor of the adapter is used, or it throws.
 * Throws UnsupportedError for what is no LoRA, FormatError for tensors that do not fit together, RecipeError for those that do not fit
 * the base.
 */
export function readAdapter(input: AdapterInput, base?: ReadonlyMap<string, TensorInfo>): Map<string, TensorOrigin> {
  const settings = readSettings(input);
  const modules = new Map<string, Parts>();
  for (const tensor of input.tensors.values()) {
    const [module, part] = split(input, tensor.name);
    const parts = modules.get(module) ?? new Map<string, TensorInfo>();
    if (parts.has(part)) {
      throw new FormatError(input.path, 'adapter-tensor-duplicate', `module ${quote(module)} has two tensors ${part}`);
    }
    modules.set(module, parts.set(part, tensor));
  }
  const prefix = base ? prefixOf([...modules.keys()], base) : { add: '', strip: '' };
  const origins = new Map<string, TensorOrigin>();
  for (const [module, parts] of modules) {
    const name = rename(module, prefix);
    for (const [target, origin] of originsOf(input, settings, { module, name, parts }, base)) origins.set(target, origin);
  }
  return origins;
}

interface Settings {
  readonly adaptive: boolean;
  readonly rank: number;
  readonly alpha: number;
  readonly rankStabilized: boolean;
  readonly transposed: boolean;
  readonly ranks: Readonly<Record<string, unknown>>;
  readonly alphas: Readonly<Record<string, unknown>>;
}

function readSettings({ config, configPath }: AdapterInput): Settings {
  const reader = new ConfigReader(config, configPath);
  const type = reader.text('peft_type');
  if (type !== 'LORA' && type !== 'ADALORA') throw reader.unsupported('peft_type', 'pcomp merges LORA and ADALORA adapters');
  const initial = config['init_lora_weights'];
  if (typeof initial === 'string' && CHANGES_BASE.test(initial)) {
    throw reader.unsupported(
      'init_lora_weights',
      'such an adapter belongs to a base that was changed with it; convert it to a plain LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)',
    );
  }
  for (const field of ['layer_replication', 'target_parameters', 'use_qalora', 'trainable_token_indices']) {
    const value = config[field];
    if (value !== undefined && value !== null && value !== false && !(Array.isArray(value) && value.length === 0))
      throw reader.unsupported(field, 'pcomp merges adapters without it');
  }
  const adaptive = type === 'ADALORA';
  const rank = reader.count(adaptive ? 'init_r' : 'r', adaptive ? 12 : 8);
  return {
    adaptive,
    rank,
    alpha: readAlpha(reader, adaptive, rank),
    rankStabilized: reader.boolean('use_rslora', false),
    transposed: reader.boolean('fan_in_fan_out', false),
    // AdaLoRA's rank_pattern lists which components are left; its tensors have shrunk accordingly.
    ranks: adaptive ? {} : patternOf(reader, 'rank_pattern'),
    alphas: patternOf(reader, 'alpha_pattern'),
  };
}

function readAlpha(reader: ConfigReader, adaptive: boolean, rank: number): number {
  const alpha = reader.fields['lora_alpha'] ?? 8;
  if (typeof alpha !== 'number' || !Number.isFinite(alpha)) {
    throw reader.broken('config-field-value', 'lora_alpha', 'it must be a number');
  }
  // As AdaLoRA's layers do: without alpha the scale is the rank's own.
  return adaptive && alpha <= 0 ? rank : alpha;
}

function patternOf(reader: ConfigReader, field: string): Readonly<Record<string, unknown>> {
  return reader.has(field) ? reader.object(field).fields : {};
}

/** The value of the first pattern that matches the end of the module's name, as PEFT looks it up. */
function lookUp(patterns: Readonly<Record<string, unknown>>, module: string, otherwise: number): number {
  for (const [pattern, value] of Object.entries(patterns)) {
    if (typeof value === 'number' && matches(pattern, module)) return value;
  }
  return otherwise;
}

function matches(pattern: string, module: string): boolean {
  try {
    return new RegExp(`^(.*\\.)?(${pattern})$`).test(module);
  } catch {
    return module === pattern || module.endsWith(`.${pattern}`);
  }
}

/** `base_model.model.<module>.lora_A.weight` -> the module and the tensor's role in it. */
function split({ path, tensors }: AdapterInput, name: string): [string, string] {
  const inner = name.replace(/^base_model\.model\./, '');
  for (const [pattern, part] of PARTS) {
    const match = pattern.exec(inner);
    if (match) return [inner.slice(0, match.index), part.replace('$1', match[1] ?? '')];
  }
  throw new UnsupportedError(
    `${path}: tensor ${quote(name)}, one of ${tensors.size}, is no part of a LoRA; pcomp leaves nothing of an adapter out`,
  );
}

function rename(module: string, { add, strip }: { add: string; strip: string }): string {
  return add + (module.startsWith(strip) ? module.slice(strip.length) : module);
}

/** Adapters trained inside a wrapper name modules with a prefix more or less than the base. */
function prefixOf(modules: readonly string[], base: ReadonlyMap<string, TensorInfo>): { add: string; strip: string } {
  const names = [...base.keys()];
  const fits = (name: string) => base.has(`${name}.weight`) || base.has(`${name}.bias`) || base.has(name);
  for (const add of PREFIXES) {
    for (const strip of PREFIXES) {
      if (modules.every((module) => module.startsWith(strip) && fits(rename(module, { add, strip })))) return { add, strip };
    }
  }
  const lost = modules.find((module) => !fits(module)) ?? modules[0];
  if (lost === 'lm_head') return { add: '', strip: '' };
  throw new RecipeError(
    `the adapter changes module ${quote(lost)}, but the base has no such module among its ${names.length} tensors`,
  );
}

interface Module {
  readonly module: string;
  /** Its name in the base. */
  readonly name: string;
  readonly parts: Parts;
}

function originsOf(
  input: AdapterInput,
  settings: Settings,
  { module, name, parts }: Module,
  base: ReadonlyMap<string, TensorInfo> | undefined,
): [string, TensorOrigin][] {
  const origins: [string, TensorOrigin][] = [];
  for (const part of ['weight', 'bias']) {
    const full = parts.get(part);
    if (full) origins.push([`${name}.${part}`, { kind: 'stored', name: full.name }]);
  }
  const added = parts.get('delta');
  if (added) origins.push([`${name}.weight`, { kind: 'added', name: added.name, scale: 1 }]);
  const [a, b, e, bias] = ['lora_A', 'lora_B', 'lora_E', 'lora_bias'].map((part) => parts.get(part));
  const dropped = settings.adaptive && (a?.shape[0] ?? 0) === 0;
  if (dropped) return origins;
  if (!a || !b) {
    const loose = [...parts.keys()].filter((part) => !['weight', 'bias', 'ranknum', 'delta'].includes(part));
    if (loose.length === 0) return origins;
    const detail = `module ${quote(module)} has ${loose.join(', ')}, but lora_A and lora_B belong together`;
    throw new FormatError(input.path, 'adapter-factor-missing', detail);
  }
  if (settings.adaptive && !e) {
    throw new FormatError(input.path, 'adapter-factor-missing', `module ${quote(module)} has no lora_E, which AdaLoRA needs`);
  }
  if (parts.has('weight')) {
    throw new UnsupportedError(`${input.path}: module ${quote(module)} is both adapted and saved whole; pcomp takes one of them`);
  }
  const target = `${name}.weight`;
  const scale = scaleOf(input, settings, module, a);
  const embedding = /\.lora_embedding_A/.test(a.name);
  const magnitude = parts.get('magnitude');
  const transposed = embedding || settings.transposed;
  checkFactors(input, { module, a, b, e, magnitude, transposed }, base?.get(target));
  origins.push([
    target,
    {
      kind: 'low-rank',
      a: a.name,
      b: b.name,
      ...(e ? { e: e.name } : {}),
      scale,
      transposed,
      ...(magnitude ? { magnitude: magnitude.name } : {}),
    },
  ]);
  if (bias) origins.push([`${name}.bias`, { kind: 'added', name: bias.name, scale }]);
  return origins;
}

function scaleOf(input: AdapterInput, settings: Settings, module: string, a: TensorInfo): number {
  if (settings.adaptive) return settings.alpha / (settings.rank + 1e-5);
  const rank = lookUp(settings.ranks, module, settings.rank);
  if (rank !== a.shape[0]) {
    const detail = `tensor ${quote(a.name)} has rank ${a.shape[0]}, but adapter_config.json gives ${rank}`;
    throw new FormatError(input.path, 'adapter-rank', detail);
  }
  const alpha = lookUp(settings.alphas, module, settings.alpha);
  return alpha / (settings.rankStabilized ? Math.sqrt(rank) : rank);
}

interface Factors {
  readonly module: string;
  readonly a: TensorInfo;
  readonly b: TensorInfo;
  readonly e: TensorInfo | undefined;
  readonly magnitude: TensorInfo | undefined;
  readonly transposed: boolean;
}

function checkFactors({ path }: AdapterInput, { module, a, b, e, magnitude, transposed }: Factors, base?: TensorInfo): void {
  const show = ({ name, shape }: TensorInfo) => `${quote(name)} is [${shape.join(', ')}]`;
  if (a.shape.length !== 2 || b.shape.length !== 2) {
    throw new UnsupportedError(`${path}: ${show(a)}: pcomp merges LoRA of linear layers and embeddings, not of convolutions`);
  }
  const [rank, inFeatures] = a.shape;
  const [outFeatures, rankB] = b.shape;
  if (rank !== rankB) throw new FormatError(path, 'adapter-rank', `${show(a)}, but ${show(b)}: their ranks differ`);
  if (e && e.shape.reduce((product, size) => product * size, 1) !== rank) {
    throw new FormatError(path, 'adapter-rank', `${show(e)}, but ${show(a)}: one value a component is expected`);
  }
  if (magnitude && magnitude.shape.reduce((product, size) => product * size, 1) !== outFeatures) {
    throw new FormatError(path, 'adapter-magnitude', `${show(magnitude)}, but ${show(b)}: one value an output is expected`);
  }
  if (!base) return;
  const expected = transposed ? [inFeatures, outFeatures] : [outFeatures, inFeatures];
  if (base.shape.length !== 2 || base.shape[0] !== expected[0] || base.shape[1] !== expected[1]) {
    throw new RecipeError(
      `${path}: module ${quote(module)} changes a tensor of [${expected.join(', ')}], but the base's ${show(base)}`,
    );
  }
}
