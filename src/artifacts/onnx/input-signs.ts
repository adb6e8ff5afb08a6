/** Signs of an input's columns in a graph: stored as bits, which a runtime makes factors of once, when it loads the model. */
import type { GraphBuilder, Value } from '../../graph/builder.ts';

/** Columns whose bits lie in one byte: as many as divide `columns`, so that no byte is cut. */
export function signsPerByte(columns: number): number {
  return [8, 4, 2].find((count) => columns % count === 0) ?? 1;
}

/** (bytes, 1): column k is bit `k mod signsPerByte` of its byte, least significant first. */
export function packSignBytes(signs: Uint8Array): Uint8Array {
  const count = signsPerByte(signs.length);
  const bytes = new Uint8Array(signs.length / count);
  signs.forEach((sign, k) => {
    bytes[Math.floor(k / count)] |= sign << (k % count);
  });
  return bytes;
}

/** F32 (columns): -1 where the bit is set, else 1. @param stored U8 (bytes, 1) */
export function signsOf(builder: GraphBuilder, stored: Value, columns: number): Value {
  const count = signsPerByte(columns);
  const masks = builder.constant(
    'U8',
    Array.from({ length: count }, (_, k) => 1 << k),
    [1, count],
  );
  const bits = builder.node1('BitwiseAnd', [stored, masks], { dtype: 'U8', shape: [columns / count, count] });
  const turned = builder.where(builder.cast(bits, 'BOOL'), builder.scalar('F32', -1), builder.scalar('F32', 1));
  return builder.reshape(turned, [columns]);
}
