/** A protobuf encoder that shares nothing with the product's: bytes are put together field by field, as the specification numbers them. */

/** One encoded field. */
export type Field = readonly number[];

export function varintField(number: number, value: number | bigint): Field {
  return [...varint(number << 3), ...varint(value)];
}

/** A string, bytes, or a message given as its fields. */
export function lengthField(number: number, value: string | Uint8Array | readonly Field[]): Field {
  const bytes =
    typeof value === 'string' ? [...Buffer.from(value, 'utf8')] : value instanceof Uint8Array ? [...value] : value.flat();
  return [...varint((number << 3) | 2), ...varint(bytes.length), ...bytes];
}

export function floatField(number: number, value: number): Field {
  return [...varint((number << 3) | 5), ...new Uint8Array(Float32Array.of(value).buffer)];
}

export function packedVarints(number: number, values: readonly (number | bigint)[]): Field {
  return lengthField(number, Uint8Array.from(values.flatMap(varint)));
}

export function varint(value: number | bigint): number[] {
  const bytes: number[] = [];
  let rest = BigInt.asUintN(64, BigInt(value));
  do {
    bytes.push(Number(rest & 0x7fn) | (rest > 0x7fn ? 0x80 : 0));
    rest >>= 7n;
  } while (rest > 0n);
  return bytes;
}

export function bytesOf(...fields: readonly Field[]): Uint8Array {
  return Uint8Array.from(fields.flat());
}

export const f32 = (...values: number[]): Uint8Array => new Uint8Array(Float32Array.from(values).buffer);

export const node = (op: string, inputs: readonly string[], outputs: readonly string[], ...more: Field[]): Field =>
  lengthField(1, [
    ...inputs.map((name) => lengthField(1, name)),
    ...outputs.map((name) => lengthField(2, name)),
    lengthField(4, op),
    ...more,
  ]);

/** A tensor type of element type `type` and a fixed shape. */
export const tensorType = (type: number, shape: readonly number[]): Field[] => [
  lengthField(1, [
    varintField(1, type),
    lengthField(
      2,
      shape.map((dim) => lengthField(1, [varintField(1, dim)])),
    ),
  ]),
];

export const valueInfo = (field: 11 | 12 | 13, name: string, type: readonly Field[] = tensorType(1, [2])): Field =>
  lengthField(field, [lengthField(1, name), lengthField(2, type)]);

export const initializer = (name: string, type: number, shape: readonly number[], ...data: Field[]): Field =>
  lengthField(5, [...shape.map((dim) => varintField(1, dim)), varintField(2, type), lengthField(8, name), ...data]);

export const externalEntry = (key: string, value: string): Field => lengthField(13, [lengthField(1, key), lengthField(2, value)]);

export const external = (entries: Readonly<Record<string, string>>): Field[] => [
  ...Object.entries(entries).map(([key, value]) => externalEntry(key, value)),
  varintField(14, 1),
];

export const IR_VERSION = varintField(1, 10);
export const OPSET = lengthField(8, [varintField(2, 21)]);

/** A model around the fields of its graph. */
export const model = (graph: readonly Field[], ...more: Field[]): Uint8Array =>
  bytesOf(IR_VERSION, lengthField(7, graph), OPSET, ...more);

/** y = x + w, w = [10, 20]. */
export const ADDITION: readonly Field[] = [
  node('Add', ['x', 'w'], ['y']),
  lengthField(2, 'g'),
  initializer('w', 1, [2], lengthField(9, f32(10, 20))),
  valueInfo(11, 'x'),
  valueInfo(12, 'y'),
];
