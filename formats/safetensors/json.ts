/**
 * JSON as untrusted headers need it read: `JSON.parse` silently keeps the last of two equal keys and turns `__proto__` into
 * something else than a key, so objects become Maps here, and a key given twice is an error.
 */

export type Json = string | number | boolean | null | readonly Json[] | ReadonlyMap<string, Json>;

/** Why a text was refused; `depth` is the number of objects and arrays around the place. */
export class JsonError extends Error {
  readonly kind: 'syntax' | 'duplicate-key' | 'reserved-key';
  readonly depth: number;
  constructor(kind: JsonError['kind'], depth: number, message: string) {
    super(message);
    this.kind = kind;
    this.depth = depth;
  }
}

// The files read here nest 3 deep; the bound keeps a hostile "[[[[..." from exhausting the stack.
const MAX_DEPTH = 32;

const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const LONE_SURROGATE = /\p{Surrogate}/u;

/** Parses a whole text. Throws JsonError. */
export function parseJson(text: string): Json {
  return new Parser(text).parse();
}

class Parser {
  readonly #text: string;
  #at = 0;
  #depth = 0;

  constructor(text: string) {
    this.#text = text;
  }

  parse(): Json {
    const value = this.#value();
    this.#skipSpace();
    if (this.#at < this.#text.length) this.#fail('the end');
    return value;
  }

  #value(): Json {
    this.#skipSpace();
    switch (this.#text[this.#at]) {
      case '{':
        return this.#nested(() => this.#object());
      case '[':
        return this.#nested(() => this.#array());
      case '"':
        return this.#string();
      case 't':
        return this.#word('true', true);
      case 'f':
        return this.#word('false', false);
      case 'n':
        return this.#word('null', null);
      default:
        return this.#number();
    }
  }

  #nested<T>(read: () => T): T {
    this.#depth += 1;
    if (this.#depth > MAX_DEPTH) this.#fail(`at most ${MAX_DEPTH} levels of nesting`);
    this.#at += 1;
    const value = read();
    this.#depth -= 1;
    return value;
  }

  #object(): ReadonlyMap<string, Json> {
    const members = new Map<string, Json>();
    if (this.#take('}')) return members;
    do {
      this.#skipSpace();
      if (this.#text[this.#at] !== '"') this.#fail('a key in double quotes');
      const key = this.#string();
      if (key === '__proto__') {
        throw new JsonError(
          'reserved-key',
          this.#depth,
          `the key "__proto__" is not allowed: other readers would take it for something else`,
        );
      }
      if (members.has(key)) throw new JsonError('duplicate-key', this.#depth, `the key ${JSON.stringify(key)} is given twice`);
      if (!this.#take(':')) this.#fail('":"');
      members.set(key, this.#value());
    } while (this.#take(','));
    if (!this.#take('}')) this.#fail('"," or "}"');
    return members;
  }

  #array(): readonly Json[] {
    const items: Json[] = [];
    if (this.#take(']')) return items;
    do items.push(this.#value());
    while (this.#take(','));
    if (!this.#take(']')) this.#fail('"," or "]"');
    return items;
  }

  #string(): string {
    const text = this.#text;
    const start = this.#at + 1;
    let escaped = false;
    let at = start;
    for (;;) {
      const code = text.charCodeAt(at);
      if (code === 0x22) break;
      if (!(code >= 0x20)) this.#fail('a closed string without control characters', at); // NaN at the end of the text
      if (code === 0x5c) {
        escaped = true;
        at += 1;
      }
      at += 1;
    }
    this.#at = at + 1;
    return escaped ? this.#unescape(start, at) : text.slice(start, at);
  }

  #unescape(start: number, end: number): string {
    let value: string;
    try {
      value = JSON.parse(this.#text.slice(start - 1, end + 1)) as string;
    } catch {
      return this.#fail('a string with valid escapes', start);
    }
    // Half a surrogate pair is no character and has no UTF-8: such a name could never be written again.
    if (LONE_SURROGATE.test(value)) this.#fail('a string without lone surrogates', start);
    return value;
  }

  #number(): number {
    NUMBER.lastIndex = this.#at;
    const match = NUMBER.exec(this.#text);
    if (match === null) return this.#fail('a value');
    this.#at = NUMBER.lastIndex;
    return Number(match[0]);
  }

  #word<T>(word: string, value: T): T {
    if (!this.#text.startsWith(word, this.#at)) this.#fail('a value');
    this.#at += word.length;
    return value;
  }

  #take(character: string): boolean {
    this.#skipSpace();
    if (this.#text[this.#at] !== character) return false;
    this.#at += 1;
    return true;
  }

  #skipSpace(): void {
    const text = this.#text;
    for (;;) {
      const code = text.charCodeAt(this.#at);
      if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) return;
      this.#at += 1;
    }
  }

  #fail(expected: string, at = this.#at): never {
    const found = at < this.#text.length ? JSON.stringify(this.#text.slice(at, at + 12)) : 'the end';
    throw new JsonError('syntax', this.#depth, `expected ${expected} at character ${at}, found ${found}`);
  }
}
