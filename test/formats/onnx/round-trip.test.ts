import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { byteLengthOf, DTYPES } from '../../../formats/dtype.ts';
import { inlineInitializer } from '../../../formats/onnx/initializers.ts';
import type { Attribute, Graph, Initializer, Node, OnnxModel, ValueInfo } from '../../../formats/onnx/model.ts';
import { decodeOnnx } from '../../../formats/onnx/reader.ts';
import { encodeOnnx } from '../../../formats/onnx/writer.ts';
import {
  bytesOf,
  type Field,
  f32,
  initializer,
  lengthField,
  node,
  tensorType,
  valueInfo,
  varintField,
} from './encode-by-hand.ts';

const text = fc.string({ unit: 'grapheme', maxLength: 8 });
const dtype = fc.constantFrom(...DTYPES);
const unknown = (first: number): fc.Arbitrary<Uint8Array[]> =>
  fc.array(
    fc.tuple(fc.integer({ min: first, max: first + 1000 }), text).map(([number, value]) => bytesOf(lengthField(number, value))),
    { minLength: 1, maxLength: 3 },
  );
const withUnknown = <T extends object>(plain: fc.Arbitrary<T>): fc.Arbitrary<T & { unknown?: Uint8Array[] }> =>
  fc
    .tuple(plain, fc.option(unknown(100), { nil: undefined }))
    .map(([value, fields]) => (fields === undefined ? value : { ...value, unknown: fields }));

const tensor = fc
  .tuple(dtype, fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 3 }))
  .chain(([type, shape]) =>
    fc
      .uint8Array({ minLength: byteLengthOf(type, shape), maxLength: byteLengthOf(type, shape) })
      .map((data) => ({ dtype: type, shape, data })),
  );
const int = fc.oneof(
  fc.maxSafeInteger(),
  fc.bigInt(-(2n ** 63n), 2n ** 63n - 1n).filter((value) => !Number.isSafeInteger(Number(value))),
);
const float = fc.float({ noNaN: true });

const attribute: fc.Arbitrary<Attribute> = withUnknown(
  fc.oneof(
    fc.record({ kind: fc.constant('float' as const), value: float }),
    fc.record({ kind: fc.constant('int' as const), value: int }),
    fc.record({ kind: fc.constant('string' as const), value: text }),
    fc.record({ kind: fc.constant('tensor' as const), value: withUnknown(tensor) }),
    fc.record({ kind: fc.constant('floats' as const), value: fc.array(float, { maxLength: 4 }) }),
    fc.record({ kind: fc.constant('ints' as const), value: fc.array(int, { maxLength: 4 }) }),
    fc.record({ kind: fc.constant('strings' as const), value: fc.array(text, { maxLength: 4 }) }),
  ),
);
const value = (name: string): fc.Arbitrary<ValueInfo> =>
  withUnknown(
    fc.record({
      name: fc.constant(name),
      dtype: fc.option(dtype),
      shape: fc.option(fc.array(fc.oneof(fc.maxSafeInteger().map(Math.abs), text), { maxLength: 4 })),
    }),
  );

