/** The fields of a request, one by one: each becomes a value of its type or a RecipeError that names the flag. */
import { RecipeError } from '../errors.ts';
import { parseSize } from './size.ts';

/** `groupSize` -> `--group-size`; `formats` is spelled `--format` on the command line. */
export function flag(key: string): string {
  if (key === 'formats') return '--format';
  return `--${key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

export function dropUndefined<T extends object>(request: T): T {
  return Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined)) as T;
}

export function number(key: string, value: unknown): number {
  const result = typeof value === 'string' && value.trim() !== '' ? Number(value) : value;
  if (typeof result !== 'number' || !Number.isFinite(result))
    throw new RecipeError(`${flag(key)} ${show(value)}: a number is expected`);
  return result;
}

export function range(key: string, value: unknown, low: number, high: number): number {
  const result = number(key, value);
  if (result >= low && result <= high) return result;
  const hint = key === 'bits' ? '. To keep a layer as it is, use --skip.' : '';
  throw new RecipeError(`${flag(key)} ${result}: must be within ${low}..${high}${hint}`);
}

export function integer(key: string, value: unknown, low: number, high: number): number {
  const result = number(key, value);
  if (!Number.isInteger(result)) throw new RecipeError(`${flag(key)} ${result}: must be a whole number`);
  return range(key, result, low, high);
}

export function boolean(key: string, value: unknown): boolean {
  if (typeof value !== 'boolean') throw new RecipeError(`${flag(key)} ${show(value)}: true or false is expected`);
  return value;
}

export function text(key: string, value: unknown): string {
  if (typeof value !== 'string' || value === '') throw new RecipeError(`${flag(key)} ${show(value)}: a text is expected`);
  return value;
}

export function list(key: string, value: unknown): string[] {
  const items = typeof value === 'string' ? value.split(',') : value;
  if (!Array.isArray(items)) throw new RecipeError(`${flag(key)} ${show(value)}: a list is expected`);
  return items.map((item) => text(key, item));
}

export function oneOf<const T extends string | number>(key: string, value: unknown, allowed: readonly T[]): T {
  const found = allowed.find((item) => item === value);
  if (found === undefined) throw new RecipeError(`${flag(key)} ${show(value)}: must be one of ${allowed.join(', ')}`);
  return found;
}

export function show(value: unknown): string {
  return typeof value === 'string' ? value : JSON.stringify(value);
}

/** Bytes: a number, or a size as people write it (`120MB`, `1.5 GiB`). */
export function bytes(key: string, value: unknown): number {
  const result = typeof value === 'string' ? parseSize(flag(key), value) : number(key, value);
  if (!(result > 0)) throw new RecipeError(`${flag(key)} ${show(value)}: a size above 0 is expected`);
  return result;
}

/** A part of a whole, above 0 and at most all of it: `5%`, or a number (0.05). */
export function part(key: string, value: unknown): number {
  const percent = typeof value === 'string' && value.trim().endsWith('%');
  const result = percent ? number(key, value.trim().slice(0, -1)) / 100 : number(key, value);
  if (result > 0 && result <= 1) return result;
  throw new RecipeError(`${flag(key)} ${show(value)}: a part above 0 % and at most 100 % is expected, e.g. 5% or 0.05`);
}
