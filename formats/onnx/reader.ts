/** Opens ONNX files. The graph is read whole; initializers of 1 KB and more stay on disk until they are asked for. */
import { EnvironmentError, FormatError } from '../../src/errors.ts';
import { ExternalFiles, FileSource } from './file-source.ts';
import type { OnnxModel } from './model.ts';
import { readModel } from './model-reader.ts';
import { MemorySource, WindowedSource } from './wire.ts';

/** Protobuf's own limit on a message. */
const MAX_FILE_BYTES = 2 ** 31 - 1;

/** An open model. Its initializers can be read until it is closed. */
export interface OnnxFile extends AsyncDisposable {
  readonly path: string;
  readonly model: OnnxModel;
  /** The .onnx file and those its external tensors are stored in, with their sizes in bytes. */
  readonly files: readonly { readonly path: string; readonly byteLength: number }[];
  close(): Promise<void>;
}

/**
 * Opens a model by path. External data is looked for below the file's folder and checked against shapes and file sizes.
 * @throws FormatError when the file breaks a rule of ONNX, UnsupportedError for IR versions after 13, EnvironmentError
 * FILE_UNREADABLE
 */
export async function openOnnx(path: string): Promise<OnnxFile> {
  const file = await FileSource.open(path);
  if (file === undefined) throw new EnvironmentError('FILE_UNREADABLE', `${path}: there is no such file`);
  if (file.byteLength > MAX_FILE_BYTES) {
    throw new FormatError(
      path,
      'file-too-large',
      `the file has ${file.byteLength} bytes; a protobuf message ends before ${MAX_FILE_BYTES + 1}, weights beyond that are external`,
    );
  }
  const external = new ExternalFiles(path);
  const model = await readModel(new WindowedSource(file), { path, external });
  const files = [file, ...external.files];
  const close = (): Promise<void> => {
    for (const each of files) each.close();
    return Promise.resolve();
  };
  return { path, model, files, close, [Symbol.asyncDispose]: close };
}

/**
 * Reads a model that is in memory; it cannot have external data.
 * @param name what messages call it
 */
export function decodeOnnx(bytes: Uint8Array, name = 'model.onnx'): Promise<OnnxModel> {
  return readModel(new MemorySource(name, bytes), { path: name, external: undefined });
}
