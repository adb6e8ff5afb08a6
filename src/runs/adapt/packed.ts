/** Plain data with arrays of numbers in it, as JSON and the tensors that stand in it by name: numbers as text are ten times as long, and a string has an end. */
import type { TensorSource } from '../../../formats/tensor.ts';

const ARRAYS = { F32: Float32Array, F64: Float64Array, I32: Int32Array, U8: Uint8Array } as const;
export type PackedDtype = keyof typeof ARRAYS;
export type PackedArray = InstanceType<(typeof ARRAYS)[PackedDtype]>;

/** What stands for an array; an empty one has no tensor. */
interface Placeholder {
  readonly tensor: string;
  readonly dtype: PackedDtype;
  readonly length: number;
}

export function dtypeOf(value: unknown): PackedDtype | undefined {
  return (Object.keys(ARRAYS) as PackedDtype[]).find((dtype) => value instanceof ARRAYS[dtype]);
}

/** `value` with every typed array moved to `tensors`, by where it stood: `modules/3/parameters/0/values`. */
export function pack(value: unknown, tensors: Map<string, PackedArray>, path = ''): unknown {
  const dtype = dtypeOf(value);
  if (dtype !== undefined) {
    const array = value as PackedArray;
    if (array.length > 0) tensors.set(path, array);
    return { tensor: path, dtype, length: array.length } satisfies Placeholder;
  }
  const inner = (key: string | number, own: unknown) => pack(own, tensors, path === '' ? `${key}` : `${path}/${key}`);
  if (Array.isArray(value)) return value.map((own, i) => inner(i, own));
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, own]) => [key, inner(key, own)]));
}

/** What was packed, each array in memory of its own. */
export async function unpack(value: unknown, tensors: TensorSource): Promise<unknown> {
  if (typeof value !== 'object' || value === null) return value;
  if ('tensor' in value && 'dtype' in value) {
    const { tensor, dtype, length } = value as Placeholder;
    if (length === 0) return new ARRAYS[dtype]();
    return new ARRAYS[dtype]((await tensors.read(tensor)).data.slice().buffer);
  }
  if (Array.isArray(value)) {
    const list: unknown[] = [];
    for (const own of value) list.push(await unpack(own, tensors));
    return list;
  }
  const found: Record<string, unknown> = {};
  for (const [key, own] of Object.entries(value)) found[key] = await unpack(own, tensors);
  return found;
}
