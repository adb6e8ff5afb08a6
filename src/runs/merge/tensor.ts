/** Does one job of a merge: reads the tensor's rows from every input, takes them through the method, writes them where they belong. */
import { createHash } from 'node:crypto';
import { closeSync, openSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { bitsPerElement } from '../../../formats/dtype.ts';
import type { TensorPlace } from '../../../formats/safetensors/placed-files.ts';
import { transpose } from '../../artifacts/transpose.ts';
import type { Blas } from '../../compute/blas.ts';
import { vectors } from '../../compute/kernels/vectors.ts';
import { type BlockPass, mergeBlock, mergeTensor, refuseNonfinite } from '../../methods/merge/drive.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import { withCoefficients } from '../../methods/merge/merge-plan.ts';
import type { MergeBlock, MergeTensor } from '../../methods/merge/merger.ts';
import type { CopyJob, MergeJob, MergeSetup, TensorJob } from './jobs.ts';
import { expertReader, readBytes, StoredRows, TensorHashes } from './read.ts';
import { type RoundingLoss, roundRows } from './round.ts';

/** What came of a job: goes into the journal, the manifest and the report. */
export interface TensorResult {
  readonly tensor: string;
  readonly bytes: number;
  readonly sha256: string;
  /** Input tensors that were read whole. */
  readonly inputs: readonly { readonly input: number; readonly name: string; readonly sha256: string }[];
  /** ||round(theta) - theta|| / ||theta - theta_0||; absent where nothing is rounded or there is no base. */
  readonly roundingLoss?: number;
  readonly notes: readonly string[];
}

const COPY_BYTES = 8 * 1024 * 1024;
/** Blocks are checked as they are read: while their numbers are at hand. */
const CHECKED = { allowNonfinite: true } as const;

/** Does jobs one after the other, with files kept open between them. */
export class TensorWorker {
  readonly #setup: MergeSetup;
  readonly #blas: Blas;
  readonly #reading = new Map<string, number>();
  readonly #writing = new Map<string, number>();

  constructor(setup: MergeSetup, blas: Blas) {
    this.#setup = setup;
    this.#blas = blas;
  }

  async run(job: TensorJob): Promise<TensorResult> {
    return job.kind === 'copy' ? this.#copy(job) : this.#merge(job);
  }

  close(): void {
    for (const file of [...this.#reading.values(), ...this.#writing.values()]) closeSync(file);
    this.#reading.clear();
    this.#writing.clear();
  }

  #copy({ name, tensor, places }: CopyJob): TensorResult {
    const sha = createHash('sha256');
    const buffer = new Uint8Array(Math.min(COPY_BYTES, tensor.byteLength));
    for (let done = 0; done < tensor.byteLength; done += buffer.byteLength) {
      const bytes = buffer.subarray(0, Math.min(buffer.byteLength, tensor.byteLength - done));
      readBytes(this.#open, tensor, done, bytes);
      sha.update(bytes);
      this.#write(places, done, bytes);
    }
    const sha256 = sha.digest('hex');
    return {
      tensor: name,
      bytes: tensor.byteLength,
      sha256,
      inputs: [{ input: tensor.input, name: tensor.name, sha256 }],
      notes: [],
    };
  }

  async #merge(job: MergeJob): Promise<TensorResult> {
    const { seed, compat, allowNonfinite, statisticNorms } = this.#setup;
    const { name, dtype, places, values } = job;
    const plain = mergerOf(job.method);
    const merger = job.coefficients ? withCoefficients(plain, job.coefficients) : plain;
    using _ = vectors().open();
    const hashes = new TensorHashes();
    const sha = createHash('sha256');
    const loss: RoundingLoss = { error: 0, change: 0 };
    const notes: string[] = [];
    const context = {
      seed,
      blas: this.#blas,
      note: (_: unknown, message: string) => void notes.push(message),
      ...(compat ? { compat } : {}),
      ...(statisticNorms ? { statisticNorms } : {}),
    };
    const width = bitsPerElement(dtype) / 8;
    let bytes = 0;
    for (let layer = 0; layer < job.stack; layer++) {
      const tensor = job.stack === 1 ? job.tensor : { ...job.tensor, name: `${job.tensor.name}[${layer}]` };
      const pass = this.#passes(job, tensor, layer, hashes);
      let start = 0;
      for await (const merged of mergeTensor(merger, tensor, pass.blocks, values, context, CHECKED)) {
        const rows = job.turned ? transpose(merged, job.columns, job.rows) : merged;
        let position = (layer * job.rows * job.columns + start) * width;
        roundRows({ name, dtype, allowNonfinite }, rows, { start, base: pass.base(), loss }, (stored) => {
          sha.update(stored);
          this.#write(places, position, stored);
          position += stored.byteLength;
          bytes += stored.byteLength;
        });
        start += rows.length;
      }
    }
    const rounded = job.base !== undefined && job.usesBase && dtype !== 'F32' && dtype !== 'F64';
    return {
      tensor: name,
      bytes,
      sha256: sha.digest('hex'),
      inputs: hashes.finish(),
      ...(rounded ? { roundingLoss: loss.error === 0 ? 0 : Math.sqrt(loss.error / loss.change) } : {}),
      notes,
    };
  }

  /** The blocks of a tensor, as often as they are asked for; a tensor that is one block is read once. */
  #passes(
    job: MergeJob,
    tensor: MergeTensor,
    layer: number,
    hashes: TensorHashes,
  ): { blocks: BlockPass; base: () => Float32Array | undefined } {
    const { rows, columns, blockRows, turned, usesBase } = job;
    const first = layer * rows;
    const open = this.#open;
    const allocate = (length: number) => vectors().floats(length);
    const baseRows = job.base && new StoredRows(open, job.base, columns, hashes, allocate);
    const needsBase = usesBase || job.experts.some((origin) => origin.kind !== 'stored');
    const again = job.base && new StoredRows(open, job.base, columns);
    const readBase = again && ((start: number, end: number) => again.rows(first + start, first + end));
    const experts = job.experts.map((origin) => expertReader(origin, { open, rows, columns, hashes, readBase, allocate }));
    // A Gram matrix is of the whole tensor, Fisher information of its elements; both are stored (out, in).
    const squares = mergerOf(job.method).statistics === 'gram';
    const statistics = (start: number, end: number): Float32Array[] =>
      job.statistics!.map((tensor) => {
        const [height, width] = tensor.shape;
        const all = squares || turned;
        return new StoredRows(open, tensor, width).rows(all ? 0 : start, all ? height : end);
      });
    let base: Float32Array | undefined;
    let output: Float32Array = new Float32Array(0);
    const read = (start: number, end: number): MergeBlock => {
      base = needsBase ? baseRows?.rows(first + start, first + end) : undefined;
      const parts = experts.map((expert) => expert(first + start, first + end, base));
      const view = (values: Float32Array) => (turned ? transpose(values, rows, columns) : values);
      // Task vectors that are stored are more exact than the difference of rounded weights.
      const given = usesBase && parts.some(({ taskVector }) => taskVector);
      const length = (end - start) * columns;
      if (output.length < length) output = allocate(length);
      const block = mergeBlock(start * columns, {
        output: output.subarray(0, length),
        ...(base && usesBase ? { base: view(base) } : {}),
        experts: parts.map(({ values }) => view(values)),
        ...(job.statistics ? { statistics: statistics(start, end) } : {}),
        ...(given ? { taskVectors: parts.map(({ values, taskVector }) => view(taskVector ?? difference(values, base))) } : {}),
      });
      const finite = parts.every((part) => part.finite) && (base === undefined || baseRows?.finite === true);
      if (!finite && !this.#setup.allowNonfinite) refuseNonfinite(tensor, block);
      return block;
    };
    let whole: MergeBlock | undefined;
    function* blocks(every = 1): Iterable<MergeBlock> {
      if (blockRows >= rows) {
        // A guess is worth nothing where all is at hand.
        if (every > 1) return;
        whole ??= read(0, rows);
        yield whole;
        return;
      }
      for (let start = 0; start < rows; start += every * blockRows) yield read(start, Math.min(rows, start + blockRows));
    }
    return { blocks, base: () => (usesBase ? base : undefined) };
  }

  readonly #open = (path: string): number => {
    const file = this.#reading.get(path) ?? openSync(path, 'r');
    this.#reading.set(path, file);
    return file;
  };

  #write(places: readonly TensorPlace[], offset: number, bytes: Uint8Array): void {
    for (const { file, position } of places) {
      const handle = this.#writing.get(file) ?? openSync(join(this.#setup.folder, file), 'r+');
      this.#writing.set(file, handle);
      let done = 0;
      while (done < bytes.byteLength) {
        done += writeSync(handle, bytes, done, bytes.byteLength - done, position + offset + done);
      }
    }
  }
}

function difference(values: Float32Array, base: Float32Array | undefined): Float32Array {
  const result = new Float32Array(values.length);
  if (base) for (let i = 0; i < result.length; i++) result[i] = values[i] - base[i];
  return result;
}
