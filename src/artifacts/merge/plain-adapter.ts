/** Experts of a merge; an adapter in another form is read as plain factors, or as what it adds to whole weights, which a temporary file holds. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { FilePlace, PlacedSource } from '../../../formats/safetensors/reader.ts';
import type { Tensor, TensorInfo } from '../../../formats/tensor.ts';
import { UnsupportedError } from '../../errors.ts';
import { type AdapterContents, readUnplain } from '../adapter-reader.ts';
import { writeAdapter } from '../peft.ts';
import { writeDense } from '../sparse-delta.ts';
import { type InputPlace, type MergeInput, openInput } from './merge-input.ts';

/** As `openInput`. The temporary file of a converted adapter goes when its tensors are closed. */
export async function openExpert(place: InputPlace, label: string): Promise<MergeInput> {
  const input = await openInput(place, label);
  let folder: string | undefined;
  try {
    const read = await readUnplain(input);
    if (read === undefined) return input;
    folder = await mkdtemp(join(tmpdir(), 'pcomp-adapter-'));
    await writePlain(folder, place.path, read);
    const plain = await openInput({ kind: 'adapter', path: folder }, label);
    await input.tensors.close();
    return { ...plain, place, tensors: new PlainFactors(input.tensors, plain.tensors, folder) };
  } catch (error) {
    await input.tensors.close();
    if (folder !== undefined) await rm(folder, { recursive: true, force: true });
    throw error;
  }
}

async function writePlain(folder: string, path: string, contents: AdapterContents): Promise<void> {
  if (contents.routed.length > 0)
    throw new UnsupportedError(
      `${path}: routes every token through experts of its own choice (${contents.layout}), which no weights can say; adapt convert --to peft --base MODEL --text FILE folds it where the router hardly chooses`,
    );
  if (contents.deltas.length > 0) await writeDense(folder, contents.deltas, contents.transposed);
  else await writeAdapter(folder, { ...contents, base: contents.base ?? '' });
}

class PlainFactors implements PlacedSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  /** What was given, and the factors: they depend on the configuration too, so a run is only resumed with the same ones. */
  readonly files: PlacedSource['files'];
  readonly #plain: PlacedSource;
  readonly #folder: string;

  constructor(given: PlacedSource, plain: PlacedSource, folder: string) {
    this.path = given.path;
    this.tensors = plain.tensors;
    this.metadata = plain.metadata;
    this.files = [...given.files, ...plain.files];
    this.#plain = plain;
    this.#folder = folder;
  }

  read(name: string): Promise<Tensor> {
    return this.#plain.read(name);
  }

  readRows(name: string, start: number, end: number): Promise<Tensor> {
    return this.#plain.readRows(name, start, end);
  }

  placeOf(name: string): FilePlace {
    return this.#plain.placeOf(name);
  }

  async close(): Promise<void> {
    await this.#plain.close();
    await rm(this.#folder, { recursive: true, force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
