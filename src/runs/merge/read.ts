/** One input's version of a tensor as float32, a run of rows at a time, in memory that is used again and again. */
import { createHash, type Hash } from 'node:crypto';
import { readSync } from 'node:fs';
import { bitsPerElement, elementCount, type FloatDType, widenInto } from '../../../formats/dtype.ts';
import { type LowRank, lowRank, lowRankRows } from '../../artifacts/merge/low-rank.ts';
import { vectors } from '../../compute/kernels/vectors.ts';
import { FormatError } from '../../errors.ts';
import type { StoredOrigin, StoredTensor } from './jobs.ts';

/** Opens a file once and keeps it open: descriptors by path. */
export type OpenFile = (path: string) => number;

// A longer read would hold the disk for all others.
const READ_BYTES = 16 * 1024 * 1024;

/** Bytes `[start, end)` of a tensor into `target`. Throws FormatError when the file has become shorter. */
export function readBytes(open: OpenFile, tensor: StoredTensor, start: number, target: Uint8Array): void {
  const file = open(tensor.path);
  let done = 0;
  while (done < target.byteLength) {
    const length = Math.min(READ_BYTES, target.byteLength - done);
    const count = readSync(file, target, done, length, tensor.position + start + done);
    if (count === 0) {
      const detail = `tensor "${tensor.name}" ends early: something is rewriting the file`;
      throw new FormatError(tensor.path, 'file-changed', detail);
    }
    done += count;
  }
}

/** Reads a whole tensor as float32. */
function readWhole(open: OpenFile, tensor: StoredTensor, hash: TensorHashes): Float32Array {
  const values = new Float32Array(elementCount(tensor.shape));
  const bytes = new Uint8Array(tensor.byteLength);
  readBytes(open, tensor, 0, bytes);
  hash.add(tensor, 0, bytes);
  widenInto(tensor.dtype as FloatDType | 'F64', bytes, values);
  return values;
}

/** SHA-256 of the input tensors that a job reads, each once, whatever the number of passes. */
export class TensorHashes {
  readonly #hashes = new Map<string, { readonly tensor: StoredTensor; readonly hash: Hash; done: number }>();

  /** Adds bytes of a tensor, `position` counted from its first; those of a later pass are known already. */
  add(tensor: StoredTensor, position: number, bytes: Uint8Array): void {
    const key = `${tensor.input} ${tensor.name}`;
    const entry = this.#hashes.get(key) ?? { tensor, hash: createHash('sha256'), done: 0 };
    this.#hashes.set(key, entry);
    if (position !== entry.done) return;
    entry.hash.update(bytes);
    entry.done += bytes.byteLength;
  }

  /** Of every tensor that was read whole. */
  finish(): { input: number; name: string; sha256: string }[] {
    return [...this.#hashes.values()]
      .filter(({ tensor, done }) => done === tensor.byteLength)
      .map(({ tensor: { input, name }, hash }) => ({ input, name, sha256: hash.digest('hex') }));
  }
}

/** Rows of a stored tensor as float32. */
export class StoredRows {
  readonly #open: OpenFile;
  readonly #tensor: StoredTensor;
  readonly #columns: number;
  readonly #hashes: TensorHashes | undefined;
  readonly #allocate: (length: number) => Float32Array;
  #values: Float32Array = new Float32Array(0);

  /** @param hashes what is read is added to them, @param allocate memory for the rows */
  constructor(
    open: OpenFile,
    tensor: StoredTensor,
    columns: number,
    hashes?: TensorHashes,
    allocate: (length: number) => Float32Array = (length) => new Float32Array(length),
  ) {
    this.#open = open;
    this.#tensor = tensor;
    this.#columns = columns;
    this.#hashes = hashes;
    this.#allocate = allocate;
  }

  /** Whether the rows that were read last are all finite. */
  finite = true;

