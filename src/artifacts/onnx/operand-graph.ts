/** The operations that unfold an operand stored at the true width of its codes. All of it is on constants: a runtime does it when it loads the model. */
import { text } from '../../graph/attributes.ts';
import type { GraphBuilder, Value } from '../../graph/builder.ts';
import { CODE_MASKS, placesOf, THREE_BIT_PLACES } from '../packing/squeezed.ts';
import type { OnnxPart } from './linear-layout.ts';

/** Pieces of a part as `squeeze` leaves them -> U8 (outFeatures, blocks, blockSize * operand bits / 8). */
export function operandOf(builder: GraphBuilder, part: OnnxPart, stored: readonly (readonly Value[])[]): Value {
  const unfolded = part.pieces.map(({ codeBits }, i) => {
    if (codeBits === part.bits) return stored[i][0];
    const quarters =
      codeBits === 3 ? threeBitQuarters(builder, stored[i]) : shifted(builder, stored[i][0], placesOf(codeBits, part.bits));
    return builder.concat(
      quarters.map((quarter) => masked(builder, quarter, CODE_MASKS[part.bits][codeBits])),
      -1,
    );
  });
  if (unfolded.length === 1) return unfolded[0];
  const joined = builder.concat(unfolded, 1);
  const order = part.pieces.flatMap(({ groups }) => groups);
  // Here rather than at the input: sorting blocks of constants costs nothing when the model runs.
  const places = part.groups.map((group) => order.indexOf(group));
  if (places.every((place, block) => place === block)) return joined;
  return builder.gather(joined, builder.constant('I32', places, [places.length]), 1);
}

// Every result stays in memory until the whole model is loaded, so there are as few and as small ones as possible: bytes, and no table of indices.

function threeBitQuarters(builder: GraphBuilder, stored: readonly Value[]): readonly Value[] {
  const [a, b, c] = stored.map((value, i) => right(builder, value, THREE_BIT_PLACES[i]));
  return [...stored, xor(builder, xor(builder, a, b), c)];
}

function shifted(builder: GraphBuilder, stored: Value, places: readonly number[]): readonly Value[] {
  return places.map((count) => (count === 0 ? stored : right(builder, stored, count)));
}

function masked(builder: GraphBuilder, value: Value, bits: number): Value {
  return builder.node1('BitwiseAnd', [value, builder.constant('U8', [bits], [])], value);
}

function right(builder: GraphBuilder, value: Value, places: number): Value {
  return builder.node1('BitShift', [value, builder.constant('U8', [places], [])], value, { direction: text('RIGHT') });
}

function xor(builder: GraphBuilder, a: Value, b: Value): Value {
  return builder.node1('BitwiseXor', [a, b], a);
}

/** Codes of a factor as `packFactor` leaves them, U8 (rank, bytes), and steps F32 (rank, 1) -> F32 (rank, length). */
export function factorOf(
  builder: GraphBuilder,
  { bits, length }: { readonly bits: 8 | 4; readonly length: number },
  stored: Value,
  scales: Value,
): Value {
  const both = bits === 8 ? stored : builder.concat([masked(builder, stored, 15), right(builder, stored, 4)], -1);
  const codes = both.shape[1] === length ? both : builder.slice(both, builder.vector([0]), builder.vector([length]), 1, length);
  const middle = builder.constant('F32', [2 ** (bits - 1)], [1, 1]);
  return builder.mul(builder.sub(builder.cast(codes, 'F32'), middle), scales);
}
