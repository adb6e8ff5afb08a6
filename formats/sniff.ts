/** Tells other kinds of file by their first bytes, so that "not a safetensors file" comes with what it is and what to do. */
import { FormatError, UnsupportedError } from '../src/errors.ts';

/** Bytes `refuseForeign` wants to see. */
export const SNIFF_BYTES = 512;

interface Kind {
  readonly matches: (bytes: Uint8Array, text: string) => boolean;
  /** What the file is and what to do about it. */
  readonly says: string;
  /** Set where the file is not what its owner thinks; otherwise it is a sound file of a kind that is not read. */
  readonly rule?: string;
}

const CONVERT =
  "pcomp reads safetensors; convert it with the library that wrote it (save_pretrained writes safetensors), or fetch the model's .safetensors files";

const KINDS: readonly Kind[] = [
  {
    matches: (_, text) => text.startsWith('version https://git-lfs'),
    rule: 'git-lfs-pointer',
    says: 'is a Git LFS pointer, not the file itself; run "git lfs pull" in its repository',
  },
  {
    matches: (_, text) => /^\s*<(!doctype|html|head|\?xml)/i.test(text),
    rule: 'html-page',
    says: 'is a web page, not a checkpoint; the download went to the wrong address or needs a login',
  },
  {
    matches: (_, text) => text.startsWith('GGUF'),
    says: 'is a GGUF file (llama.cpp); pcomp reads safetensors: start from the original checkpoint',
  },
  {
    matches: (_, text) => text.startsWith('PK\x03\x04'),
    says: `is a zip archive, as PyTorch's .pt and .bin files and NumPy's .npz are; ${CONVERT}`,
  },
  // The protocol opcode, then 2 to 5; before PyTorch 1.6 checkpoints were bare pickles.
  {
    matches: (bytes) => bytes[0] === 0x80 && bytes[1] >= 2 && bytes[1] <= 5,
    says: `is a Python pickle, as old PyTorch .pt and .bin files are; ${CONVERT}`,
  },
  { matches: (_, text) => text.startsWith('\x89HDF\r\n\x1a\n'), says: `is an HDF5 file, as Keras writes; ${CONVERT}` },
  { matches: (_, text) => text.startsWith('\x93NUMPY'), says: `is a NumPy array; ${CONVERT}` },
  { matches: isOnnx, says: 'is an ONNX model; pcomp starts from the Hugging Face checkpoint it was exported from' },
  {
    // A safetensors file has zeros among its first 8 bytes.
    matches: (_, text) => /^[\t\n\r\x20-\x7e]{8,}$/.test(text.slice(0, 64)),
    rule: 'text-file',
    says: 'is a text, not a checkpoint; perhaps an error message that was saved as a file',
  },
];

/**
 * Throws when the first bytes belong to another kind of file: FormatError where a download or checkout went wrong,
 * UnsupportedError for formats that are not read. Returns for safetensors and for anything unknown.
 * @param bytes the first SNIFF_BYTES of the file, or all of it
 */
export function refuseForeign(path: string, bytes: Uint8Array): void {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('latin1');
  // The high bytes of a header length under 2^32, and the header's brace: no other kind looks like that.
  if (text.slice(4, 9) === '\0\0\0\0{') return;
  const kind = KINDS.find(({ matches }) => matches(bytes, text));
  if (kind === undefined) return;
  if (kind.rule !== undefined) throw new FormatError(path, kind.rule, `this ${kind.says}`);
  throw new UnsupportedError(`${path}: this ${kind.says}`);
}

/** A ModelProto: field 1 (ir_version) with a small varint, then the key of another of its fields, and a length that is not 0. */
function isOnnx(bytes: Uint8Array): boolean {
  const nextKeys = [0x12, 0x1a, 0x22, 0x28, 0x32, 0x3a, 0x42];
  return bytes[0] === 0x08 && bytes[1] >= 1 && bytes[1] <= 0x20 && nextKeys.includes(bytes[2]) && bytes[3] !== 0;
}