  /** Rows `[start, end)`; valid until the next call. */
  rows(start: number, end: number): Float32Array {
    const elements = elementCount(this.#tensor.shape);
    if (start < 0 || start > end || end * this.#columns > elements)
      throw new RangeError(
        `rows ${start}..${end} of "${this.#tensor.name}", which has ${elements / this.#columns} rows of ${this.#columns}`,
      );
    const count = (end - start) * this.#columns;
    const width = bitsPerElement(this.#tensor.dtype) / 8;
    if (this.#values.length < count) this.#values = this.#allocate(count);
    const values = this.#values.subarray(0, count);
    this.finite = true;
    const most = vectors().incoming.byteLength / width;
    for (let from = 0; from < count; from += most) {
      const piece = values.subarray(from, from + most);
      const finite = this.#readPiece((start * this.#columns + from) * width, piece.length * width, piece);
      this.finite &&= finite;
    }
    return values;
  }

  /** Reads, hashes and widens while the bytes are in the nearest caches. Returns whether all values are finite. */
  #readPiece(position: number, byteLength: number, values: Float32Array): boolean {
    const dtype = this.#tensor.dtype as FloatDType | 'F64';
    // float32 needs no place on the way.
    const bytes =
      dtype === 'F32' ? new Uint8Array(values.buffer, values.byteOffset, byteLength) : vectors().incoming.subarray(0, byteLength);
    readBytes(this.#open, this.#tensor, position, bytes);
    this.#hashes?.add(this.#tensor, position, bytes);
    if (dtype === 'F32') return vectors().areFinite(values);
    return dtype === 'F64' ? widenInto(dtype, bytes, values) : vectors().widen(dtype, bytes, values);
  }
}

/** An expert's rows: its weights, and its task vector where that is what is stored. */
export interface ExpertRows {
  readonly values: Float32Array;
  readonly taskVector?: Float32Array;
  /** Whether all values are finite. */
  readonly finite: boolean;
}

/** Rows of one expert. @param base rows of the base, needed by all but `stored` */
export type ReadExpert = (start: number, end: number, base: Float32Array | undefined) => ExpertRows;

export function expertReader(
  origin: StoredOrigin,
  {
    open,
    rows,
    columns,
    hashes,
    readBase,
    allocate,
  }: {
    readonly open: OpenFile;
    readonly rows: number;
    readonly columns: number;
    readonly hashes: TensorHashes;
    /** Rows of the base, for what must be known of all of them first. */
    readonly readBase: ((start: number, end: number) => Float32Array) | undefined;
    /** Memory for rows that are stored. */
    readonly allocate?: (length: number) => Float32Array;
  },
): ReadExpert {
  switch (origin.kind) {
    case 'stored': {
      const stored = new StoredRows(open, origin.tensor, columns, hashes, allocate);
      return (start, end) => ({ values: stored.rows(start, end), finite: stored.finite });
    }
    case 'base':
      return (_start, _end, base) => ({ values: base!, taskVector: new Float32Array(base!.length), finite: true });
    case 'added': {
      const added = readWhole(open, origin.tensor, hashes);
      return (start, end, base) =>
        changed(
          base!,
          added.slice(start * columns, end * columns).map((value) => value * origin.scale),
        );
    }
    case 'low-rank': {
      const [a, b] = [readWhole(open, origin.a, hashes), readWhole(open, origin.b, hashes)];
      const e = origin.e && readWhole(open, origin.e, hashes);
      const rank = origin.a.shape[0];
      const product = lowRank(a, b, { rank, scale: origin.scale, transposed: origin.transposed, ...(e ? { e } : {}) });
      if (!origin.magnitude) return (start, end, base) => changed(base!, lowRankRows(product, start, end));
      const magnitude = readWhole(open, origin.magnitude, hashes);
      const { transposed } = origin;
      const factors = transposed ? columnFactors(magnitude, product, rows, readBase!) : undefined;
      return (start, end, base) => rescaled(base!, lowRankRows(product, start, end), { columns, magnitude, start, factors });
    }
    default:
      return origin satisfies never;
  }
}

function changed(base: Float32Array, taskVector: Float32Array): ExpertRows {
  const values = new Float32Array(base.length);
  for (let i = 0; i < values.length; i++) values[i] = base[i] + taskVector[i];
  return { values, taskVector, finite: vectors().areFinite(values) };
}

interface Rescaling {
  readonly columns: number;
  /** Length of each output. */
  readonly magnitude: Float32Array;
  readonly start: number;
  /** Factor of each column, where outputs are columns. */
  readonly factors: Float64Array | undefined;
}

/** DoRA: `theta = diag(magnitude / |V|) V`, V = base + update. */
function rescaled(base: Float32Array, update: Float32Array, { columns, magnitude, start, factors }: Rescaling): ExpertRows {
  const values = new Float32Array(base.length);
  const taskVector = new Float32Array(base.length);
  for (let row = 0; row * columns < base.length; row++) {
    let squares = 0;
    if (!factors) {
      for (let i = row * columns; i < (row + 1) * columns; i++) squares += (base[i] + update[i]) ** 2;
    }
    const rowFactor = magnitude[start + row] / Math.sqrt(squares);
    for (let j = 0; j < columns; j++) {
      const i = row * columns + j;
      const value = (base[i] + update[i]) * (factors ? factors[j] : rowFactor);
      values[i] = value;
      taskVector[i] = value - base[i];
    }
  }
  return { values, taskVector, finite: vectors().areFinite(values) };
}

/** Factors of the outputs of a tensor that is stored (in, out): their lengths are known only after all rows. */
function columnFactors(
  magnitude: Float32Array,
  product: LowRank,
  rows: number,
  readBase: (start: number, end: number) => Float32Array,
): Float64Array {
  const squares = new Float64Array(product.columns);
  for (let row = 0; row < rows; row++) {
    const base = readBase(row, row + 1);
    const update = lowRankRows(product, row, row + 1);
    for (let j = 0; j < squares.length; j++) squares[j] += (base[j] + update[j]) ** 2;
  }
  return squares.map((square, j) => magnitude[j] / Math.sqrt(square));
}
