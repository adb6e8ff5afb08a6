/** A mergekit configuration as plain data: what `pcomp merge --config` follows (merging.md 3.4). Nothing in it is ignored silently. */
import { readFile } from 'node:fs/promises';
import { parse as parseYaml } from 'yaml';
import { errorCode } from '../../../artifacts/process-lock.ts';
import { ChatTemplate } from '../../../calibration/chat-template.ts';
import { EnvironmentError, RecipeError } from '../../../errors.ts';
import { mergerOf } from '../../../methods/merge/index.ts';
import { type MergekitParameters, readMergekitParameters } from './values.ts';
import { type MergekitVocabulary, readVocabularyRules } from './vocabulary.ts';
import { list, mapping, modelPath, string } from './yaml.ts';

/** One model in one slice. */
export interface MergekitSource {
  readonly model: string;
  /** Layers [start, end) of it; absent: all. */
  readonly layers?: readonly [number, number];
  readonly parameters: MergekitParameters;
}

/** Layers of the result that follow each other, each merged from one layer of every source. */
export interface MergekitSlice {
  readonly sources: readonly MergekitSource[];
  readonly parameters: MergekitParameters;
}

export interface MergekitConfig {
  readonly method: string;
  readonly base?: string;
  /** Element type of the result, as `--dtype`. */
  readonly dtype?: 'f32' | 'f16' | 'bf16';
  /** `models` are one slice of all layers. */
  readonly slices: readonly MergekitSlice[];
  readonly parameters: MergekitParameters;
  /** Of the one entry of `modules`: before those of the file, after those of a slice. */
  readonly module: MergekitParameters;
  /** `auto`: the one that most models have; otherwise a template itself. */
  readonly chatTemplate?: string;
  readonly vocabulary: MergekitVocabulary;
  /** The file, as it was read. */
  readonly text: string;
}

const DTYPES = { float32: 'f32', float16: 'f16', bfloat16: 'bf16' } as const;

/** Reads a file. @throws EnvironmentError when it cannot be read, RecipeError for what pcomp cannot follow to the letter */
export async function readMergekitConfig(path: string): Promise<MergekitConfig> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `--config ${path}: cannot be read (${errorCode(error)})`, { cause: error });
  }
  let raw: unknown;
  try {
    raw = parseYaml(text, { stringKeys: true });
  } catch (error) {
    const message = String((error as Error).message).split('\n', 1)[0];
    throw new RecipeError(`--config ${path}: is not YAML: ${message}`);
  }
  const config = parseMergekitConfig(`--config ${path}`, raw, text);
  const { chatTemplate } = config;
  if (chatTemplate !== undefined && chatTemplate !== AUTO) await ChatTemplate.parse(`--config ${path}`, chatTemplate);
  return config;
}

/** @param where stands in front of every message */
export function parseMergekitConfig(where: string, raw: unknown, text: string): MergekitConfig {
  const top = mapping(where, raw, [
    'merge_method',
    'base_model',
    'models',
    'slices',
    'modules',
    'chat_template',
    'dtype',
    'out_dtype',
    'parameters',
    'tokenizer_source',
    'tokenizer',
  ]);
  const forms = ['models', 'slices', 'modules'].filter((key) => top[key] !== undefined);
  if (forms.length !== 1) throw new RecipeError(`${where}: exactly one of models, slices and modules is expected`);
  const method = mergerOf(string(`${where}: merge_method`, top['merge_method'])).name;
  const parameters = readMergekitParameters(`${where}: parameters`, top['parameters']);
  const { at, content } = top['modules'] === undefined ? { at: `${where}:`, content: top } : onlyModule(where, top['modules']);
  const slices = readSlices(at, content);
  const module = top['modules'] === undefined ? {} : readMergekitParameters(`${at} parameters`, content['parameters']);
  const chatTemplate = readChatTemplate(where, top['chat_template']);
  const base = top['base_model'] === undefined ? undefined : modelPath(`${where}: base_model`, top['base_model']);
  const named = top['out_dtype'] ?? top['dtype'];
  const dtype = named === undefined ? undefined : readDtype(where, named);
  return {
    method,
    ...(base === undefined ? {} : { base }),
    ...(dtype === undefined ? {} : { dtype }),
    slices,
    parameters,
    module,
    ...(chatTemplate === undefined ? {} : { chatTemplate }),
    vocabulary: readVocabularyRules(where, top),
    text,
  };
}

