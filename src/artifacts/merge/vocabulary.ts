/** Vocabularies of models that are merged, and one that has the tokens of all (merging.md 3.3). */
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { readJsonObject } from './merge-input.ts';

/** A token that is matched before the model of the tokenizer sees the text. */
export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly [flag: string]: unknown;
}

/** tokenizer.json of one folder. */
export interface Vocabulary {
  /** Without the added ones. */
  readonly ordinary: ReadonlyMap<string, number>;
  readonly added: readonly AddedToken[];
  /** All tokens. */
  readonly ids: ReadonlyMap<string, number>;
  /** The file, as JSON. */
  readonly json: Readonly<Record<string, unknown>>;
}

/** Undefined for a folder without tokenizer.json. Throws FormatError for a file that is no JSON object. */
export async function readVocabulary(folder: string): Promise<Vocabulary | undefined> {
  const path = join(folder, 'tokenizer.json');
  try {
    await stat(path);
  } catch {
    return undefined;
  }
  const json = await readJsonObject(path);
  const ordinary = new Map<string, number>();
  const vocab = (json['model'] as { readonly vocab?: unknown } | undefined)?.vocab;
  // Unigram keeps a list of [token, score], the others a map of token -> id.
  if (Array.isArray(vocab)) {
    for (const [id, entry] of (vocab as unknown[]).entries()) ordinary.set(String(Array.isArray(entry) ? entry[0] : entry), id);
  } else if (typeof vocab === 'object' && vocab !== null) {
    for (const [token, id] of Object.entries(vocab)) ordinary.set(token, Number(id));
  }
  const added = Array.isArray(json['added_tokens']) ? (json['added_tokens'] as AddedToken[]) : [];
  const ids = new Map(ordinary);
  for (const { content, id } of added) ids.set(content, id);
  return { ordinary, added, ids, json };
}

/** A vocabulary of the models in turn, and what each had to add. */
export interface UnitedVocabulary {
  readonly ids: ReadonlyMap<string, number>;
  /** In the order of their new ids. */
  readonly appended: readonly {
    readonly token: string;
    readonly id: number;
    /** Which of the models has it first; absent: none, it was asked for. */
    readonly model?: number;
    /** As that model adds it; absent: an ordinary token there. */
    readonly added?: AddedToken;
  }[];
  /** Added tokens that two models define differently: the first definition holds. */
  readonly conflicts: readonly string[];
}

/** @param rows of each model's embedding: ids from there on name nothing; the first model's tokens keep their ids */
export function uniteVocabularies(models: readonly Vocabulary[], rows: readonly number[]): UnitedVocabulary {
  const [first] = models;
  const ids = new Map([...first.ids].filter(([, id]) => id < rows[0]));
  // Rows of the first model beyond its tokens are padding, which stays: new tokens come after all of them.
  let next = firstFree(ids, rows[0]);
  const appended: UnitedVocabulary['appended'][number][] = [];
  const definitions = new Map(first.added.map((token) => [token.content, token]));
  const conflicts = new Set<string>();
  const append = (token: string, model: number, added?: AddedToken): void => {
    ids.set(token, next);
    appended.push({ token, id: next++, model, ...(added ? { added } : {}) });
  };
  const byId = (tokens: Iterable<readonly [string, number]>) => [...tokens].sort(([, a], [, b]) => a - b);
  for (const [model, { ordinary, added }] of models.entries()) {
    const names = new Set(added.map(({ content }) => content));
    for (const [token, id] of byId(ordinary)) if (id < rows[model] && !names.has(token) && !ids.has(token)) append(token, model);
  }
  for (const [model, { added }] of models.entries()) {
    for (const token of [...added].sort((a, b) => a.id - b.id)) {
      if (token.id >= rows[model]) continue;
      const known = definitions.get(token.content);
      if (known && !sameFlags(known, token)) conflicts.add(token.content);
      definitions.set(token.content, known ?? token);
      if (!ids.has(token.content)) append(token.content, model, token);
    }
  }
  return { ids, appended, conflicts: [...conflicts] };
}

/** The first id, from `rows` on, that no token has. Vocabularies are longer than a call may have arguments. */
export function firstFree(ids: ReadonlyMap<string, number>, rows: number): number {
  let free = rows;
  for (const id of ids.values()) free = Math.max(free, id + 1);
  return free;
}

/** With tokens that are asked for, after all others. @param rows of the model whose padding they come after */
export function withTokens(united: UnitedVocabulary, tokens: readonly string[], rows: number): UnitedVocabulary {
  const ids = new Map(united.ids);
  let next = firstFree(ids, rows);
  const appended = [...united.appended];
  for (const token of tokens) {
    if (ids.has(token)) continue;
    ids.set(token, next);
    appended.push({ token, id: next, added: { id: next, content: token, ...ASKED_FLAGS } });
    next++;
  }
  return { ...united, ids, appended };
}

function sameFlags({ id: _, ...a }: AddedToken, { id: __, ...b }: AddedToken): boolean {
  const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])];
  return keys.every((key) => Boolean(a[key]) === Boolean(b[key]) || a[key] === b[key]);
}

const PLAIN_FLAGS = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: false } as const;
/** As the tokenizers library adds a token of which nothing but the text is said. */
const ASKED_FLAGS = { ...PLAIN_FLAGS, normalized: true } as const;

/** tokenizer.json of the first model with the tokens that others add: an ordinary one of theirs is matched by what it spells. */
export function unitedTokenizer(first: Vocabulary, { appended }: UnitedVocabulary): Record<string, unknown> {
  const spell = isByteLevel(first.json) ? bytesSpelled : (token: string) => token;
  return {
    ...first.json,
    added_tokens: [
      ...first.added,
      ...appended.map(({ token, id, added }) => (added ? { ...added, id } : { id, content: spell(token), ...PLAIN_FLAGS })),
    ],
  };
}

function isByteLevel({ pre_tokenizer: own, decoder }: Readonly<Record<string, unknown>>): boolean {
  return /"type":"ByteLevel"/.test(JSON.stringify([own, decoder]));
}

/** Bytes as the letters that byte-level tokenizers write them in: printable ones as they are, the others from U+0100 on. */
const BYTE_LETTERS = byteLetters();

function byteLetters(): ReadonlyMap<string, number> {
  const letters = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    letters.set(String.fromCodePoint(printable ? byte : next++), byte);
  }
  return letters;
}

/** `Ġhi` -> ` hi`; a token that is no whole text stays as it is written, and is never matched. */
function bytesSpelled(token: string): string {
  const bytes = [...token].map((letter) => BYTE_LETTERS.get(letter));
  if (bytes.includes(undefined)) return token;
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(Uint8Array.from(bytes as number[]));
  } catch {
    return token;
  }
}
