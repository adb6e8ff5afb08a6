/** The models of a merge as a forward pass reads them: the base, and every expert whatever it is stored as. */
import { closeSync, openSync } from 'node:fs';
import { elementCount } from '../../../formats/dtype.ts';
import type { TensorInfo } from '../../../formats/tensor.ts';
import { transpose } from '../../artifacts/transpose.ts';
import { trimWhole } from '../../methods/merge/trim.ts';
import type { LinearSite, WeightReader } from '../../model/model.ts';
import type { MergeInputs } from './inputs.ts';
import type { MergeJob, StoredTensor, TensorJob } from './jobs.ts';
import { expertReader, StoredRows, TensorHashes } from './read.ts';

/** Reads tensors of all models of a merge, whole, by the base's names. */
export class MergeWeights implements Disposable {
  readonly #jobs: ReadonlyMap<string, MergeJob>;
  /** A tied head -> the embedding. */
  readonly #ties: ReadonlyMap<string, string>;
  readonly #infos: ReadonlyMap<string, TensorInfo>;
  readonly #files = new Map<string, number>();
  readonly #kept = new Map<string, Float32Array>();
  #room: number;

  readonly #trim: number;

  /** @param keptBytes of task vectors that stay in memory once they are read @param trim part of sites' task vectors that counts, their largest entries */
  constructor(inputs: MergeInputs, jobs: readonly TensorJob[], keptBytes: number, trim = 1) {
    this.#trim = trim;
    this.#room = keptBytes;
    this.#jobs = new Map(jobs.flatMap((job) => (job.kind === 'merge' ? [[job.name, job] as const] : [])));
    this.#ties = new Map(inputs.outputs.flatMap(({ name, made }) => (made.by === 'tie' ? [[name, made.like] as const] : [])));
    this.#infos = inputs.template.tensors.tensors;
  }

  /** The base's weights. */
  get base(): WeightReader {
    return this.#reader((name, start, end) => this.#base(name, start, end));
  }

  /** Weights of expert `k`, its adapter added where it is one. */
  expert(k: number): WeightReader {
    return this.#reader((name, start, end) => this.#expert(k, name, start, end).values);
  }

  /** Expert k's task vector for a site, (outFeatures, inFeatures): as stored for an adapter, else the difference of weights; trimmed where that was asked for. */
  taskVector(k: number, site: LinearSite): Float32Array {
    const key = `${k} ${site.name}`;
    const known = this.#kept.get(key);
    if (known) return known;
    const whole = oriented(site, this.#taskVector(k, `${site.name}.weight`));
    const made = this.#trim < 1 ? trimWhole(whole, this.#trim) : whole;
    if (made.byteLength <= this.#room) {
      this.#room -= made.byteLength;
      this.#kept.set(key, made);
    }
    return made;
  }

  /** The same for any tensor, in its stored layout. */
  namedTaskVector(k: number, name: string): Float32Array {
    return this.#taskVector(k, name);
  }

  /** Stored matrices, whole: what was measured of every expert. */
  stored(tensors: readonly StoredTensor[]): Float32Array[] {
    return tensors.map((tensor) => {
      const [rows, columns] = tensor.shape;
      return new StoredRows(this.#open, tensor, columns).rows(0, rows);
    });
  }

  [Symbol.dispose](): void {
    for (const file of this.#files.values()) closeSync(file);
    this.#files.clear();
  }

  #reader(rows: (name: string, start: number, end: number) => Float32Array): WeightReader {
    const whole = (name: string) => {
      const { rows: count, stack } = this.#job(name);
      return rows(name, 0, count * stack);
    };
    return {
      load: async (name) => whole(name),
      loadRows: async (name, start, end) => rows(name, start, end),
      loadSite: async (site) => oriented(site, whole(`${site.name}.weight`)),
      info: (name) => this.#infos.get(name),
    };
  }

  #taskVector(k: number, name: string): Float32Array {
    const { rows, stack } = this.#job(name);
    const { values, taskVector } = this.#expert(k, name, 0, rows * stack);
    if (taskVector) return taskVector;
    const base = this.#base(name, 0, rows * stack);
    return values.map((value, i) => value - base[i]);
  }

  #base(name: string, start: number, end: number): Float32Array {
    const { base, columns } = this.#job(name);
    if (base === undefined) throw new Error(`the base has no tensor "${name}"`);
    return new StoredRows(this.#open, base, columns).rows(start, end);
  }

  #expert(k: number, name: string, start: number, end: number) {
    const job = this.#job(name);
    const readBase = (from: number, to: number) => this.#base(name, from, to);
    const { rows, columns } = job;
    const origin = job.experts[k];
    const read = expertReader(origin, { open: this.#open, rows, columns, hashes: new TensorHashes(), readBase });
    return read(start, end, origin.kind === 'stored' ? undefined : readBase(start, end));
  }

  #job(name: string): MergeJob {
    const job = this.#jobs.get(this.#ties.get(name) ?? name);
    if (job === undefined) throw new Error(`no tensor "${name}" is merged`);
    return job;
  }

  readonly #open = (path: string): number => {
    const file = this.#files.get(path) ?? openSync(path, 'r');
    this.#files.set(path, file);
    return file;
  };
}

function oriented({ transposed, inFeatures, outFeatures }: LinearSite, stored: Float32Array): Float32Array {
  if (stored.length !== elementCount([inFeatures, outFeatures])) throw new Error('a weight of another size than its site');
  return transposed ? transpose(stored, inFeatures, outFeatures) : stored;
}
