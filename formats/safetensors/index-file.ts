/** `model.safetensors.index.json`: tensor -> file name. Read with suspicion, since its names become paths; written deterministically. */
import { FormatError } from '../../src/errors.ts';
import { refuseForeign } from '../sniff.ts';
import { openFile } from './file.ts';
import { quote } from './header.ts';
import { type Json, JsonError, parseJson } from './json.ts';
import { compareNames } from './layout.ts';

/** Name of the index of a sharded checkpoint. */
export const INDEX_NAME = 'model.safetensors.index.json';
// As a header: both name every tensor once.
const MAX_INDEX_BYTES = 100_000_000;

export interface ShardIndex {
  /** Tensor name -> file name, relative to the index's folder and never outside of it. */
  readonly placement: ReadonlyMap<string, string>;
  /** Size of the index file. */
  readonly byteLength: number;
}

/** Reads an index file. Throws FormatError, EnvironmentError. `metadata.total_size` is ignored: common writers get it wrong. */
export async function readShardIndex(path: string): Promise<ShardIndex> {
  const file = await openFile(path);
  try {
    if (file.byteLength > MAX_INDEX_BYTES) {
      throw new FormatError(
        path,
        'index-exceeds-limit',
        `the index has ${file.byteLength} bytes, but at most ${MAX_INDEX_BYTES} are allowed`,
      );
    }
    const bytes = await file.read(0, file.byteLength);
    return { placement: parseIndex(path, bytes), byteLength: file.byteLength };
  } finally {
    await file.close();
  }
}

/** The text of an index: names sorted, as the common writers lay it out. */
export function encodeShardIndex(placement: ReadonlyMap<string, string>, totalByteLength: number): string {
  // Written by hand: an object of JavaScript would move names such as "0" to the front.
  const lines = [...placement]
    .sort(([a], [b]) => compareNames(a, b))
    .map(([tensor, shard]) => `    ${JSON.stringify(tensor)}: ${JSON.stringify(shard)}`);
  return `{\n  "metadata": {\n    "total_size": ${totalByteLength}\n  },\n  "weight_map": {\n${lines.join(',\n')}\n  }\n}\n`;
}

function parseIndex(path: string, bytes: Uint8Array): ReadonlyMap<string, string> {
  const weightMap = parseIndexJson(path, bytes).get('weight_map');
  if (!(weightMap instanceof Map)) {
    throw new FormatError(
      path,
      'index-weight-map-missing',
      'the index must have an object "weight_map" of tensor name -> file name',
    );
  }
  if (weightMap.size === 0) throw new FormatError(path, 'index-empty', 'the "weight_map" of the index lists no tensor');
  for (const [tensor, shard] of weightMap) {
    if (typeof shard !== 'string') {
      throw new FormatError(path, 'index-shard-not-string', `tensor ${quote(tensor)}: the file name must be a string`);
    }
    if (leavesFolder(shard)) {
      const detail = `tensor ${quote(tensor)} is said to be in ${quote(shard)}, but shards lie in the folder of the index`;
      throw new FormatError(path, 'index-shard-outside-folder', detail);
    }
  }
  return weightMap as ReadonlyMap<string, string>;
}

function parseIndexJson(path: string, bytes: Uint8Array): ReadonlyMap<string, Json> {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (error) {
    throw new FormatError(path, 'index-not-utf8', 'the index is not valid UTF-8', { cause: error });
  }
  if (!text.trimStart().startsWith('{')) {
    if (!text.trimStart().startsWith('[')) refuseForeign(path, bytes.subarray(0, 64));
    throw new FormatError(path, 'index-not-object', 'the index must be a JSON object');
  }
  try {
    // A text that begins with "{" and parses is an object.
    return parseJson(text) as ReadonlyMap<string, Json>;
  } catch (error) {
    if (!(error instanceof JsonError)) throw error;
    const rule = { syntax: 'index-not-json', 'duplicate-key': 'index-key-duplicate', 'reserved-key': 'name-reserved' }[
      error.kind
    ];
    throw new FormatError(path, rule, `the index is refused: ${error.message}`, { cause: error });
  }
}

/**
 * Whether a name from an untrusted index could lead out of its folder, on any system: absolute paths, drives and URLs (both have a
 * colon), "..", and backslashes, which Windows takes for slashes. NUL ends a path in C.
 */
function leavesFolder(name: string): boolean {
  if (/[\\:\0]/.test(name)) return true;
  return name.split('/').some((part) => part === '' || part === '.' || part === '..');
}
