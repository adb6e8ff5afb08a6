import { mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openOnnx } from '../../../formats/onnx/reader.ts';
import { EnvironmentError, FormatError, UnsupportedError } from '../../../src/errors.ts';
import {
  ADDITION,
  bytesOf,
  external,
  type Field,
  f32,
  floatField,
  IR_VERSION,
  initializer,
  lengthField,
  model,
  node,
  OPSET,
  packedVarints,
  tensorType,
  valueInfo,
  varint,
  varintField,
} from './encode-by-hand.ts';

/** A graph of one output, whose initializer `w` is the given one. */
const withInitializer = (...fields: Field[]): Uint8Array =>
  model([node('Identity', ['w'], ['y']), ...fields, valueInfo(12, 'y')]);
/** An initializer of two floats with the given data fields. */
const twoFloats = (...data: Field[]): Uint8Array => withInitializer(initializer('w', 1, [2], ...data));
const withNodes = (...nodes: Field[]): Uint8Array => model([...nodes, valueInfo(11, 'x'), valueInfo(12, 'y')]);
const attribute = (...fields: Field[]): Field => lengthField(5, fields);
const VALID = model(ADDITION);

function nested(depth: number): Field[] {
  const inner = depth === 0 ? [node('Identity', ['x'], ['y'])] : nested(depth - 1);
  return [
    node(
      'If',
      ['x'],
      ['y'],
      attribute(lengthField(1, 'then_branch'), lengthField(6, [...inner, valueInfo(12, 'y')]), varintField(20, 5)),
    ),
  ];
}

