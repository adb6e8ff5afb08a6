/** What a mergekit file says of the vocabulary: `tokenizer_source`, or the newer `tokenizer` with more to say. */
import { basename } from 'node:path';
import { RecipeError } from '../../../errors.ts';
import type { TokenRule, TokenRules, TokenSource } from '../token-rules.ts';
import { anyMapping, mapping, modelPath, string } from './yaml.ts';

export interface MergekitVocabulary {
  /** Whose tokens the result has, as `--tokenizer`. */
  readonly tokenizer?: string;
  /** To a multiple of what its rows are filled up. */
  readonly padVocab?: number;
  readonly tokens?: TokenRules;
}

export function readVocabularyRules(
  where: string,
  { tokenizer_source: source, tokenizer }: Readonly<Record<string, unknown>>,
): MergekitVocabulary {
  if (isAbsent(tokenizer)) return isAbsent(source) ? {} : { tokenizer: string(`${where}: tokenizer_source`, source) };
  if (!isAbsent(source)) throw new RecipeError(`${where}: tokenizer and tokenizer_source say the same; keep one of them`);
  const {
    source: whose,
    pad_to_multiple_of: multiple,
    tokens,
  } = mapping(`${where}: tokenizer`, tokenizer, ['source', 'tokens', 'pad_to_multiple_of']);
  if (!isAbsent(multiple) && !(Number.isInteger(multiple) && (multiple as number) > 0))
    throw new RecipeError(
      `${where}: tokenizer.pad_to_multiple_of ${JSON.stringify(multiple)}: a whole number above 0 is expected`,
    );
  const at = `${where}: tokenizer.tokens`;
  const rules = isAbsent(tokens) ? [] : Object.entries(anyMapping(at, tokens));
  if (rules.some(([token]) => token === '')) throw new RecipeError(`${at}: a token has no name`);
  return {
    tokenizer: isAbsent(whose) ? 'union' : string(`${where}: tokenizer.source`, whose),
    ...(typeof multiple === 'number' ? { padVocab: multiple } : {}),
    ...(rules.length > 0
      ? { tokens: Object.fromEntries(rules.map(([token, rule]) => [token, readTokenRule(`${at}.${token}`, rule)])) }
      : {}),
  };
}

function readTokenRule(where: string, raw: unknown): TokenRule {
  const { source, force } = mapping(where, raw, ['source', 'force']);
  if (!isAbsent(force) && typeof force !== 'boolean')
    throw new RecipeError(`${where}.force ${JSON.stringify(force)}: true or false is expected`);
  return { ...(isAbsent(source) ? {} : { source: readTokenSource(`${where}.source`, source) }), force: force === true };
}

/** A model's name, `{kind: zero}`, or `{kind: model_token, model, token | token_id}`. */
function readTokenSource(where: string, raw: unknown): TokenSource {
  if (typeof raw === 'string') return { kind: 'model', model: modelPath(where, raw) };
  const { kind } = anyMapping(where, raw);
  if (kind === 'zero') {
    mapping(where, raw, ['kind']);
    return { kind };
  }
  if (kind !== 'model_token')
    throw new RecipeError(`${where}.kind ${JSON.stringify(kind) ?? 'absent'}: zero or model_token is expected`);
  const { model, token, token_id: id } = mapping(where, raw, ['kind', 'model', 'token', 'token_id']);
  if (isAbsent(token) === isAbsent(id)) throw new RecipeError(`${where}: exactly one of token and token_id is expected`);
  if (!isAbsent(id) && !(Number.isInteger(id) && (id as number) >= 0))
    throw new RecipeError(`${where}.token_id ${JSON.stringify(id)}: a whole number from 0 is expected`);
  const asked = isAbsent(id) ? string(`${where}.token`, token) : (id as number);
  return { kind: 'model', model: modelPath(`${where}.model`, model), token: asked };
}

function isAbsent(value: unknown): value is undefined | null {
  return value === undefined || value === null;
}

/** Without folders on the way to models. */
export function portableVocabulary({ tokenizer, tokens, ...rest }: MergekitVocabulary): MergekitVocabulary {
  return {
    ...rest,
    ...(tokenizer === undefined ? {} : { tokenizer: basename(tokenizer) }),
    ...(tokens === undefined
      ? {}
      : { tokens: Object.fromEntries(Object.entries(tokens).map(([token, rule]) => [token, portable(rule)])) }),
  };
}

function portable({ source, force }: TokenRule): TokenRule {
  if (source?.kind !== 'model') return { ...(source ? { source } : {}), force };
  return { source: { ...source, model: basename(source.model) }, force };
}
