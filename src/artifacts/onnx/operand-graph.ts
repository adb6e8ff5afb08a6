/** The operation that unfolds an operand stored at the true width of its codes. All of it is on constants: a runtime does it when it loads the model. */
import { text } from '../../graph/attributes.ts';
import type { GraphBuilder, Value } from '../../graph/builder.ts';
import { ONE_BIT_MASK, THREE_BIT_MASK } from '../packing/squeezed.ts';
import type { CodeBits } from './linear-layout.ts';

/** `stored` as `squeezeThree` or `squeezeOne` leaves it -> U8 (outFeatures, blocks, blockSize * operand bits / 8). */
export function operandOf(builder: GraphBuilder, codeBits: CodeBits, stored: readonly Value[]): Value {
  // Every result stays in memory until the whole model is loaded, so there are as few and as small ones as possible: bytes, and no table of indices.
  const byte = (value: number): Value => builder.constant('U8', [value], []);
  const mask = (value: Value, bits: number): Value => builder.node1('BitwiseAnd', [value, byte(bits)], value);
  const right = (value: Value, places: number): Value =>
    builder.node1('BitShift', [value, byte(places)], value, { direction: text('RIGHT') });
  const xor = (a: Value, b: Value): Value => builder.node1('BitwiseXor', [a, b], a);
  if (codeBits === 3) {
    const [s0, s1, s2] = stored;
    const fourth = xor(xor(right(s0, 3), right(s1, 2)), right(s2, 1));
    return builder.concat(
      [s0, s1, s2, fourth].map((quarter) => mask(quarter, THREE_BIT_MASK)),
      -1,
    );
  }
  if (codeBits !== 1) return stored[0];
  return builder.concat([mask(stored[0], ONE_BIT_MASK), mask(right(stored[0], 1), ONE_BIT_MASK)], -1);
}
