/** Arithmetic on dimensions that may be numbers or names: `batch_size`, `2*sequence_length`, `past+sequence`. */
import type { Dim } from '../../formats/onnx/model.ts';

/** A graph was put together wrongly: shapes or dtypes that do not fit, a name used twice. Always a bug of the caller. */
export class GraphError extends Error {
  override get name(): string {
    return 'GraphError';
  }
}

export type Shape = readonly Dim[];

/** `[batch_size, 4, 16]` */
export function formatShape(shape: Shape): string {
  return `[${shape.join(', ')}]`;
}

/** True when both have the same numbers and the same names in the same places. */
export function sameShape(a: Shape, b: Shape): boolean {
  return a.length === b.length && a.every((dim, i) => dim === b[i]);
}

/** `a + b`, as a number when both are, else as the name of the sum. */
export function addDims(a: Dim, b: Dim): Dim {
  if (typeof a === 'number' && typeof b === 'number') return a + b;
  if (a === 0) return b;
  if (b === 0) return a;
  return `${a}+${b}`;
}

/** `a * b`, as a number when both are, else as the name of the product. */
export function multiplyDims(a: Dim, b: Dim): Dim {
  if (typeof a === 'number' && typeof b === 'number') return a * b;
  if (a === 1) return b;
  if (b === 1) return a;
  if (a === 0 || b === 0) return 0;
  return `${a}*${b}`;
}

/** Product of all dimensions; 1 for a scalar. */
export function elementCount(shape: Shape): Dim {
  return shape.reduce(multiplyDims, 1);
}

/**
 * Shape of an elementwise result. Axes align at the end; 1 stretches; anything else must be equal, and a name equals
 * only itself: what cannot be checked now would fail at run time, far from its cause.
 */
export function broadcastShapes(a: Shape, b: Shape): Shape | undefined {
  const rank = Math.max(a.length, b.length);
  const shape: Dim[] = [];
  for (let i = 0; i < rank; i++) {
    const x = a[a.length - rank + i] ?? 1;
    const y = b[b.length - rank + i] ?? 1;
    if (x !== y && x !== 1 && y !== 1) return undefined;
    shape.push(x === 1 ? y : x);
  }
  return shape;
}

/** Axis counted from the front; accepts negative ones, as ONNX does. */
export function normalizeAxis(axis: number, rank: number, op: string): number {
  const index = axis < 0 ? axis + rank : axis;
  if (!Number.isInteger(index) || index < 0 || index >= rank) {
    throw new GraphError(`${op}: axis ${axis} is outside a tensor of rank ${rank}`);
  }
  return index;
}
