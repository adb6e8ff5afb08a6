/** Text to calibrate on or to evaluate: plain files, JSON lines, or one column of a table, as a stream of documents. */
import { constants } from 'node:buffer';
import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { EnvironmentError, FormatError, RecipeError } from '../errors.ts';
import type { ChatMessage } from './chat-template.ts';
import { parseTable } from './table.ts';

const DEFAULT_FIELD = 'text';
/** What one string holds: half a gigabyte of English. */
const MAX_CHARACTERS = constants.MAX_STRING_LENGTH;

/** One file of text, as `--calibration` and `--text` name it. */
export interface TextFile {
  readonly path: string;
  readonly kind: 'text' | 'json-lines' | 'table';
  /** Field of each JSON line; the default is `text`. */
  readonly field?: string;
  /** Column of a table, by its heading. */
  readonly column?: string;
  /** Between the cells of a table. */
  readonly separator?: ',' | '\t';
}

/**
 * Reads `notes.txt`, `data.jsonl`, `data.jsonl:field`, `table.csv:column` or `table.tsv:column`. Any other ending is plain text.
 * A field that is named (`chat.jsonl:messages`) may hold a chat: it gives the `content` of its messages, joined by line breaks.
 * Throws RecipeError for a table without a column.
 */
export function parseTextFile(argument: string): TextFile {
  const lines = /^(.*\.(?:jsonl|ndjson))(?::([^/\\]+))?$/is.exec(argument);
  if (lines) return { path: lines[1], kind: 'json-lines', field: lines[2] ?? DEFAULT_FIELD };
  const table = /^(.*\.(csv|tsv))(?::([^/\\]+))?$/is.exec(argument);
  if (table) {
    if (table[3] === undefined) throw new RecipeError(`${argument}: name the column that holds the text, ${argument}:COLUMN`);
    return { path: table[1], kind: 'table', column: table[3], separator: table[2].toLowerCase() === 'csv' ? ',' : '\t' };
  }
  return { path: argument, kind: 'text' };
}

/** Every document of the files in order, empty ones left out. A plain file is one document, of at most `maxCharacters`. */
export async function* readDocuments(files: readonly TextFile[], maxCharacters = MAX_CHARACTERS): AsyncGenerator<string> {
  for (const file of files) yield* documentsOf(file, maxCharacters);
}

/**
 * All documents joined by single spaces, as the paper joins its text. Throws RecipeError when there is nothing but white space, or
 * more than `maxCharacters`.
 */
export async function readText(files: readonly TextFile[], maxCharacters = MAX_CHARACTERS): Promise<string> {
  const names = files.map((file) => file.path).join(', ');
  const text = await joined(names, readDocuments(files, maxCharacters), ' ', maxCharacters);
  if (text.trim() === '') throw new RecipeError(`${names}: no text in it`);
  return text;
}

/** The pieces as one string, which is refused before it is made when it would be too long. */
async function joined(names: string, pieces: AsyncIterable<string>, separator: string, maxCharacters: number): Promise<string> {
  const parts: string[] = [];
  let length = 0;
  for await (const piece of pieces) {
    length += piece.length + separator.length;
    if (length > maxCharacters) {
      throw new RecipeError(
        `${names}: more than the ${maxCharacters} characters of text that can be read at once; give less of it`,
      );
    }
    parts.push(piece);
  }
  return parts.join(separator);
}

/** A prompt with the answer to it, if there is one. */
export interface Prompt {
  readonly prompt: string;
  readonly response?: string;
}

/** A conversation. */
export interface Chat {
  readonly messages: readonly ChatMessage[];
}

/**
 * The documents of a file; a JSON line that has a `prompt` is one, and its `response` is kept apart; one that has `messages` is a
 * conversation, unless a field is named.
 */
export async function* readPrompts(file: TextFile): AsyncGenerator<Prompt | Chat | string> {
  if (file.kind !== 'json-lines') {
    yield* documentsOf(file, MAX_CHARACTERS);
    return;
  }
  let number = 0;
  for await (const line of textLines(file.path)) {
    number++;
    if (line.trim() === '') continue;
    const { prompt, response, messages } = objectOf(file.path, number, line);
    if (messages !== undefined && (file.field ?? DEFAULT_FIELD) === DEFAULT_FIELD)
      yield { messages: chatOf(file.path, number, messages) };
    else if (typeof prompt !== 'string') yield fieldOf(file.path, number, line, file.field ?? DEFAULT_FIELD);
    else if (response === undefined) yield { prompt };
    else if (typeof response === 'string') yield { prompt, response };
    else throw new FormatError(file.path, 'json-line-field-type', `line ${number} has a field "response" that is not a string`);
  }
}

