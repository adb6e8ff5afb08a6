/** A model's own tokenizer, from the tokenizer.json and tokenizer_config.json beside its weights. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Tokenizer as Tokenization } from '@huggingface/tokenizers';
import { EnvironmentError, FormatError, UnsupportedError } from '../errors.ts';
import { type Cutting, cutText, cuttingOf, splitLongWords } from './text-pieces.ts';
import { checkTokenizer, type JsonObject, MODEL_TYPES } from './tokenizer-checks.ts';

/** Characters that are tokenized at once when cutting the text does not change its tokens. */
const PIECE_CHARACTERS = 1 << 20;

/** Text to token ids and back. */
export class Tokenizer {
  /** The tokenizer.json it was made from; used in messages. */
  readonly path: string;
  readonly #tokenization: Tokenization;
  readonly #cutting: Cutting;
  readonly #vocabSize: number;
  readonly #pieceCharacters: number;
  /** Ids that the template puts before and after a text: usually one beginning-of-sequence token and nothing. */
  readonly prefix: readonly number[];
  readonly suffix: readonly number[];

  /**
   * @param tokenizerJson parsed tokenizer.json, @param config parsed tokenizer_config.json,
   * @param vocabSize rows of the model's embedding, @param pieceCharacters most characters to tokenize at once
   */
  constructor(
    path: string,
    tokenizerJson: JsonObject,
    config: JsonObject,
    vocabSize: number,
    pieceCharacters: number = PIECE_CHARACTERS,
  ) {
    const checked = checkTokenizer(path, tokenizerJson);
    this.path = path;
    this.#cutting = cuttingOf(checked, config);
    this.#tokenization = build(path, checked, config);
    this.#vocabSize = vocabSize;
    this.#pieceCharacters = pieceCharacters;
    ({ prefix: this.prefix, suffix: this.suffix } = fitting(path, () => this.#template()));
  }

  /**
   * The ids of `text`, the whole text as one sequence with the template's special tokens around it; only those before it for a text that goes
   * on, none for one that has its own in it, as chat templates write them.
   * Throws FormatError `token-id-beyond-vocabulary` or `token-unknown`.
   */
  encode(text: string, special: 'around' | 'before' | 'none' = 'around'): Int32Array {
    const parts: number[][] = [special === 'none' ? [] : [...this.prefix]];
    for (const piece of cutText(text, this.#cutting, this.#pieceCharacters)) parts.push(this.#encodePiece(piece));
    if (special === 'around') parts.push([...this.suffix]);
    const ids = new Int32Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) {
      this.#check(part);
      ids.set(part, at);
      at += part.length;
    }
    return ids;
  }

  /** The text of `ids`, special tokens left out. */
  decode(ids: ArrayLike<number>): string {
    if (ids.length === 0) return '';
    return this.#tokenization.decode(Array.from(ids), { skip_special_tokens: true });
  }

  #encodePiece(piece: string): number[] {
    return this.#tokenization.encode(piece, { add_special_tokens: false }).ids;
  }

  /** What the template adds is the same for every text: see what it adds to one. */
  #template(): { prefix: number[]; suffix: number[] } {
    const plain = this.#encodePiece('a');
    const full = this.#tokenization.encode('a').ids;
    if (plain.length === 0) return { prefix: full, suffix: [] };
    const added = full.length - plain.length;
    for (let before = 0; before <= added; before++) {
      if (plain.every((id, i) => full[before + i] === id)) {
        return { prefix: full.slice(0, before), suffix: full.slice(before + plain.length) };
      }
    }
    throw new FormatError(this.path, 'tokenizer-template', 'its post_processor changes tokens of the text itself');
  }

  #check(ids: readonly (number | undefined)[]): void {
    for (const id of ids) {
      if (id === undefined) {
        throw new FormatError(
          this.path,
          'token-unknown',
          'a piece of the text is not in the vocabulary, and there is no unknown token',
        );
      }
      if (id >= this.#vocabSize) {
        throw new FormatError(
          this.path,
          'token-id-beyond-vocabulary',
          `the text gives token id ${id}, but the model's vocabulary has ${this.#vocabSize} entries`,
        );
      }
    }
  }
}

/**
 * Loads the tokenizer of a model folder. tokenizer_config.json may be absent, tokenizer.json may not.
 * Throws FormatError (`tokenizer-missing`, `tokenizer-json`, ...: see tokenizer-checks.ts), UnsupportedError for a kind of
 * tokenizer that is not known, EnvironmentError FILE_UNREADABLE.
 */
export async function loadTokenizer(folder: string, vocabSize: number): Promise<Tokenizer> {
  const path = join(folder, 'tokenizer.json');
  const json = await readJson(path);
  if (json === undefined) {
    throw new FormatError(path, 'tokenizer-missing', 'there is no such file, and the text cannot become tokens without it');
  }
  return new Tokenizer(path, json, (await readJson(join(folder, 'tokenizer_config.json'))) ?? {}, vocabSize);
}

/** Parses a file that holds a JSON object; undefined when there is no such file. */
async function readJson(path: string): Promise<JsonObject | undefined> {
  let bytes: Uint8Array;
  try {
    bytes = await readFile(path);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be read (${code})`, { cause: error });
  }
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch (error) {
    throw new FormatError(path, 'tokenizer-json', `not JSON: ${(error as Error).message}`, { cause: error });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new FormatError(path, 'tokenizer-object', 'not a JSON object');
  }
  return value as JsonObject;
}

function build(path: string, tokenizerJson: JsonObject, config: JsonObject): Tokenization {
  try {
    return fitting(path, () => new Tokenization(splitLongWords(tokenizerJson), config));
  } catch (error) {
    const cause = (error as Error).cause;
    const message = cause instanceof Error ? cause.message : '';
    if (!/^Unknown \w+ type/.test(message)) throw error;
    throw new UnsupportedError(`${path}: ${message}; pcomp knows the models ${MODEL_TYPES.join(', ')}`, { cause });
  }
}

/** The library trusts its files: whatever it stumbles over is a part of tokenizer.json that is not what it should be. */
function fitting<T>(path: string, use: () => T): T {
  try {
    return use();
  } catch (error) {
    if (error instanceof FormatError) throw error;
    const { message } = error as Error;
    throw new FormatError(path, 'tokenizer-content', `its parts do not fit together: ${message}`, { cause: error });
  }
}
