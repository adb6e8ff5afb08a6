/** A model's chat template: messages of a conversation as the one text that the model was trained on. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { EnvironmentError, FormatError, UnsupportedError } from '../errors.ts';

/** A message of a conversation. */
export interface ChatMessage {
  /** `system`, `user`, `assistant`, or what else the template knows. */
  readonly role: string;
  readonly content: string;
}

export class ChatTemplate {
  /** The file it was read from; used in messages. */
  readonly path: string;
  readonly #render: (context: Record<string, unknown>) => string;
  /** `bos_token`, `eos_token`, ... as they are written. */
  readonly #tokens: Readonly<Record<string, string>>;

  private constructor(
    path: string,
    render: (context: Record<string, unknown>) => string,
    tokens: Readonly<Record<string, string>>,
  ) {
    this.path = path;
    this.#render = render;
    this.#tokens = tokens;
  }

  /** @param tokens special tokens that the template may name. Throws UnsupportedError for a template that uses what is not rendered. */
  static async parse(path: string, source: string, tokens: Readonly<Record<string, string>> = {}): Promise<ChatTemplate> {
    const { Template } = await import('@huggingface/jinja');
    try {
      // Without a clock, a template that can do without takes the date it was written with, and the same conversation is the same text tomorrow.
      const template = new Template(source.replaceAll('strftime_now', 'absent_clock'));
      return new ChatTemplate(path, (context) => template.render(context), tokens);
    } catch (error) {
      throw new UnsupportedError(`${path}: its chat template cannot be followed: ${firstLine(error)}`, { cause: error });
    }
  }

  /**
   * The conversation as text. @param opens whether the text ends where the assistant's next message begins
   * @throws UnsupportedError for what the template refuses, or uses and is not rendered
   */
  render(messages: readonly ChatMessage[], opens: boolean): string {
    try {
      return this.#render({
        ...this.#tokens,
        messages,
        add_generation_prompt: opens,
      });
    } catch (error) {
      const roles = messages.map(({ role }) => role).join(', ');
      throw new UnsupportedError(
        `${this.path}: its chat template does not take this conversation (${roles}): ${firstLine(error)}`,
        { cause: error },
      );
    }
  }
}

/** The chat template of a model folder, ready to render; undefined when there is none. */
export async function loadChatTemplate(folder: string): Promise<ChatTemplate | undefined> {
  const found = await readChatTemplate(folder);
  if (found === undefined) return undefined;
  const config = await readObject(join(folder, 'tokenizer_config.json'));
  return ChatTemplate.parse(found.path, found.source, specialTokens(config ?? {}));
}

/**
 * The text of it, and the file: chat_template.jinja, chat_template.json or tokenizer_config.json, the first that has one. Of several with names
 * it is the one called `default`.
 */
export async function readChatTemplate(folder: string): Promise<{ readonly path: string; readonly source: string } | undefined> {
  const own = join(folder, 'chat_template.jinja');
  const text = await readText(own);
  if (text !== undefined) return { path: own, source: text };
  const configPath = join(folder, 'tokenizer_config.json');
  const jsonPath = join(folder, 'chat_template.json');
  for (const [path, object] of [
    [jsonPath, await readObject(jsonPath)],
    [configPath, await readObject(configPath)],
  ] as const) {
    const source = sourceOf(path, object?.['chat_template']);
    if (source !== undefined) return { path, source };
  }
  return undefined;
}

function sourceOf(path: string, value: unknown): string | undefined {
  if (value === undefined || value === null) return undefined;
  if (typeof value === 'string') return value;
  if (Array.isArray(value)) {
    const named = (value as { name?: unknown; template?: unknown }[]).find((entry) => entry?.name === 'default');
    if (typeof named?.template === 'string') return named.template;
  }
  throw new FormatError(path, 'chat-template', '"chat_template" is neither a text nor a list with one called "default"');
}

/** `bos_token` and all else that ends in `_token`: a text, or an added token with its text in `content`. */
function specialTokens(config: Readonly<Record<string, unknown>>): Record<string, string> {
  const tokens: Record<string, string> = {};
  for (const [name, value] of Object.entries(config)) {
    if (!name.endsWith('_token')) continue;
    const text = typeof value === 'string' ? value : (value as { content?: unknown } | null)?.content;
    if (typeof text === 'string') tokens[name] = text;
  }
  return tokens;
}

async function readText(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be read (${code})`, { cause: error });
  }
}

async function readObject(path: string): Promise<Readonly<Record<string, unknown>> | undefined> {
  const text = await readText(path);
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FormatError(path, 'chat-template-json', `not JSON: ${firstLine(error)}`, { cause: error });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new FormatError(path, 'chat-template-json', 'not a JSON object');
  }
  return value as Record<string, unknown>;
}

function firstLine(error: unknown): string {
  return String((error as Error).message).split('\n', 1)[0];
}