async function* documentsOf(file: TextFile, maxCharacters: number): AsyncGenerator<string> {
  switch (file.kind) {
    case 'text': {
      const text = await joined(file.path, decodedParts(file.path), '', maxCharacters);
      if (text !== '') yield text;
      return;
    }
    case 'json-lines': {
      let number = 0;
      for await (const line of textLines(file.path)) {
        number++;
        if (line.trim() === '') continue;
        const text = fieldOf(file.path, number, line, file.field ?? DEFAULT_FIELD);
        if (text !== '') yield text;
      }
      return;
    }
    case 'table': {
      let column = -1;
      for await (const { cells, line } of parseTable(file.path, decodedParts(file.path), file.separator ?? ',')) {
        if (column < 0) {
          column = cells.indexOf(file.column ?? '');
          if (column < 0) {
            throw new RecipeError(
              `${file.path}: no column "${file.column}"; it has ${cells.map((cell) => `"${cell}"`).join(', ')}`,
            );
          }
          continue;
        }
        if (cells.length === 1 && cells[0] === '') continue;
        if (column >= cells.length) {
          throw new FormatError(
            file.path,
            'table-row-short',
            `line ${line} has ${cells.length} cells, but column "${file.column}" is number ${column + 1}`,
          );
        }
        if (cells[column] !== '') yield cells[column];
      }
      return;
    }
    default:
      file.kind satisfies never;
  }
}

/** The text of one JSON line. */
function fieldOf(path: string, number: number, line: string, field: string): string {
  const value = objectOf(path, number, line);
  const text = Object.hasOwn(value, field) ? value[field] : undefined;
  if (typeof text === 'string') return text;
  if (field !== DEFAULT_FIELD && isChat(text)) return text.map((message) => message.content).join('\n');
  const fields = Object.keys(value).slice(0, 8).join(', ');
  const rule = text === undefined ? 'json-line-field-missing' : 'json-line-field-type';
  const found = text === undefined ? `has no field "${field}"` : `has a field "${field}" that is not a string`;
  throw new FormatError(path, rule, `line ${number} ${found}; its fields are ${fields || 'none'}. Name one: ${path}:FIELD`);
}

function objectOf(path: string, number: number, line: string): Readonly<Record<string, unknown>> {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch (error) {
    throw new FormatError(path, 'json-line', `line ${number} is not JSON: ${(error as Error).message}`, { cause: error });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new FormatError(path, 'json-line-object', `line ${number} is not a JSON object`);
  }
  return value as Record<string, unknown>;
}

function chatOf(path: string, number: number, value: unknown): ChatMessage[] {
  const isMessage = (entry: unknown): entry is ChatMessage => {
    const { role, content } = (entry ?? {}) as Partial<ChatMessage>;
    return typeof role === 'string' && typeof content === 'string';
  };
  if (Array.isArray(value) && value.length > 0 && value.every(isMessage)) return value;
  throw new FormatError(path, 'json-line-messages', `line ${number}: "messages" is not a list of {role, content}, both texts`);
}

function isChat(value: unknown): value is { content: string }[] {
  return Array.isArray(value) && value.every((message) => typeof (message as { content?: unknown } | null)?.content === 'string');
}

/** Lines of a text file without their ends (LF or CRLF). Never more than one line and one part in memory. */
async function* textLines(path: string): AsyncGenerator<string> {
  let pending = '';
  for await (const part of decodedParts(path)) {
    const lines = (pending + part).split('\n');
    pending = lines.pop() ?? '';
    for (const line of lines) yield line.endsWith('\r') ? line.slice(0, -1) : line;
  }
  if (pending !== '') yield pending;
}

/** The file as UTF-8, a part at a time, without a byte order mark. Throws FormatError `utf-8`. */
async function* decodedParts(path: string): AsyncGenerator<string> {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let done = 0;
  const decode = (bytes?: Uint8Array): string => {
    try {
      return bytes ? decoder.decode(bytes, { stream: true }) : decoder.decode();
    } catch (error) {
      const where = bytes ? `in bytes ${done} to ${done + bytes.length}` : 'at the end';
      throw new FormatError(path, 'utf-8', `not UTF-8 text: an invalid sequence ${where}`, { cause: error });
    }
  };
  try {
    if ((await stat(path)).isDirectory()) throw new RecipeError(`${path}: is a folder, a text file is needed`);
    for await (const bytes of createReadStream(path) as AsyncIterable<Uint8Array>) {
      const text = decode(bytes);
      done += bytes.length;
      if (text !== '') yield text;
    }
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (error instanceof Error && 'syscall' in error) {
      throw new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be read (${code})`, { cause: error });
    }
    throw error;
  }
  const rest = decode();
  if (rest !== '') yield rest;
}
