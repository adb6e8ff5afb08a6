/** mergekit's way of writing a parameter: a scalar, a gradient over the layers of a slice, or a list of filters (merging.md 3.4). */
import { RecipeError } from '../../../errors.ts';

type Scalar = number | boolean | string;
export type MergekitValue = Scalar | readonly Scalar[] | readonly MergekitCase[];

export interface MergekitCase {
  /** Part of a tensor's name; absent or `*`: any. */
  readonly filter?: string;
  readonly value: Scalar | readonly Scalar[];
}

/** Values by parameter. */
export type MergekitParameters = Readonly<Record<string, MergekitValue>>;

/** Checks what a file holds. @param where the place in the file, for messages */
export function readMergekitParameters(where: string, raw: unknown): MergekitParameters {
  if (raw === undefined || raw === null) return {};
  if (typeof raw !== 'object' || Array.isArray(raw)) throw new RecipeError(`${where}: a mapping of parameters is expected`);
  for (const [name, value] of Object.entries(raw)) checkValue(`${where}.${name}`, value);
  return raw as MergekitParameters;
}

function checkValue(where: string, value: unknown): void {
  if (isScalar(value)) return;
  if (!Array.isArray(value) || value.length === 0) {
    throw new RecipeError(`${where}: a number, a list of numbers over the layers, or a list of {filter, value} is expected`);
  }
  if (value.every(isScalar)) return;
  for (const [i, entry] of (value as unknown[]).entries()) {
    const { filter, value: own, ...rest } = (typeof entry === 'object' ? (entry ?? {}) : {}) as Record<string, unknown>;
    const fine = isScalar(own) || (Array.isArray(own) && own.length > 0 && own.every(isScalar));
    if (!fine || Object.keys(rest).length > 0 || (filter !== undefined && typeof filter !== 'string')) {
      throw new RecipeError(`${where}[${i}]: {filter, value} is expected, the value a number or a list of numbers`);
    }
  }
}

function isScalar(value: unknown): value is Scalar {
  return typeof value === 'number' || typeof value === 'boolean' || typeof value === 'string';
}

/** The value for a tensor at place `t` of its slice, 0 to 1; undefined where no filter takes the tensor. */
export function mergekitValueAt(value: MergekitValue, tensor: string, t: number): Scalar | undefined {
  if (isScalar(value)) return value;
  if (value.every(isScalar)) return along(value, t);
  const match = (value as readonly MergekitCase[]).find(
    ({ filter }) => filter === undefined || filter === '*' || tensor.includes(filter),
  );
  if (match === undefined) return undefined;
  return isScalar(match.value) ? match.value : along(match.value, t);
}

/** Between the neighbours where both are numbers, else the one at or before the place. */
function along(list: readonly Scalar[], t: number): Scalar {
  const u = t * (list.length - 1);
  const i = Math.floor(u);
  const [low, high] = [list[i], list[Math.min(i + 1, list.length - 1)]];
  return typeof low === 'number' && typeof high === 'number' ? low + (u - i) * (high - low) : low;
}
