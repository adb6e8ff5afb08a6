/** The order of an input's columns as artifacts store it: one int32 a column, once per input. */
import { FormatError } from '../errors.ts';
import type { InputTransform } from '../methods/quantize/input-transform.ts';

/** Stored orders as read from `what` of a file. Throws FormatError `columns-order` unless they are a permutation of 0 to `columns` - 1. */
export function checkedOrder(path: string, what: string, values: Int32Array, columns: number): Uint32Array {
  const fail = (why: string) => new FormatError(path, 'columns-order', `${what} ${why}`);
  if (values.length !== columns) throw fail(`orders ${values.length} columns, its input has ${columns}`);
  const seen = new Uint8Array(columns);
  values.forEach((column, k) => {
    if (column < 0 || column >= columns) throw fail(`has ${column} at place ${k}, columns run from 0 to ${columns - 1}`);
    if (seen[column] === 1) throw fail(`has column ${column} twice`);
    seen[column] = 1;
  });
  return Uint32Array.from(values);
}

/** Whether nothing moves. */
export function isIdentity({ order }: InputTransform): boolean {
  return order === undefined || order.every((column, k) => column === k);
}

/** Whether two inputs, or the absence of a transform, are the same. */
export function sameTransform(a: InputTransform | undefined, b: InputTransform | undefined): boolean {
  if (a === undefined || b === undefined) return a === b;
  return a.hadamard === b.hadamard && sameValues(a.order, b.order) && sameValues(a.signs, b.signs);
}

function sameValues(a: Uint32Array | Uint8Array | undefined, b: Uint32Array | Uint8Array | undefined): boolean {
  return a?.length === b?.length && (a?.every((value, k) => value === b?.[k]) ?? true);
}
