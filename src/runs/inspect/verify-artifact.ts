/** `inspect --verify`: whether the files of an artifact are those that pcomp wrote, by the hashes in its pcomp.json. */
import { createHash } from 'node:crypto';
import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { openFile, unreadable } from '../../../formats/safetensors/file.ts';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import type { TensorInfo, TensorSource } from '../../../formats/tensor.ts';
import { hashFile } from '../../artifacts/manifest.ts';
import { errorCode } from '../../artifacts/process-lock.ts';
import { FormatError } from '../../errors.ts';

/** What became of the files of an artifact. */
export interface Verification {
  readonly path: string;
  /** Files that pcomp.json names, and their bytes as it says. */
  readonly files: number;
  readonly bytes: number;
  /** A line for each file, or tensor of a file, that is not as it was written; empty: all are. */
  readonly mismatches: readonly string[];
}

/** A file as pcomp.json has it: by its content, or, when its tensors have hashes of their own (a merge), by its header. */
interface WrittenFile {
  readonly bytes: number;
  readonly sha256?: string;
  readonly headerSha256?: string;
}

interface WrittenOutputs {
  readonly files: readonly (readonly [string, WrittenFile])[];
  /** SHA-256 by tensor name. */
  readonly tensors: ReadonlyMap<string, string>;
}

/** Tensors are hashed in whole rows of about so many bytes. */
const PIECE_BYTES = 16 * 1024 * 1024;

/**
 * Hashes every file that `<path>/pcomp.json` names as written. Other files of the folder are not looked at. Throws EnvironmentError
 * FILE_UNREADABLE when there is no pcomp.json, FormatError when it does not say what was written.
 */
export async function verifyArtifact(path: string, signal?: AbortSignal): Promise<Verification> {
  const { files, tensors } = await readOutputs(join(path, 'pcomp.json'));
  const mismatches: string[] = [];
  for (const [name, written] of files) {
    signal?.throwIfAborted();
    const file = join(path, ...name.split('/'));
    try {
      for (const what of await compare(file, written, tensors)) mismatches.push(`${name}: ${what}`);
    } catch (error) {
      if (!['ENOENT', 'ENOTDIR', 'EISDIR'].includes(errorCode(error))) throw unreadable(file, error);
      mismatches.push(`${name}: is missing`);
    }
  }
  return { path, files: files.length, bytes: files.reduce((sum, [, { bytes }]) => sum + bytes, 0), mismatches };
}

async function compare(file: string, written: WrittenFile, tensors: ReadonlyMap<string, string>): Promise<string[]> {
  const { size } = await stat(file);
  if (size !== written.bytes) return [`has ${size} bytes, ${written.bytes} were written`];
  if (written.headerSha256 === undefined) {
    const { sha256 } = await hashFile(file);
    return sha256 === written.sha256 ? [] : [`has SHA-256 ${sha256}, ${written.sha256} was written`];
  }
  if ((await hashHeader(file)) !== written.headerSha256) return ['its header is not the one that was written'];
  await using source = await openSafetensors(file);
  const changed: string[] = [];
  for (const info of source.tensors.values()) {
    const expected = tensors.get(info.name);
    if (expected === undefined) continue;
    const found = await hashTensor(source, info);
    if (found !== expected) changed.push(`tensor "${info.name}" has SHA-256 ${found}, ${expected} was written`);
  }
  return changed;
}

/** Of the length and the header that it counts. */
async function hashHeader(path: string): Promise<string> {
  const file = await openFile(path);
  try {
    const length = Buffer.from(await file.read(0, Math.min(8, file.byteLength)));
    const end = length.byteLength < 8 ? 0 : 8 + Number(length.readBigUInt64LE());
    const header = await file.read(0, Math.min(end, file.byteLength));
    return createHash('sha256').update(header).digest('hex');
  } finally {
    await file.close();
  }
}

async function hashTensor(source: TensorSource, { name, shape, byteLength }: TensorInfo): Promise<string> {
  const hash = createHash('sha256');
  const [rows = 0] = shape;
  if (rows === 0) return hash.update((await source.read(name)).data).digest('hex');
  const step = Math.max(1, Math.floor(PIECE_BYTES / Math.max(1, byteLength / rows)));
  for (let row = 0; row < rows; row += step) {
    hash.update((await source.readRows(name, row, Math.min(row + step, rows))).data);
  }
  return hash.digest('hex');
}

async function readOutputs(path: string): Promise<WrittenOutputs> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    throw unreadable(path, error);
  }
  const manifest = asObject(parse(path, text));
  const outputs = Object.entries(asObject(manifest['outputs']));
  const files = outputs.filter((entry): entry is [string, WrittenFile] => isWrittenFile(entry[1]));
  if (files.length === 0 || files.length < outputs.length) {
    throw new FormatError(path, 'manifest-outputs', '"outputs" must give bytes and a hash for every file that was written');
  }
  const tensors = new Map<string, string>();
  for (const [name, tensor] of Object.entries(asObject(manifest['tensors']))) {
    const { sha256 } = asObject(tensor);
    if (typeof sha256 === 'string') tensors.set(name, sha256);
  }
  return { files, tensors };
}

function parse(path: string, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new FormatError(path, 'manifest-not-json', 'not JSON', { cause });
  }
}

function asObject(value: unknown): Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {};
}

function isWrittenFile(value: unknown): value is WrittenFile {
  const { bytes, sha256, headerSha256 } = asObject(value);
  return typeof bytes === 'number' && typeof (sha256 ?? headerSha256) === 'string';
}
