/** Embeddings and output heads in the order of another vocabulary: what lacks a token gets the row of a model that has it (merging.md 3.3). */
import { rm } from 'node:fs/promises';
import { byteLengthOf, type FloatDType, fromFloat32, toFloat32 } from '../../../formats/dtype.ts';
import { type FilePlace, openSafetensors, type PlacedSource } from '../../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../../formats/safetensors/writer.ts';
import type { Tensor, TensorInfo } from '../../../formats/tensor.ts';

/** A table of a model, and the id of each token in it. */
export interface TokenTable {
  readonly source: PlacedSource;
  /** Of the tensor, (rows, columns). */
  readonly name: string;
  readonly ids: ReadonlyMap<string, number>;
}

/** What a row of the new table is. */
export type RowOrigin =
  /** The model's own. */
  | { readonly kind: 'own'; readonly row: number }
  /** The mean of rows of other tables; zeros where there are none. */
  | { readonly kind: 'filled'; readonly from: readonly { readonly model: number; readonly row: number }[] }
  /** Padding: the mean of the model's rows that have a token. */
  | { readonly kind: 'mean' };

/** What is asked for a single token. */
export interface RowRule {
  /** Also for a model that has a row of its own. */
  readonly force: boolean;
  /** The row, or none for zeros; absent: as without a rule. */
  readonly from?: readonly { readonly model: number; readonly row: number }[];
}

const RUN_BYTES = 16 * 2 ** 20;

/**
 * Rows of model `own` by new id: its own where it has the token; else what a rule says; else that of the only model that does, or of model 0 (the base), or
 * the mean of those that do. Rows of model 0 without a token are padding, which all keep as it is there.
 * @param tokens by new id; undefined: padding
 * @param models of every model, ids and rows
 * @param rules by token
 */
export function rowOrigins(
  own: number,
  tokens: readonly (string | undefined)[],
  models: readonly { readonly ids: ReadonlyMap<string, number>; readonly rows: number }[],
  rules: ReadonlyMap<string, RowRule>,
): RowOrigin[] {
  const rowOf = (model: number, token: string): number | undefined => {
    const row = models[model].ids.get(token);
    return row !== undefined && row < models[model].rows ? row : undefined;
  };
  return tokens.map((token, id): RowOrigin => {
    if (token === undefined) {
      if (id >= models[0].rows) return { kind: 'mean' };
      return own === 0 ? { kind: 'own', row: id } : { kind: 'filled', from: [{ model: 0, row: id }] };
    }
    const row = rowOf(own, token);
    const rule = rules.get(token);
    if (row !== undefined && !rule?.force) return { kind: 'own', row };
    if (rule?.from) return { kind: 'filled', from: rule.from };
    const owners = models.flatMap((_, model) => {
      const found = rowOf(model, token);
      return found === undefined ? [] : [{ model, row: found }];
    });
    return { kind: 'filled', from: owners[0]?.model === 0 ? [owners[0]] : owners };
  });
}

/** Whether nothing moves. */
export function isUnchanged(origins: readonly RowOrigin[], rows: number): boolean {
  return origins.length === rows && origins.every((origin, id) => origin.kind === 'own' && origin.row === id);
}

/** A table to write. @param tables of all models, as `filled` rows name them */
export interface Reindexing {
  readonly own: number;
  readonly tables: readonly TokenTable[];
  readonly origins: readonly RowOrigin[];
}

/** Writes the tables into a safetensors file at `path`, under the names of their own model; 16 MB in memory. */
export async function writeReindexed(path: string, reindexings: readonly Reindexing[]): Promise<void> {
  const infos = reindexings.map(({ own, tables, origins }) => {
    const { dtype, shape } = tables[own].source.tensors.get(tables[own].name)!;
    return { name: tables[own].name, dtype, shape: [origins.length, ...shape.slice(1)] };
  });
  await using sink = await createSafetensorsSink(path, infos);
  for (const reindexing of reindexings) {
    const { own, tables, origins } = reindexing;
    const { source, name } = tables[own];
    const { dtype, shape } = source.tensors.get(name)!;
    const runLength = Math.max(1, Math.floor(RUN_BYTES / byteLengthOf(dtype, shape.slice(1))));
    let mean: Uint8Array | undefined;
    for (let start = 0; start < origins.length; ) {
      const first = origins[start];
      let end = start + 1;
      if (first.kind === 'own') {
        const follows = (origin: RowOrigin) => origin.kind === 'own' && origin.row === first.row + end - start;
        while (end < origins.length && end - start < runLength && follows(origins[end])) end++;
        await sink.writeRows(name, start, (await source.readRows(name, first.row, first.row + end - start)).data);
      } else if (first.kind === 'filled') {
        await sink.writeRows(name, start, await filledRow(reindexing, first.from, dtype as FloatDType));
      } else {
        mean ??= await meanRow(tables[own], origins, dtype as FloatDType);
        await sink.writeRows(name, start, mean);
      }
      start = end;
    }
  }
  await sink.finalize();
}

async function filledRow(
  { own, tables }: Reindexing,
  from: readonly { readonly model: number; readonly row: number }[],
  dtype: FloatDType,
): Promise<Uint8Array> {
  const columns = tables[own].source.tensors.get(tables[own].name)!.shape[1];
  const sum = new Float64Array(columns);
  for (const { model, row } of from) {
    const { source, name } = tables[model];
    const { dtype: stored, data } = await source.readRows(name, row, row + 1);
    const values = toFloat32(stored, data);
    for (let j = 0; j < columns; j++) sum[j] += values[j] / from.length;
  }
  return fromFloat32(dtype, Float32Array.from(sum));
}

async function meanRow({ source, name }: TokenTable, origins: readonly RowOrigin[], dtype: FloatDType): Promise<Uint8Array> {
  const rows = origins.flatMap((origin) => (origin.kind === 'own' ? [origin.row] : []));
  const sum = new Float64Array(source.tensors.get(name)!.shape[1]);
  for (const row of rows) {
    const { dtype: stored, data } = await source.readRows(name, row, row + 1);
    const values = toFloat32(stored, data);
    for (let j = 0; j < sum.length; j++) sum[j] += values[j] / rows.length;
  }
  return fromFloat32(dtype, Float32Array.from(sum));
}

/** A checkpoint some of whose tensors are read from another file, which goes when it is closed. */
export class OverlaidSource implements PlacedSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: PlacedSource['files'];
  readonly #below: PlacedSource;
  readonly #above: PlacedSource;

  private constructor(below: PlacedSource, above: PlacedSource) {
    this.path = below.path;
    this.tensors = new Map([...below.tensors].map(([name, info]) => [name, above.tensors.get(name) ?? info]));
    this.metadata = below.metadata;
    this.files = [...below.files, ...above.files];
    this.#below = below;
    this.#above = above;
  }

  static async open(below: PlacedSource, path: string): Promise<OverlaidSource> {
    return new OverlaidSource(below, await openSafetensors(path));
  }

  read(name: string): Promise<Tensor> {
    return this.#of(name).read(name);
  }

  readRows(name: string, start: number, end: number): Promise<Tensor> {
    return this.#of(name).readRows(name, start, end);
  }

  placeOf(name: string): FilePlace {
    return this.#of(name).placeOf(name);
  }

  async close(): Promise<void> {
    await this.#above.close();
    await rm(this.#above.path, { force: true });
    await this.#below.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #of(name: string): PlacedSource {
    return this.#above.tensors.has(name) ? this.#above : this.#below;
  }
}