/** Rule -> files that break it and nothing else. */
const MALFORMED: Readonly<Record<string, Readonly<Record<string, Uint8Array>>>> = {
  'file-empty': { 'empty.onnx': new Uint8Array(0) },
  'not-protobuf': {
    'text.onnx': Buffer.from('{"this": "is JSON"}'),
    'field-number-zero.onnx': Uint8Array.of(0x02, 0x00),
    'graph-is-a-number.onnx': bytesOf(IR_VERSION, varintField(7, 1), OPSET),
    'endless-varint.onnx': new Uint8Array(64).fill(0xff),
    'group.onnx': bytesOf(IR_VERSION, [...varint((9 << 3) | 3)]),
  },
  truncated: {
    'cut-in-the-graph.onnx': VALID.subarray(0, VALID.length - 30),
    'cut-in-a-varint.onnx': bytesOf(lengthField(7, ADDITION), [0x08, 0x80]),
  },
  'graph-missing': { 'no-graph.onnx': bytesOf(IR_VERSION, OPSET) },
  'graph-twice': { 'two-graphs.onnx': bytesOf(IR_VERSION, lengthField(7, ADDITION), lengthField(7, ADDITION), OPSET) },
  'ir-version-missing': { 'no-ir-version.onnx': bytesOf(lengthField(7, ADDITION), OPSET) },
  'ir-version-invalid': { 'ir-version-zero.onnx': bytesOf(varintField(1, 0), lengthField(7, ADDITION), OPSET) },
  'opset-missing': { 'no-opset.onnx': bytesOf(IR_VERSION, lengthField(7, ADDITION)) },
  'opset-twice': { 'two-opsets.onnx': model(ADDITION, lengthField(8, [lengthField(1, 'ai.onnx'), varintField(2, 20)])) },
  'opset-version-missing': { 'opset-without-version.onnx': model(ADDITION, lengthField(8, [lengthField(1, 'com.microsoft')])) },
  'opset-version-invalid': {
    'opset-zero.onnx': model(ADDITION, lengthField(8, [lengthField(1, 'com.microsoft'), varintField(2, 0)])),
  },
  'message-overruns-parent': {
    'initializer-overruns-graph.onnx': model([[...varint((5 << 3) | 2), 50, 8, 1]]),
    'raw-data-overruns-tensor.onnx': withInitializer(
      lengthField(5, [varintField(2, 1), lengthField(8, 'w'), [...varint((9 << 3) | 2), 99]]),
    ),
  },
  'malformed-message': {
    'node-overruns-graph.onnx': model([lengthField(1, [[0x0a, 0x7f]]), valueInfo(12, 'y')]),
    'raw-data-is-a-number.onnx': twoFloats(varintField(9, 7)),
    'fixed-width-int32-data.onnx': withInitializer(initializer('w', 6, [1], floatField(5, 1))),
    'unfinished-int64-data.onnx': withInitializer(initializer('w', 7, [1], lengthField(7, Uint8Array.of(1, 0x80)))),
  },
  'name-not-utf8': { 'latin1-name.onnx': model([...ADDITION, lengthField(1, [lengthField(4, Uint8Array.of(0xe9, 0x28))])]) },
  'name-too-long': { 'endless-name.onnx': model([...ADDITION, node('Identity', ['x'], ['z'.repeat(70_000)])]) },
  'initializer-without-name': { 'nameless-initializer.onnx': withInitializer(initializer('', 1, [1], lengthField(9, f32(1)))) },
  'initializer-twice': {
    'initializer-twice.onnx': model([...ADDITION, initializer('w', 1, [1], lengthField(9, f32(1)))]),
    'dense-and-sparse.onnx': model([...ADDITION, lengthField(15, [lengthField(1, [lengthField(8, 'w')])])]),
  },
  'rank-too-high': { 'rank-65.onnx': withInitializer(initializer('w', 1, Array(65).fill(1), lengthField(9, f32(1)))) },
  'dimension-negative': { 'negative-dimension.onnx': withInitializer(initializer('w', 1, [-2], lengthField(9, f32(1, 2)))) },
  'shape-overflow': {
    'absurd-shape.onnx': withInitializer(initializer('w', 1, [2 ** 40, 2 ** 40], lengthField(9, f32(1)))),
    'absurd-dimension.onnx': withInitializer(lengthField(5, [varintField(1, 2n ** 60n), varintField(2, 1), lengthField(8, 'w')])),
  },
  'data-type-unknown': {
    'data-type-99.onnx': withInitializer(initializer('w', 99, [2], lengthField(9, f32(1, 2)))),
    'no-data-type.onnx': withInitializer(lengthField(5, [lengthField(8, 'w'), lengthField(9, f32(1))])),
    'value-of-type-99.onnx': model([...ADDITION, valueInfo(13, 'v', tensorType(99, []))]),
  },
  'data-missing': { 'no-data.onnx': twoFloats() },
  'data-twice': {
    'raw-and-typed.onnx': twoFloats(lengthField(9, f32(1, 2)), lengthField(4, f32(1, 2))),
    'raw-and-external.onnx': twoFloats(lengthField(9, f32(1, 2)), ...external({ location: 'weights.bin' })),
  },
  'data-size-mismatch': {
    'raw-data-short.onnx': twoFloats(lengthField(9, f32(1))),
    'float-data-long.onnx': twoFloats(lengthField(4, f32(1, 2, 3))),
    'int64-data-short.onnx': withInitializer(initializer('w', 7, [3], packedVarints(7, [1, -1]))),
    'external-length.onnx': twoFloats(...external({ location: 'weights.bin', length: '12' })),
  },
  'data-field-wrong': { 'floats-in-int32-data.onnx': twoFloats(packedVarints(5, [1, 2])) },
  'value-out-of-range': {
    'uint8-of-256.onnx': withInitializer(initializer('w', 2, [1], packedVarints(5, [256]))),
    'int8-of-minus-129.onnx': withInitializer(initializer('w', 3, [1], packedVarints(5, [-129]))),
    'bool-of-2.onnx': withInitializer(initializer('w', 9, [1], packedVarints(5, [2]))),
  },
  'data-location-unknown': { 'data-location-2.onnx': twoFloats(lengthField(9, f32(1, 2)), varintField(14, 2)) },
  'external-location-missing': { 'external-nowhere.onnx': twoFloats(...external({ offset: '0' })) },
  'external-path-escapes': {
    'parent-folder.onnx': twoFloats(...external({ location: '../weights.bin' })),
    'inner-parent-folder.onnx': twoFloats(...external({ location: 'a/../../weights.bin' })),
    'absolute.onnx': twoFloats(...external({ location: '/etc/hostname' })),
    'drive.onnx': twoFloats(...external({ location: 'C:weights.bin' })),
    'backslash.onnx': twoFloats(...external({ location: '..\\weights.bin' })),
    'nul.onnx': twoFloats(...external({ location: 'weights.bin\0.png' })),
  },
  'external-file-missing': {
    'missing-file.onnx': twoFloats(...external({ location: 'nothing.bin' })),
    'folder.onnx': twoFloats(...external({ location: '.' })),
  },
  'external-out-of-bounds': { 'external-beyond-end.onnx': twoFloats(...external({ location: 'weights.bin', offset: '4' })) },
  'external-number-malformed': {
    'negative-offset.onnx': twoFloats(...external({ location: 'weights.bin', offset: '-4' })),
    'hex-length.onnx': twoFloats(...external({ location: 'weights.bin', length: '0x8' })),
    'endless-offset.onnx': twoFloats(...external({ location: 'weights.bin', offset: '9'.repeat(30) })),
  },
  'value-twice': {
    'two-producers.onnx': withNodes(node('Neg', ['x'], ['y']), node('Abs', ['x'], ['y'])),
    'produces-input.onnx': withNodes(node('Neg', ['x'], ['y']), node('Abs', ['y'], ['x'])),
    'produces-initializer.onnx': model([...ADDITION, node('Neg', ['x'], ['w'])]),
    'input-twice.onnx': model([...ADDITION, valueInfo(11, 'x')]),
  },
  'value-undefined': { 'dangling-input.onnx': withNodes(node('Neg', ['nowhere'], ['y'])) },
  'output-undefined': { 'dangling-output.onnx': withNodes(node('Neg', ['x'], ['z'])) },
  'nodes-not-sorted': {
    'unsorted.onnx': withNodes(node('Neg', ['t'], ['y']), node('Abs', ['x'], ['t'])),
    'captures-later-value.onnx': withNodes(
      node(
        'If',
        ['x'],
        ['y'],
        attribute(
          lengthField(1, 'then_branch'),
          lengthField(6, [node('Neg', ['t'], ['z']), valueInfo(12, 'z')]),
          varintField(20, 5),
        ),
      ),
      node('Abs', ['x'], ['t']),
    ),
  },
  'graph-cycle': {
    'cycle.onnx': withNodes(node('Add', ['x', 'b'], ['a']), node('Neg', ['a'], ['b']), node('Neg', ['b'], ['y'])),
    'reads-itself.onnx': withNodes(node('Add', ['x', 'y'], ['y'])),
    'cycle-through-subgraph.onnx': withNodes(
      node(
        'If',
        ['x'],
        ['y'],
        attribute(
          lengthField(1, 'then_branch'),
          lengthField(6, [node('Neg', ['t'], ['z']), valueInfo(12, 'z')]),
          varintField(20, 5),
        ),
      ),
      node('Abs', ['y'], ['t']),
    ),
  },
  'input-without-name': { 'nameless-input.onnx': model([...ADDITION, valueInfo(11, '')]) },
  'node-without-operator': { 'no-operator.onnx': withNodes(node('', ['x'], ['y'])) },
  'attribute-without-name': {
    'nameless-attribute.onnx': withNodes(node('Neg', ['x'], ['y'], attribute(varintField(3, 1), varintField(20, 2)))),
  },
  'attribute-twice': {
    'attribute-twice.onnx': withNodes(
      node(
        'Softmax',
        ['x'],
        ['y'],
        attribute(lengthField(1, 'axis'), varintField(3, 0)),
        attribute(lengthField(1, 'axis'), varintField(3, 1)),
      ),
    ),
  },
  'attribute-type-unknown': {
    'attribute-type-99.onnx': withNodes(node('Neg', ['x'], ['y'], attribute(lengthField(1, 'a'), varintField(20, 99)))),
  },
  'attribute-value-missing': {
    'no-tensor.onnx': withNodes(node('Constant', [], ['y'], attribute(lengthField(1, 'value'), varintField(20, 4)))),
  },
  'nesting-too-deep': { 'subgraphs-40-deep.onnx': model([...nested(40), valueInfo(11, 'x'), valueInfo(12, 'y')]) },
};

