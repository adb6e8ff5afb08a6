/** Safetensors files that each break one rule of the format, made from their parts, named after what they show. */

export interface MalformedFile {
  /** File name: what is wrong. */
  readonly name: string;
  /** The FormatError rule it must be refused by. */
  readonly rule: string;
  readonly bytes: Uint8Array;
}

/** A file from a header's text and its data, with a header length that is right unless given. */
export function safetensorsBytes(header: string | Uint8Array, data = 0, headerLength?: bigint): Uint8Array {
  const json = typeof header === 'string' ? Buffer.from(header) : header;
  const bytes = new Uint8Array(8 + json.byteLength + data);
  new DataView(bytes.buffer).setBigUint64(0, headerLength ?? BigInt(json.byteLength), true);
  bytes.set(json, 8);
  return bytes;
}

/** One entry of a header, as text, so that a test can write what no JSON library would. */
export function entry(dtype: string, shape: string, offsets: string): string {
  return `{"dtype":"${dtype}","shape":${shape},"data_offsets":${offsets}}`;
}

const four = entry('F32', '[1]', '[0,4]');
const next = entry('F32', '[1]', '[4,8]');

function malformed(name: string, rule: string, bytes: Uint8Array): MalformedFile {
  return { name: `${name}.safetensors`, rule, bytes };
}

/** A header that holds one tensor "a", described so, and 4 bytes of data. */
function tensorA(name: string, rule: string, description: string): MalformedFile {
  return malformed(name, rule, safetensorsBytes(`{"a":${description}}`, 4));
}

