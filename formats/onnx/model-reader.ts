/** ModelProto to plain data: what is said about the model as a whole, then its graph. */
import { FormatError, UnsupportedError } from '../../src/errors.ts';
import { checkName, decode, safeInteger, unknownOf } from './decoding.ts';
import { domainOf, readGraph } from './graph-reader.ts';
import type { OnnxModel } from './model.ts';
import { entryCodec, type ModelMessage, modelCodec } from './schema.ts';
import type { TensorContext } from './tensor-reader.ts';
import { validateGraph } from './validate.ts';
import { type BrokenRules, type ByteSource, bytesField, concat, fieldsOf, WIRE, type WireField } from './wire.ts';

/** ONNX 1.20. */
const MAX_IR_VERSION = 13;

/** Operator sets have to be named since this version. */
const IR_VERSION_WITH_OPSETS = 3;

const GRAPH = 7;
const METADATA = 14;

const OUTERMOST: BrokenRules = { malformed: 'not-protobuf', overrun: 'truncated' };

/** Reads the model a source holds, looking at every byte but those of large initializers. */
export async function readModel(source: ByteSource, context: TensorContext): Promise<OnnxModel> {
  const { path } = context;
  if (source.byteLength === 0) throw new FormatError(path, 'file-empty', 'the file has no bytes');
  const rest: Uint8Array[] = [];
  let graphField: WireField | undefined;
  for await (const field of fieldsOf(source, 0, source.byteLength, OUTERMOST)) {
    if (field.number !== GRAPH) rest.push(Uint8Array.from(await source.read(field.start, field.end)));
    else if (field.wireType !== WIRE.bytes)
      throw new FormatError(path, 'not-protobuf', `the graph has wire type ${field.wireType}, not ${WIRE.bytes}`);
    else if (graphField !== undefined)
      throw new FormatError(path, 'graph-twice', `there are graphs at bytes ${graphField.start} and ${field.start}`);
    else graphField = field;
  }
  const message = decode(modelCodec, concat(rest), path, 'the model');
  if (graphField === undefined)
    throw new FormatError(path, 'graph-missing', 'the file has no graph: it is no ONNX model, or was cut short');
  const irVersion = readIrVersion(message, path);
  const opsets = readOpsets(message, irVersion, path);
  const { metadata, repeated } = readMetadata(message);
  const { graph, carried } = await readGraph(source, graphField.valueStart, graphField.end, context);
  validateGraph(graph, path, carried);
  return {
    irVersion,
    opsets,
    producerName: message.producerName ?? '',
    producerVersion: message.producerVersion ?? '',
    graph,
    metadata,
    ...unknownOf(message, repeated),
  };
}

function readIrVersion(message: ModelMessage, path: string): number {
  if (message.irVersion === undefined)
    throw new FormatError(path, 'ir-version-missing', 'the model does not tell its IR version');
  const version = safeInteger(message.irVersion, path, 'ir-version-invalid', 'the IR version');
  if (version < 1) throw new FormatError(path, 'ir-version-invalid', `the model has IR version ${version}; they start at 1`);
  if (version > MAX_IR_VERSION) {
    throw new UnsupportedError(`${path}: the model has IR version ${version}; pcomp reads 1 to ${MAX_IR_VERSION} (ONNX 1.20)`);
  }
  return version;
}

function readOpsets(message: ModelMessage, irVersion: number, path: string): Map<string, number> {
  const opsets = new Map<string, number>();
  for (const { domain, version } of message.opsetImport ?? []) {
    const key = domainOf(checkName(domain ?? '', path, 'an operator set'));
    if (version === undefined)
      throw new FormatError(path, 'opset-version-missing', `operator set "${key}" is imported without a version`);
    const number = safeInteger(version, path, 'opset-version-invalid', `the version of operator set "${key}"`);
    if (number < 1)
      throw new FormatError(
        path,
        'opset-version-invalid',
        `operator set "${key}" is imported at version ${number}; they start at 1`,
      );
    const earlier = opsets.get(key);
    if (earlier !== undefined && earlier !== number) {
      throw new FormatError(path, 'opset-twice', `operator set "${key}" is imported at versions ${earlier} and ${number}`);
    }
    opsets.set(key, number);
  }
  if (opsets.size === 0) {
    if (irVersion >= IR_VERSION_WITH_OPSETS)
      throw new FormatError(path, 'opset-missing', `the model imports no operator set, which IR version ${irVersion} asks for`);
    opsets.set('', 1);
  }
  return opsets;
}

/** A key that is there twice keeps its first value in the map, and the others in the file. */
function readMetadata(message: ModelMessage): {
  readonly metadata: Map<string, string>;
  readonly repeated: readonly Uint8Array[];
} {
  const metadata = new Map<string, string>();
  const repeated: Uint8Array[] = [];
  for (const entry of message.metadataProps ?? []) {
    const key = entry.key ?? '';
    if (metadata.has(key)) repeated.push(bytesField(METADATA, entryCodec.encode(entry)));
    else metadata.set(key, entry.value ?? '');
  }
  return { metadata, repeated };
}