/** A graph whose nodes read what is before them: values of the graph itself and of those around it. */
function graph(depth: number, outer: readonly string[]): fc.Arbitrary<Graph> {
  const prefix = `d${depth}`;
  return fc.tuple(fc.nat(3), fc.nat(3), fc.nat(4)).chain(([inputCount, initializerCount, nodeCount]) => {
    const inputs = Array.from({ length: inputCount }, (_, i) => `${prefix}.in${i}`);
    const constants = Array.from({ length: initializerCount }, (_, i) => `${prefix}.w${i}`);
    const nodes: fc.Arbitrary<Node>[] = [];
    const visible = [...outer, ...inputs, ...constants];
    for (let i = 0; i < nodeCount; i++) {
      const readable = ['', ...visible];
      const subgraphs: fc.Arbitrary<Record<string, Graph>> =
        depth < 2 && i === 1
          ? fc.dictionary(
              text.filter((key) => key !== ''),
              graph(depth + 1, [...visible]),
              { maxKeys: 1 },
            )
          : fc.constant({});
      nodes.push(
        withUnknown(
          fc.record({
            name: text,
            op: text.map((op) => `Op${op}`),
            domain: fc.constantFrom('', 'com.microsoft', 'some.where'),
            inputs: fc.array(fc.constantFrom(...readable), { maxLength: 4 }),
            outputs: fc.constant<readonly string[]>([`${prefix}.v${i}`, '', `${prefix}.u${i}`]),
            attributes: fc
              .tuple(
                fc.dictionary(
                  text.filter((key) => key !== ''),
                  attribute,
                  { maxKeys: 3, noNullPrototype: true },
                ),
                subgraphs,
              )
              .map(([plain, graphs]) => ({
                ...plain,
                ...Object.fromEntries(
                  Object.entries(graphs).map(([key, inner]) => [key, { kind: 'graph' as const, value: inner }]),
                ),
              })),
          }),
        ),
      );
      visible.push(`${prefix}.v${i}`, `${prefix}.u${i}`);
    }
    return withUnknown(
      fc.record({
        name: text,
        nodes: fc.tuple(...nodes).map((each) => [...each]),
        inputs: fc.tuple(...inputs.map(value)).map((each) => [...each]),
        outputs: fc.tuple(...visible.slice(-2).map(value)).map((each) => [...each]),
        valueInfo: fc.array(value('any'), { maxLength: 2 }),
        initializers: fc
          .tuple(...constants.map((name) => tensor.map((each) => inlineInitializer(name, each.dtype, each.shape, each.data))))
          .map((each) => new Map(each.map((one): [string, Initializer] => [one.name, one]))),
      }),
    );
  });
}

const model: fc.Arbitrary<OnnxModel> = withUnknown(
  fc.record({
    irVersion: fc.integer({ min: 4, max: 13 }),
    opsets: fc
      .dictionary(text, fc.integer({ min: 1, max: 30 }), { minKeys: 1, maxKeys: 3 })
      .map((each) => new Map(Object.entries(each))),
    producerName: text,
    producerVersion: text,
    graph: graph(0, []),
    metadata: fc.dictionary(text, text, { maxKeys: 3 }).map((each) => new Map(Object.entries(each))),
  }),
);

/** Initializers by their bytes, so that graphs compare. */
async function comparable(plain: Graph): Promise<unknown> {
  const nodes = [];
  for (const each of plain.nodes) {
    const attributes = [];
    for (const [name, one] of Object.entries(each.attributes))
      attributes.push([name, one.kind === 'graph' ? { ...one, value: await comparable(one.value) } : one]);
    nodes.push({ ...each, attributes: attributes.sort(([a], [b]) => (String(a) < String(b) ? -1 : 1)) });
  }
  const initializers = [];
  for (const { name, dtype: type, shape, read } of plain.initializers.values())
    initializers.push([name, type, shape, await read()]);
  return { ...plain, nodes, initializers };
}