/** A language model is one module, which mergekit calls `default`. */
function onlyModule(where: string, raw: unknown): { readonly at: string; readonly content: Record<string, unknown> } {
  const modules = mapping(`${where}: modules`, raw, ['default']);
  const at = `${where}: modules.default:`;
  const content = mapping(at.slice(0, -1), modules['default'], ['models', 'slices', 'parameters']);
  if ((content['models'] === undefined) === (content['slices'] === undefined))
    throw new RecipeError(`${at} exactly one of models and slices is expected`);
  return { at, content };
}

/** `models` are one slice of all layers. */
function readSlices(at: string, { models, slices }: Readonly<Record<string, unknown>>): readonly MergekitSlice[] {
  if (models === undefined) return list(`${at} slices`, slices).map((slice, i) => readSlice(`${at} slices[${i}]`, slice));
  return [{ sources: list(`${at} models`, models).map((m, i) => readModel(`${at} models[${i}]`, m)), parameters: {} }];
}

const AUTO = 'auto';

function readChatTemplate(where: string, raw: unknown): string | undefined {
  if (raw === undefined || raw === null) return undefined;
  const written = string(`${where}: chat_template`, raw);
  if (written === AUTO || written.includes('{')) return written;
  throw new RecipeError(
    `${where}: chat_template ${written}: mergekit's own templates are not here; auto, or the Jinja text itself, is expected`,
  );
}

function readModel(where: string, raw: unknown): MergekitSource {
  const { model, parameters } = mapping(where, raw, ['model', 'parameters']);
  return { model: modelPath(`${where}.model`, model), parameters: readMergekitParameters(`${where}.parameters`, parameters) };
}

function readSlice(where: string, raw: unknown): MergekitSlice {
  const { sources, parameters } = mapping(where, raw, ['sources', 'parameters']);
  const read = list(`${where}.sources`, sources).map((source, i) => readSource(`${where}.sources[${i}]`, source));
  const counts = read.map(({ layers: [start, end] }) => end - start);
  const other = counts.findIndex((count) => count !== counts[0]);
  if (other > 0) {
    throw new RecipeError(
      `${where}: layer_range of its sources must be equally long; they are ${counts[0]} and ${counts[other]}`,
    );
  }
  return { sources: read, parameters: readMergekitParameters(`${where}.parameters`, parameters) };
}

function readSource(where: string, raw: unknown): MergekitSource & { readonly layers: readonly [number, number] } {
  const { model, layer_range: range, parameters } = mapping(where, raw, ['model', 'layer_range', 'parameters']);
  const [start, end] = (Array.isArray(range) ? range : []) as unknown[];
  const whole = (value: unknown): value is number => typeof value === 'number' && Number.isInteger(value) && value >= 0;
  if (!Array.isArray(range) || range.length !== 2 || !whole(start) || !whole(end) || start >= end) {
    throw new RecipeError(`${where}.layer_range ${JSON.stringify(range)}: [first, end) with 0 <= first < end is expected`);
  }
  return {
    model: modelPath(`${where}.model`, model),
    layers: [start, end],
    parameters: readMergekitParameters(`${where}.parameters`, parameters),
  };
}

function readDtype(where: string, raw: unknown): 'f32' | 'f16' | 'bf16' {
  if (typeof raw === 'string' && Object.hasOwn(DTYPES, raw)) return DTYPES[raw as keyof typeof DTYPES];
  throw new RecipeError(`${where}: dtype ${JSON.stringify(raw)}: must be one of ${Object.keys(DTYPES).join(', ')}`);
}