export const MALFORMED_SAFETENSORS: readonly MalformedFile[] = [
  malformed('empty-file', 'file-empty', new Uint8Array(0)),
  malformed('seven-bytes', 'header-too-short', Uint8Array.of(2, 0, 0, 0, 0, 0, 0)),
  malformed('header-length-zero', 'header-empty', safetensorsBytes('')),
  malformed('header-length-one-over-the-limit', 'header-length-exceeds-limit', safetensorsBytes('{}', 0, 100_000_001n)),
  malformed('header-length-all-ones', 'header-length-exceeds-limit', safetensorsBytes('{}', 0, 2n ** 64n - 1n)),
  malformed('header-length-one-past-the-end', 'header-length-exceeds-file', safetensorsBytes('{}', 0, 3n)),
  malformed('header-cut-off', 'header-length-exceeds-file', safetensorsBytes(`{"a":${four}}`, 4).subarray(0, 20)),
  malformed('header-latin1', 'header-not-utf8', safetensorsBytes(Buffer.from('{"\xe9":{}}', 'latin1'))),
  malformed('header-utf8-overlong-slash', 'header-not-utf8', safetensorsBytes(Uint8Array.of(0x7b, 0x22, 0xc0, 0xaf, 0x22, 0x7d))),
  malformed('header-byte-order-mark', 'header-not-object', safetensorsBytes('\ufeff{}')),
  malformed('header-leading-space', 'header-not-object', safetensorsBytes(' {}')),
  malformed('header-array', 'header-not-object', safetensorsBytes('[]')),
  malformed('header-null', 'header-not-object', safetensorsBytes('null')),
  malformed('header-unclosed', 'header-not-json', safetensorsBytes(`{"a":${four}`, 4)),
  malformed('header-trailing-comma', 'header-not-json', safetensorsBytes(`{"a":${four},}`, 4)),
  malformed('header-single-quotes', 'header-not-json', safetensorsBytes("{'a':1}")),
  malformed('header-padded-with-nul', 'header-not-json', safetensorsBytes(`{"a":${four}}\0\0`, 4)),
  malformed('header-two-objects', 'header-not-json', safetensorsBytes('{}{}')),
  malformed('header-nested-too-deep', 'header-not-json', safetensorsBytes(`{"a":${'['.repeat(100_000)}`)),
  malformed('header-lone-surrogate', 'header-not-json', safetensorsBytes(`{"\\ud800":${four}}`, 4)),
  malformed('name-twice', 'name-duplicate', safetensorsBytes(`{"a":${four},"a":${four}}`, 4)),
  malformed('name-twice-once-escaped', 'name-duplicate', safetensorsBytes(`{"a":${four},"\\u0061":${next}}`, 8)),
  malformed('metadata-twice', 'name-duplicate', safetensorsBytes('{"__metadata__":{},"__metadata__":{}}')),
  malformed(
    'dtype-twice',
    'key-duplicate',
    safetensorsBytes('{"a":{"dtype":"F32","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4),
  ),
  malformed('metadata-key-twice', 'key-duplicate', safetensorsBytes('{"__metadata__":{"x":"1","x":"2"}}')),
  malformed('name-proto', 'name-reserved', safetensorsBytes(`{"__proto__":${four}}`, 4)),
  malformed('name-proto-escaped', 'name-reserved', safetensorsBytes(`{"__pr\\u006fto__":${four}}`, 4)),
  tensorA('entry-null', 'entry-not-object', 'null'),
  tensorA('entry-list', 'entry-not-object', '["F32",[1],[0,4]]'),
  tensorA('entry-without-dtype', 'entry-key-missing', '{"shape":[1],"data_offsets":[0,4]}'),
  tensorA('entry-without-offsets', 'entry-key-missing', '{"dtype":"F32","shape":[1]}'),
  tensorA('entry-with-stride', 'entry-key-unknown', '{"dtype":"F32","shape":[1],"data_offsets":[0,4],"stride":[1]}'),
  tensorA('dtype-number', 'dtype-not-string', '{"dtype":32,"shape":[1],"data_offsets":[0,4]}'),
  tensorA('dtype-lower-case', 'dtype-unknown', entry('f32', '[1]', '[0,4]')),
  tensorA('dtype-of-onnx-only', 'dtype-unknown', entry('U4', '[8]', '[0,4]')),
  tensorA('dtype-inherited-name', 'dtype-unknown', entry('constructor', '[1]', '[0,4]')),
  tensorA('shape-number', 'shape-not-array', entry('F32', '1', '[0,4]')),
  tensorA('shape-fraction', 'shape-not-integer', entry('F32', '[1.5]', '[0,4]')),
  tensorA('shape-string', 'shape-not-integer', entry('F32', '["1"]', '[0,4]')),
  tensorA('shape-nested', 'shape-not-integer', entry('F32', '[[1]]', '[0,4]')),
  tensorA('shape-negative', 'shape-negative', entry('F32', '[-1]', '[0,4]')),
  tensorA('shape-two-negatives', 'shape-negative', entry('F32', '[-1,-1]', '[0,4]')),
  tensorA('shape-wraps-64-bits', 'shape-overflow', entry('F32', '[4294967296,4294967296,1]', '[0,4]')),
  tensorA('shape-wraps-to-zero', 'shape-overflow', entry('F32', '[4294967296,4294967296,0]', '[0,0]')),
  tensorA('shape-bytes-overflow', 'shape-overflow', entry('F32', '[9007199254740991]', '[0,4]')),
  tensorA('shape-infinite', 'shape-overflow', entry('F32', '[1e400,0]', '[0,0]')),
  tensorA('shape-65-dimensions', 'shape-rank-exceeds-limit', entry('F32', `[${Array(65).fill(1)}]`, '[0,4]')),
  tensorA('offsets-object', 'offsets-not-pair', entry('F32', '[1]', '{"0":0,"1":4}')),
  tensorA('offsets-three', 'offsets-not-pair', entry('F32', '[1]', '[0,4,8]')),
  tensorA('offsets-string', 'offsets-not-integer', entry('F32', '[1]', '["0","4"]')),
  tensorA('offsets-negative', 'offsets-not-integer', entry('F32', '[1]', '[-4,0]')),
  tensorA('offsets-fraction', 'offsets-not-integer', entry('F32', '[1]', '[0,4.5]')),
  tensorA('offsets-beyond-2-to-the-53', 'offsets-not-integer', entry('F32', '[1]', '[9007199254740992,9007199254740996]')),
  tensorA('offsets-reversed', 'offsets-reversed', entry('F32', '[1]', '[4,0]')),
  tensorA('offsets-too-wide-for-shape', 'offsets-size-mismatch', entry('F16', '[1]', '[0,4]')),
  tensorA('offsets-too-narrow-for-shape', 'offsets-size-mismatch', entry('F32', '[2]', '[0,4]')),
  tensorA('offsets-not-from-zero', 'offsets-not-from-zero', entry('F16', '[1]', '[2,4]')),
  malformed('offsets-overlap', 'offsets-overlap', safetensorsBytes(`{"a":${four},"b":${entry('F32', '[1]', '[2,6]')}}`, 6)),
  malformed('offsets-equal', 'offsets-overlap', safetensorsBytes(`{"a":${four},"b":${four}}`, 4)),
  malformed(
    'offsets-empty-tensor-inside-another',
    'offsets-overlap',
    safetensorsBytes(`{"a":${four},"b":${entry('F32', '[0]', '[2,2]')}}`, 4),
  ),
  malformed('offsets-hole', 'offsets-hole', safetensorsBytes(`{"a":${four},"b":${entry('F32', '[1]', '[6,10]')}}`, 10)),
  malformed(
    'offsets-out-of-bounds',
    'offsets-out-of-bounds',
    safetensorsBytes(`{"a":${four},"b":${entry('F32', '[1]', '[400,404]')}}`, 8),
  ),
  malformed('data-truncated', 'data-truncated', safetensorsBytes(`{"a":${four},"b":${next}}`, 7)),
  malformed('data-absent', 'data-truncated', safetensorsBytes(`{"a":${four}}`, 0)),
  malformed('data-trailing-byte', 'data-trailing', safetensorsBytes(`{"a":${four}}`, 5)),
  malformed('data-without-tensors', 'data-trailing', safetensorsBytes('{}', 1)),
  malformed('metadata-list', 'metadata-not-object', safetensorsBytes('{"__metadata__":[]}')),
  malformed('metadata-number', 'metadata-not-string', safetensorsBytes('{"__metadata__":{"format":1}}')),
  malformed('metadata-nested', 'metadata-not-string', safetensorsBytes('{"__metadata__":{"a":{}}}')),
];
