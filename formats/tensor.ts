/** What a checkpoint file holds: named blocks of little-endian bytes with a dtype and a shape. */

/** Element types, spelled as safetensors spells them; `U4`..`I2` are ONNX's packed sub-byte types (low bits first). */
export type DType =
  | 'F64'
  | 'F32'
  | 'F16'
  | 'BF16'
  | 'F8_E4M3'
  | 'F8_E5M2'
  | 'I64'
  | 'I32'
  | 'I16'
  | 'I8'
  | 'U64'
  | 'U32'
  | 'U16'
  | 'U8'
  | 'BOOL'
  | 'U4'
  | 'I4'
  | 'U2'
  | 'I2';

/** A tensor's header. `shape` is row-major, `[]` for a scalar; `byteLength` is exact. */
export interface TensorInfo {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly byteLength: number;
}

/** A tensor with its bytes (little-endian, row-major, `data.byteLength === byteLength`). */
export interface Tensor extends TensorInfo {
  readonly data: Uint8Array;
}

/** Read side: headers now, bytes later, never more than one tensor (or row range) at a time. */
export interface TensorSource extends AsyncDisposable {
  /** The file or folder, as the user named it; used in messages. */
  readonly path: string;
  /** Every tensor by name, in file order. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Free-form strings the file carries. */
  readonly metadata: ReadonlyMap<string, string>;
  /** The files behind the source, absolute or as opened, with their sizes in bytes. */
  readonly files: readonly { readonly path: string; readonly byteLength: number }[];
  /** Reads a whole tensor. Throws FormatError `tensor-missing` when there is none of that name. */
  read(name: string): Promise<Tensor>;
  /** Reads rows `[start, end)` of the first axis; the result's shape is `[end - start, ...shape.slice(1)]`. */
  readRows(name: string, start: number, end: number): Promise<Tensor>;
  close(): Promise<void>;
}

/** What a sink must be told before the first byte: every tensor, so that every offset is known up front. */
export type TensorDeclaration = Omit<TensorInfo, 'byteLength'>;

/**
 * Write side: takes declared tensors in any order, whole or in consecutive row ranges; the file exists under its final
 * name only after `finalize()`. Disposing without finalizing removes what was written.
 */
export interface TensorSink extends AsyncDisposable {
  /** Writes a whole tensor. Throws when undeclared, written twice, or of the wrong size. */
  write(name: string, data: Uint8Array): Promise<void>;
  /** Writes rows starting at `start` of the first axis (any whole number of rows). */
  writeRows(name: string, start: number, data: Uint8Array): Promise<void>;
  /** Flushes, checks that every declared byte was written, and renames to the final name(s). Returns them. */
  finalize(): Promise<readonly string[]>;
}
