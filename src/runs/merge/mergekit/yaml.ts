/** Shapes that a mergekit file must have. `where` stands in front of every message. */
import { RecipeError } from '../../../errors.ts';

/** @param known keys; any other is refused */
export function mapping(where: string, raw: unknown, known: readonly string[]): Record<string, unknown> {
  const object = anyMapping(where, raw);
  const unknown = Object.keys(object).filter((key) => !known.includes(key));
  if (unknown.length > 0) {
    throw new RecipeError(`${where}: ${unknown.join(', ')}: pcomp follows ${known.join(', ')} here, and nothing else`);
  }
  return object;
}

export function anyMapping(where: string, raw: unknown): Record<string, unknown> {
  if (typeof raw !== 'object' || raw === null || Array.isArray(raw)) throw new RecipeError(`${where}: a mapping is expected`);
  return raw as Record<string, unknown>;
}

export function list(where: string, raw: unknown): readonly unknown[] {
  if (Array.isArray(raw) && raw.length > 0) return raw as readonly unknown[];
  throw new RecipeError(`${where}: a list with at least one entry is expected`);
}

export function string(where: string, raw: unknown): string {
  if (typeof raw === 'string' && raw !== '') return raw;
  throw new RecipeError(`${where}: a text is expected, and it is ${JSON.stringify(raw) ?? 'absent'}`);
}

/** Local paths only: pcomp downloads nothing. */
export function modelPath(where: string, raw: unknown): string {
  const path = string(where, raw);
  if (path.includes('+')) {
    throw new RecipeError(
      `${where} ${path}: model+adapter is not taken; name the adapter folder as a model, with its base as base_model`,
    );
  }
  return path;
}