describe('malformed ONNX files', () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pcomp-onnx-'));
    await writeFile(join(folder, 'weights.bin'), f32(1, 2));
  });
  afterAll(() => rm(folder, { recursive: true }));

  const open = async (name: string, bytes: Uint8Array): Promise<void> => {
    const path = join(folder, name);
    await writeFile(path, bytes);
    await (await openOnnx(path)).close();
  };

  const cases = Object.entries(MALFORMED).flatMap(([rule, files]) =>
    Object.entries(files).map(([name, bytes]): [string, string, Uint8Array] => [name, rule, bytes]),
  );

  it.each(cases)('%s breaks %s', async (name, rule, bytes) => {
    const error = await open(name, bytes).catch((caught: unknown) => caught);
    expect(error).toBeInstanceOf(FormatError);
    expect((error as FormatError).rule).toBe(rule);
    expect((error as FormatError).path).toBe(join(folder, name));
    expect((error as FormatError).message).not.toContain('\n');
  });

  it('is not one of them: the model the others are made from', async () => {
    await open('valid.onnx', VALID);
    await open(
      'valid-external.onnx',
      twoFloats(...external({ location: 'weights.bin', offset: '0', length: '8', checksum: 'none' })),
    );
    await open('valid-external-defaults.onnx', twoFloats(...external({ location: './weights.bin' })));
    await open('valid-nesting.onnx', model([...nested(30), valueInfo(11, 'x'), valueInfo(12, 'y')]));
  });

  it.each([
    [
      'IR versions of the future',
      bytesOf(varintField(1, 14), lengthField(7, ADDITION), OPSET),
      /IR version 14; pcomp reads 1 to 13/,
    ],
    ['tensors in segments', twoFloats(lengthField(9, f32(1, 2)), lengthField(3, [])), /segments/],
    [
      'external tensors of types it cannot size',
      withInitializer(initializer('w', 23, [2], ...external({ location: 'weights.bin' }))),
      /float4e2m1/,
    ],
  ])('refuses %s as unsupported, not as broken', async (_, bytes, message) => {
    const error = await open('unsupported.onnx', bytes).catch((caught: unknown) => caught);
    expect(error).toBeInstanceOf(UnsupportedError);
    expect((error as Error).message).toMatch(message);
  });

  it('refuses every prefix of a valid file with an error of its own', async () => {
    for (let length = 0; length < VALID.length; length++) {
      await expect(open('prefix.onnx', VALID.subarray(0, length)), `${length} bytes`).rejects.toBeInstanceOf(FormatError);
    }
  });

  it('never fails otherwise than by its own errors, whatever byte is wrong', async () => {
    for (let at = 0; at < VALID.length; at++) {
      for (const value of [0x00, 0x7f, 0x80, 0xff]) {
        const bytes = Uint8Array.from(VALID);
        bytes[at] = value;
        const error = await open('flipped.onnx', bytes).catch((caught: unknown) => caught);
        const known = error === undefined || error instanceof FormatError || error instanceof UnsupportedError;
        expect(known, `byte ${at} = ${value}: ${String(error)}`).toBe(true);
      }
    }
  });

  it('a file that is not there is unreadable, not malformed', async () => {
    await expect(openOnnx(join(folder, 'nowhere.onnx'))).rejects.toMatchObject({ code: 'FILE_UNREADABLE' });
    await expect(openOnnx(folder)).rejects.toBeInstanceOf(EnvironmentError);
  });

  it('follows symbolic links, which the Hugging Face cache consists of', async () => {
    await symlink(join(folder, 'weights.bin'), join(folder, 'linked.bin'));
    await open('linked.onnx', twoFloats(...external({ location: 'linked.bin' })));
  });
});
