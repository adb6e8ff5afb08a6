/** The rules of tokenizer.json that the rest relies on, each with a name. */
import { FormatError, UnsupportedError } from '../errors.ts';

export type JsonObject = Readonly<Record<string, unknown>>;

/** Kinds of tokenizer model that are supported. */
export const MODEL_TYPES = ['BPE', 'Unigram', 'WordPiece'] as const;

const SECTIONS = ['normalizer', 'pre_tokenizer', 'post_processor', 'decoder'] as const;

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/**
 * The tokenizer with its model's type filled in, which old files leave out. Throws FormatError when a section, the
 * vocabulary, the merges or an added token is not what it must be, and UnsupportedError for a model type that is not in the list.
 */
export function checkTokenizer(path: string, json: JsonObject): JsonObject {
  const fail = (rule: string, detail: string): never => {
    throw new FormatError(path, rule, detail);
  };
  const { model } = json;
  if (!isObject(model)) return fail('tokenizer-model-missing', 'no "model" section');
  for (const section of SECTIONS) {
    const value = json[section];
    if (value === undefined) fail('tokenizer-section-missing', `no "${section}" section; null says that there is none`);
    if (value !== null && !isObject(value)) fail('tokenizer-section', `"${section}" is neither an object nor null`);
  }
  const type = model['type'] ?? (model['merges'] ? 'BPE' : undefined);
  if (!MODEL_TYPES.some((known) => known === type)) {
    throw new UnsupportedError(
      `${path}: tokenizer model "${String(type)}" is not supported; pcomp knows ${MODEL_TYPES.join(', ')}`,
    );
  }
  const ids = type === 'Unigram' ? checkUnigram(path, model) : checkVocabulary(path, model);
  if (type === 'BPE') checkMerges(path, model, ids as ReadonlyMap<string, number>);
  checkAddedTokens(path, json['added_tokens']);
  return { ...json, model: { ...model, type } };
}

/** Token -> id; ids are whole numbers, none twice. */
function checkVocabulary(path: string, model: JsonObject): Map<string, number> {
  const { vocab } = model;
  if (!isObject(vocab)) throw new FormatError(path, 'tokenizer-vocab', '"model.vocab" is not an object of token ids');
  const owner = new Map<number, string>();
  const ids = new Map<string, number>();
  for (const [token, id] of Object.entries(vocab)) {
    if (!isId(id))
      throw new FormatError(path, 'tokenizer-vocab-id', `token "${token}" has the id ${JSON.stringify(id)}, not a whole number`);
    const other = owner.get(id);
    if (other !== undefined)
      throw new FormatError(path, 'tokenizer-vocab-duplicate', `tokens "${other}" and "${token}" both have the id ${id}`);
    owner.set(id, token);
    ids.set(token, id);
  }
  if (ids.size === 0) throw new FormatError(path, 'tokenizer-vocab', '"model.vocab" is empty');
  return ids;
}

function checkUnigram(path: string, model: JsonObject): undefined {
  const { vocab } = model;
  const fits = (entry: unknown) => Array.isArray(entry) && typeof entry[0] === 'string' && typeof entry[1] === 'number';
  if (!Array.isArray(vocab) || vocab.length === 0)
    throw new FormatError(path, 'tokenizer-vocab', '"model.vocab" is not a list of [token, score]');
  const wrong = vocab.findIndex((entry) => !fits(entry));
  if (wrong >= 0) throw new FormatError(path, 'tokenizer-vocab', `entry ${wrong} of "model.vocab" is not [token, score]`);
}

/** Every merge names two parts, and what they make is a token. */
function checkMerges(path: string, model: JsonObject, ids: ReadonlyMap<string, number>): void {
  const { merges } = model;
  if (!Array.isArray(merges)) throw new FormatError(path, 'tokenizer-merges', '"model.merges" is not a list');
  merges.forEach((merge: unknown, index) => {
    const pair = mergePair(merge);
    if (pair === undefined) {
      throw new FormatError(path, 'tokenizer-merges', `merge ${index} is ${JSON.stringify(merge)}, not a pair of tokens`);
    }
    const continuing = model['continuing_subword_prefix'];
    const right = typeof continuing === 'string' && pair[1].startsWith(continuing) ? pair[1].slice(continuing.length) : pair[1];
    if (!ids.has(pair[0] + right)) {
      throw new FormatError(
        path,
        'tokenizer-merge-token',
        `merge ${index} makes "${pair[0]}${right}", which is not in the vocabulary`,
      );
    }
  });
}

/** The two spellings of a merge: "a b" and ["a", "b"]. */
export function mergePair(merge: unknown): readonly [string, string] | undefined {
  const parts: readonly unknown[] = typeof merge === 'string' ? merge.split(' ') : Array.isArray(merge) ? merge : [];
  const [left, right] = parts;
  return parts.length === 2 && typeof left === 'string' && typeof right === 'string' ? [left, right] : undefined;
}

function checkAddedTokens(path: string, added: unknown): void {
  if (!Array.isArray(added)) throw new FormatError(path, 'tokenizer-added-tokens', '"added_tokens" is not a list');
  added.forEach((token: unknown, index) => {
    if (!isObject(token) || typeof token['content'] !== 'string' || token['content'] === '' || !isId(token['id'])) {
      throw new FormatError(
        path,
        'tokenizer-added-tokens',
        `entry ${index} of "added_tokens" has no content, or no whole number as its id`,
      );
    }
  });
}

function isId(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < 2 ** 31;
}
