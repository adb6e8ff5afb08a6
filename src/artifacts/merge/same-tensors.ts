/** Whether stored tensors are equal byte for byte, a bounded piece at a time. */
import type { TensorSource } from '../../../formats/tensor.ts';

const PIECE_BYTES = 4 * 1024 * 1024;

export interface StoredAt {
  readonly source: TensorSource;
  readonly name: string;
}

/** False too when dtype or shape differ. */
export async function sameBytes(one: StoredAt, other: StoredAt): Promise<boolean> {
  const [a, b] = [one, other].map(({ source, name }) => source.tensors.get(name));
  if (!a || !b || a.dtype !== b.dtype || a.shape.join() !== b.shape.join()) return false;
  if (a.shape.length === 0 || a.byteLength === 0)
    return equal((await one.source.read(a.name)).data, (await other.source.read(b.name)).data);
  const rows = Math.max(1, Math.floor(PIECE_BYTES / Math.max(1, a.byteLength / a.shape[0])));
  for (let start = 0; start < a.shape[0]; start += rows) {
    const end = Math.min(start + rows, a.shape[0]);
    const [x, y] = [await one.source.readRows(a.name, start, end), await other.source.readRows(b.name, start, end)];
    if (!equal(x.data, y.data)) return false;
  }
  return true;
}

function equal(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}
