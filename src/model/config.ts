/** Reads fields of a config.json: each is checked where it is read, and every complaint names the field, its value and the rule. */
import { FormatError, UnsupportedError } from '../errors.ts';

/** Larger sizes are refused as nonsense: no tensor of such a model could be addressed. */
const MAX_SIZE = 2 ** 31 - 1;
/** Most decoder layers a model may have; the deepest published ones have a few hundred. */
export const MAX_BLOCKS = 10_000;

export class ConfigReader {
  /** The file, for messages. */
  readonly path: string;
  /** The object as it was read. */
  readonly fields: Readonly<Record<string, unknown>>;
  readonly #prefix: string;

  /** @param prefix name of the enclosing field, for messages: `rope_scaling.` */
  constructor(value: unknown, path: string, prefix = '') {
    this.path = path;
    this.#prefix = prefix;
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      const what = prefix === '' ? 'the configuration' : `"${prefix.slice(0, -1)}"`;
      throw new FormatError(path, 'config-not-an-object', `${what} is ${show(value)}, it must be an object`);
    }
    this.fields = value as Record<string, unknown>;
  }

  /** Whether the field is there; null counts as absent, as it does for the libraries that write these files. */
  has(field: string): boolean {
    return Object.hasOwn(this.fields, field) && this.fields[field] !== null && this.fields[field] !== undefined;
  }

  /** A size or count: an integer of at least 1. */
  count(field: string, fallback?: number, max: number = MAX_SIZE): number {
    return this.#integer(field, fallback, 1, max);
  }

  /** An index: an integer of at least 0. */
  index(field: string, fallback?: number): number {
    return this.#integer(field, fallback, 0, MAX_SIZE);
  }

  /** A number above 0. */
  positive(field: string, fallback?: number): number {
    return this.#checked(field, fallback, 'a number above 0', isPositive);
  }

  /** true or false. */
  boolean(field: string, fallback?: boolean): boolean {
    return this.#checked(field, fallback, 'true or false', (value) => typeof value === 'boolean');
  }

  /** A string. */
  text(field: string, fallback?: string): string {
    return this.#checked(field, fallback, 'a string', (value) => typeof value === 'string');
  }

  /** A list of strings. */
  texts(field: string): readonly string[] {
    return this.#checked<readonly string[]>(field, undefined, 'a list of strings', isTexts);
  }

  /** A list of zeros and ones. */
  bits(field: string): readonly number[] {
    return this.#checked<readonly number[]>(field, undefined, 'a list of zeros and ones', isBits);
  }

  /** One of the keys of `choices`, mapped to its value. Others are refused by name. */
  choice<T>(field: string, choices: Readonly<Record<string, T>>, fallback?: string): T {
    const chosen = this.text(field, fallback);
    if (Object.hasOwn(choices, chosen)) return choices[chosen];
    throw this.unsupported(field, `supported: ${Object.keys(choices).join(', ')}`);
  }

  /** A nested object. */
  object(field: string): ConfigReader {
    return new ConfigReader(this.#required(field), this.path, `${this.#prefix}${field}.`);
  }

  /** The complaint that a field's value, though well formed, is not supported. */
  unsupported(field: string, why: string): UnsupportedError {
    return new UnsupportedError(`${this.path}: "${this.#prefix}${field}" is ${show(this.fields[field])}; ${why}`);
  }

  /** The complaint that a field breaks a rule. */
  broken(rule: string, field: string, why: string): FormatError {
    return new FormatError(this.path, rule, `"${this.#prefix}${field}" is ${show(this.fields[field])}, ${why}`);
  }

  #integer(field: string, fallback: number | undefined, min: number, max: number): number {
    const accepts = (value: unknown): boolean => Number.isInteger(value) && Number(value) >= min && Number(value) <= max;
    return this.#checked(field, fallback, `an integer from ${min} to ${max}`, accepts);
  }

  #required(field: string): unknown {
    if (this.has(field)) return this.fields[field];
    throw new FormatError(this.path, 'config-field-missing', `"${this.#prefix}${field}" is missing`);
  }

  #checked<T>(field: string, fallback: T | undefined, rule: string, accepts: (value: unknown) => boolean): T {
    if (!this.has(field) && fallback !== undefined) return fallback;
    const value = this.#required(field);
    if (accepts(value)) return value as T;
    throw this.broken('config-field-value', field, `it must be ${rule}`);
  }
}

function isPositive(value: unknown): boolean {
  return typeof value === 'number' && Number.isFinite(value) && value > 0;
}

function isTexts(value: unknown): boolean {
  return Array.isArray(value) && value.every((entry) => typeof entry === 'string');
}

function isBits(value: unknown): boolean {
  return Array.isArray(value) && value.every((entry) => entry === 0 || entry === 1);
}

/** A value as JSON, cut to a line. */
function show(value: unknown): string {
  const json = JSON.stringify(value) ?? String(value);
  return json.length > 60 ? `${json.slice(0, 57)}...` : json;
}
