/** Ways to make an initializer: from bytes in memory, from a tensor of a checkpoint, from anything that can read a byte range. */
import { byteLengthOf, elementCount } from '../dtype.ts';
import type { DType, TensorSource } from '../tensor.ts';
import type { Initializer } from './model.ts';

export interface InitializerHeader {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly unknown?: readonly Uint8Array[];
}

/**
 * An initializer whose bytes `fetch` reads on demand. `fetch` gets byte ranges within `[0, byteLength)`; what it returns is
 * not written to.
 */
export function lazyInitializer(
  header: InitializerHeader,
  fetch: (start: number, end: number) => Promise<Uint8Array>,
): Initializer {
  const byteLength = byteLengthOf(header.dtype, header.shape);
  return {
    ...header,
    byteLength,
    async read(start = 0, end = byteLength) {
      if (!(start >= 0 && start <= end && end <= byteLength)) {
        throw new RangeError(`initializer "${header.name}" has bytes [0, ${byteLength}), asked for [${start}, ${end})`);
      }
      return fetch(start, end);
    },
  };
}

/** An initializer held in memory. `bytes` are little-endian, packed for sub-byte types, and shared, not copied. Throws RangeError when their number is not that of the shape. */
export function inlineInitializer(name: string, dtype: DType, shape: readonly number[], bytes: Uint8Array): Initializer {
  const expected = byteLengthOf(dtype, shape);
  if (bytes.byteLength !== expected) {
    throw new RangeError(
      `initializer "${name}": ${dtype} [${shape.join(', ')}] takes ${expected} bytes, got ${bytes.byteLength}`,
    );
  }
  return lazyInitializer({ name, dtype, shape }, (start, end) => Promise.resolve(bytes.subarray(start, end)));
}

/**
 * An initializer whose bytes stay in a checkpoint, which must be open whenever it is read. A byte range costs the rows of the
 * first axis that it touches.
 * @param shape another shape of as many elements; the tensor's own when absent
 * @throws RangeError when the source has no such tensor, or when `shape` has another number of elements
 */
export function initializerFromSource(
  name: string,
  source: TensorSource,
  tensorName: string,
  shape?: readonly number[],
): Initializer {
  const info = source.tensors.get(tensorName);
  if (info === undefined) throw new RangeError(`${source.path} has no tensor "${tensorName}"`);
  if (shape !== undefined && elementCount(shape) !== elementCount(info.shape)) {
    throw new RangeError(
      `initializer "${name}": [${shape.join(', ')}] and [${info.shape.join(', ')}] differ in their number of elements`,
    );
  }
  const rows = info.shape[0] ?? 1;
  const rowBytes = info.byteLength / rows;
  // Rows of sub-byte types may begin inside a byte, and an empty tensor has no rows to speak of: those are read whole.
  const byRows = info.shape.length > 0 && rowBytes > 0 && rowBytes === byteLengthOf(info.dtype, info.shape.slice(1));
  return lazyInitializer({ name, dtype: info.dtype, shape: shape ?? info.shape }, async (start, end) => {
    if (start === end) return new Uint8Array(0);
    if (!byRows || (start === 0 && end === info.byteLength)) return (await source.read(tensorName)).data.subarray(start, end);
    const firstRow = Math.floor(start / rowBytes);
    const { data } = await source.readRows(tensorName, firstRow, Math.ceil(end / rowBytes));
    return data.subarray(start - firstRow * rowBytes, end - firstRow * rowBytes);
  });
}
