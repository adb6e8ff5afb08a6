/**
 * Cutting long text before it is tokenized, only where that provably leaves its tokens as they are. Otherwise a text of 100 MB is
 * one array of 30 million strings, and with a sentencepiece-style tokenizer one "word" of 100 million characters.
 */
import { isObject, type JsonObject, mergePair } from './tokenizer-checks.ts';

/**
 * Where a text may be cut: `line-break` between a letter and the line break after it; `space` at a space between two letters,
 * the space itself being dropped since the tokenizer puts one before every text.
 */
export type Cutting = 'line-break' | 'space' | 'none';

/** Patterns of pre-tokenizers in which no word goes on from a letter to a line break, as their models spell them. */
const WORD_PATTERNS: readonly string[] = [
  // Llama 3, and Qwen 2 and 3 (one digit at a time)
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
];

/** How text of this tokenizer may be cut. `none` whenever it is not certain. */
export function cuttingOf(json: JsonObject, config: JsonObject): Cutting {
  // These two change text outside the normalizer; an added token may reach over a cut or swallow the space around it.
  if (config['remove_space'] || config['do_lowercase_and_remove_accent']) return 'none';
  const added = json['added_tokens'] as readonly JsonObject[];
  if (added.some((token) => token['lstrip'] || token['rstrip'] || token['single_word'])) return 'none';
  const none = (pattern: RegExp) => !added.some((token) => pattern.test(String(token['content'])));
  // The tokenizer puts a space mark after an added token too: where one may begin or end there is no cut.
  if (wordBreakingSpaces(json) && none(/ |^\p{L}|\p{L}$/u)) return 'space';
  if (lineBreaksEndWords(json) && none(/\n/)) return 'line-break';
  return 'none';
}

/** `text` in pieces of about `size` characters, never an empty one. */
export function* cutText(text: string, cutting: Cutting, size: number): Generator<string> {
  const boundary = cutting === 'space' ? /(?<=\p{L}) (?=\p{L})/gu : /(?<=\p{L})(?=\n)/gu;
  const dropped = cutting === 'space' ? 1 : 0;
  let start = 0;
  while (cutting !== 'none' && text.length - start > size) {
    boundary.lastIndex = start + size;
    const found = boundary.exec(text);
    if (found === null) break;
    yield text.slice(start, found.index);
    start = found.index + dropped;
  }
  if (start < text.length) yield text.slice(start);
}

/** ByteLevel words by GPT-2's pattern or one of `WORD_PATTERNS`, on text that is unchanged or NFC. */
function lineBreaksEndWords(json: JsonObject): boolean {
  const { normalizer, pre_tokenizer: words } = json as Record<string, unknown>;
  if (normalizer !== null && !(isObject(normalizer) && normalizer['type'] === 'NFC')) return false;
  if (!isObject(words)) return false;
  const steps = words['type'] === 'Sequence' ? words['pretokenizers'] : [words];
  if (!Array.isArray(steps)) return false;
  const byteLevel: unknown = steps.at(-1);
  if (!isObject(byteLevel) || byteLevel['type'] !== 'ByteLevel' || byteLevel['add_prefix_space'] === true) return false;
  const before: unknown[] = steps.slice(0, -1);
  if (before.length === 0) return byteLevel['use_regex'] !== false;
  return before.every((step) => {
    if (!isObject(step) || step['type'] !== 'Split' || step['behavior'] !== 'Isolated' || step['invert'] === true) return false;
    const pattern = isObject(step['pattern']) ? step['pattern']['Regex'] : undefined;
    return WORD_PATTERNS.some((known) => known === pattern);
  });
}

const SPACE = '\u2581';

/**
 * Sentencepiece as Llama 2 writes it: a space mark put in front, every space turned into the mark, no words, and no token with
 * a mark after another character, so that no merge reaches over the start of a word.
 */
function wordBreakingSpaces(json: JsonObject): boolean {
  const { normalizer, pre_tokenizer: words, model } = json as Record<string, unknown>;
  if (words !== null || !isObject(normalizer) || !isObject(model)) return false;
  const steps: unknown = normalizer['type'] === 'Sequence' ? normalizer['normalizers'] : undefined;
  if (!Array.isArray(steps) || steps.length !== 2) return false;
  const [prepend, replace] = steps as JsonObject[];
  const pattern = replace['pattern'];
  return (
    prepend['type'] === 'Prepend' &&
    prepend['prepend'] === SPACE &&
    replace['type'] === 'Replace' &&
    replace['content'] === SPACE &&
    isObject(pattern) &&
    pattern['String'] === ' ' &&
    mergesStayInWords(model)
  );
}

/** No merge makes a token in which a space mark follows another character. */
function mergesStayInWords(model: JsonObject): boolean {
  const { merges } = model;
  if (!Array.isArray(merges) || model['end_of_word_suffix'] || model['continuing_subword_prefix']) return false;
  // Without the mark as a token of its own, unknown words next to each other would be fused over it.
  if (!isObject(model['vocab']) || !Object.hasOwn(model['vocab'], SPACE)) return false;
  return merges.every((merge) => {
    const token = mergePair(merge)?.join('') ?? SPACE;
    return !/[^\u2581]\u2581/u.test(token);
  });
}

/**
 * The same tokenizer with a split before every word, when `wordBreakingSpaces` says that no merge reaches over it: then the tokens
 * are the same, and long text costs linear time and little memory.
 */
export function splitLongWords(json: JsonObject): JsonObject {
  if (!wordBreakingSpaces(json)) return json;
  const pattern = { Regex: `${SPACE}*[^${SPACE}]+` };
  return { ...json, pre_tokenizer: { type: 'Split', pattern, behavior: 'Isolated', invert: false } };
}