describe('an ONNX model that is written and read again', () => {
  it('is the same model', async () => {
    await fc.assert(
      fc.asyncProperty(model, async (original) => {
        const bytes = await encodeOnnx(original);
        const read = await decodeOnnx(bytes);
        expect({ ...read, graph: await comparable(read.graph) }).toEqual({
          ...original,
          graph: await comparable(original.graph),
        });
        expect(await encodeOnnx(read)).toEqual(bytes);
      }),
      { numRuns: 150 },
    );
  });

  it('keeps every field pcomp has no place for, byte for byte', async () => {
    const doc = (number: number): Field => lengthField(number, 'documentation');
    const property = (number: number): Field => lengthField(number, [lengthField(1, 'key'), lengthField(2, 'value')]);
    const anAttribute = (...fields: Field[]): Field => lengthField(5, fields);
    const sequence = lengthField(4, [lengthField(1, tensorType(1, [2]))]);
    const optional = lengthField(9, [lengthField(1, tensorType(1, [2]))]);
    const map = lengthField(5, [varintField(1, 7), lengthField(2, tensorType(8, []))]);
    const denoted = lengthField(1, [
      varintField(1, 1),
      lengthField(2, [lengthField(1, [varintField(1, 2), lengthField(3, 'DATA_BATCH')])]),
    ]);
    const tensors = lengthField(10, [varintField(1, 1), varintField(2, 1), lengthField(9, f32(1))]);
    const sparse = [
      lengthField(1, [varintField(1, 1), varintField(2, 1), lengthField(8, 'sparse'), lengthField(9, f32(1))]),
      lengthField(2, [varintField(2, 7)]),
      varintField(3, 9),
    ];
    const graphFields = [
      // Attributes of kinds without a place come after those with one; they are in their order here.
      lengthField(1, [
        lengthField(1, 'x'),
        lengthField(2, 'y'),
        lengthField(4, 'Op'),
        anAttribute(lengthField(1, 'axis'), varintField(3, 1), varintField(20, 2), doc(13)),
        lengthField(7, 'some.where'),
        anAttribute(lengthField(1, 'tensors'), tensors, varintField(20, 9)),
        anAttribute(lengthField(1, 'sparse'), lengthField(22, sparse), varintField(20, 11)),
        anAttribute(lengthField(1, 'type'), lengthField(14, tensorType(1, [])), varintField(20, 13)),
        anAttribute(lengthField(1, 'blob'), lengthField(4, Uint8Array.of(0xff, 0xfe)), varintField(20, 3)),
        anAttribute(
          lengthField(1, 'texts'),
          lengthField(5, [varintField(1, 1), varintField(2, 8), lengthField(6, 'text')]),
          varintField(20, 4),
        ),
        anAttribute(lengthField(1, 'reference'), varintField(20, 2), lengthField(21, 'outer')),
        doc(6),
        lengthField(8, 'overload'),
        property(9),
        lengthField(10, [lengthField(1, 'configuration'), varintField(3, 2)]),
        varintField(500, 7),
      ]),
      lengthField(2, 'g'),
      initializer('w', 1, [1], lengthField(9, f32(1)), doc(12), property(16)),
      valueInfo(11, 'x'),
      lengthField(12, [lengthField(1, 'y'), lengthField(2, [denoted]), doc(3), property(4)]),
      valueInfo(13, 'a', [sequence]),
      valueInfo(13, 'b', [optional]),
      valueInfo(13, 'c', [map]),
      valueInfo(13, 'd', [...tensorType(1, [2]), lengthField(6, 'IMAGE')]),
      valueInfo(13, 'e', tensorType(18, [2, 3])),
      initializer('strings', 8, [1], lengthField(6, 'text')),
      initializer('complex', 14, [1], lengthField(9, f32(1, 2))),
      initializer('float8', 20, [1], lengthField(9, Uint8Array.of(7))),
      doc(10),
      lengthField(14, [lengthField(1, 'x'), lengthField(2, [lengthField(1, 'SCALE_TENSOR'), lengthField(2, 's')])]),
      lengthField(15, sparse),
      property(16),
    ];
    const original = bytesOf(
      varintField(1, 13),
      lengthField(2, 'someone'),
      lengthField(7, graphFields),
      lengthField(8, [varintField(2, 26)]),
      property(14),
      lengthField(14, [lengthField(1, 'key'), lengthField(2, 'a second value')]),
      lengthField(4, 'org.example'),
      varintField(5, 3),
      doc(6),
      lengthField(20, [lengthField(1, [lengthField(2, 'training')]), property(3)]),
      lengthField(25, [lengthField(1, 'Function'), lengthField(4, 'in'), node('Neg', ['in'], ['out'])]),
      lengthField(26, [lengthField(1, 'configuration'), varintField(2, 4)]),
      lengthField(1000, 'the future'),
    );
    const read = await decodeOnnx(original);
    expect(Buffer.from(await encodeOnnx(read)).toString('latin1')).toBe(Buffer.from(original).toString('latin1'));
  });

  it('drops a type spelled in the file once it is no longer true', async () => {
    const denoted = [
      lengthField(1, [varintField(1, 1), lengthField(2, [lengthField(1, [varintField(1, 2), lengthField(3, 'DATA_BATCH')])])]),
    ];
    const read = await decodeOnnx(
      bytesOf(
        varintField(1, 8),
        lengthField(7, [node('Neg', ['x'], ['y']), valueInfo(11, 'x', denoted), valueInfo(12, 'y')]),
        lengthField(8, [varintField(2, 17)]),
      ),
    );
    const [x] = read.graph.inputs;
    expect(x).toMatchObject({ dtype: 'F32', shape: [2], encodedType: bytesOf(...denoted) });
    read.graph.inputs = [{ ...x, dtype: 'F16' }];
    expect((await decodeOnnx(await encodeOnnx(read))).graph.inputs).toEqual([{ name: 'x', dtype: 'F16', shape: [2] }]);
  });
});
