/** The finished blocks of a run, one file each in the `planes` layout: what a killed run resumes from, and what every artifact is written from. */
import { mkdir, readdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { toFloat32 } from '../../formats/dtype.ts';
import { openSafetensors } from '../../formats/safetensors/reader.ts';
import { createSafetensorsSink } from '../../formats/safetensors/writer.ts';
import type { TensorDeclaration, TensorSource } from '../../formats/tensor.ts';
import { FormatError, RecipeError } from '../errors.ts';
import { shapeOfTransform } from '../methods/quantize/input-transform.ts';
import type { QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import { readExpected } from './expected-tensor.ts';
import { encodePlanes, planesDeclarations, type QuantizedGrid, readPlanes, readPlanesGrid, shapeOfGrid } from './planes.ts';
import { parseQuantMetadata, type QuantizedModule, quantMetadata } from './quant-metadata.ts';
import type { QuantizedSource } from './quantized-source.ts';
import { asBytes } from './tensor-bytes.ts';

const RECIPE = 'pcomp.recipe';
const DETAILS = 'pcomp.details';
const SUFFIX = '.safetensors';
const EMBEDDINGS = 'embeddings';
const ALLOCATION = 'allocation';
const RANKS = 'ranks';
/** Folder of the parts of a first pass, which only tells how to share ranks out. */
const FIRST_PASS = 'first-pass';
/** Folders of the parts of a search, one a round. */
const ROUND = /^round-\d+$/;

/** What a run wants back of a finished part besides its weights, for its report: plain JSON. */
export type PartDetails = Readonly<Record<string, unknown>>;

export class PartStore implements QuantizedSource {
  readonly #folder: string;
  readonly #recipeHash: string;
  /** Part -> its details. */
  readonly #parts = new Map<string, PartDetails>();
  /** Module -> where it is. */
  readonly #modules = new Map<string, { readonly path: string; readonly entry: QuantizedModule }>();

  private constructor(folder: string, recipeHash: string) {
    this.#folder = folder;
    this.#recipeHash = recipeHash;
  }

  /** Opens a folder of parts, made if absent. Throws RecipeError when a part comes from another recipe, FormatError when one is broken. */
  static async open(folder: string, recipeHash: string): Promise<PartStore> {
    const store = new PartStore(folder, recipeHash);
    await mkdir(folder, { recursive: true });
    for (const file of (await readdir(folder)).sort()) {
      // Anything else is a file that a killed run was writing.
      if (file === FIRST_PASS || ROUND.test(file)) continue;
      if (file.endsWith(SUFFIX)) await store.#index(file.slice(0, -SUFFIX.length));
      else await rm(join(folder, file), { recursive: true });
    }
    return store;
  }

  /** Whether block `index` is finished. */
  hasBlock(index: number): boolean {
    return this.#parts.has(blockPart(index));
  }

  /** Stores a finished block; when this returns, it survives a crash. */
  async addBlock(index: number, linears: ReadonlyMap<string, QuantizedLinear>, details: PartDetails = {}): Promise<void> {
    await this.#add(blockPart(index), linears, details);
  }

  /** The details a finished block was stored with. */
  blockDetails(index: number): PartDetails {
    return this.#parts.get(blockPart(index)) ?? {};
  }

  /** Whether the quantized embeddings and output head are stored. */
  get hasEmbeddings(): boolean {
    return this.#parts.has(EMBEDDINGS);
  }

  /** Stores quantized embeddings, by module name: (vocabSize, hiddenSize) as a linear. */
  async addEmbeddings(linears: ReadonlyMap<string, QuantizedLinear>): Promise<void> {
    await this.#add(EMBEDDINGS, linears, {});
  }

  /** How the budget was shared out, once that is decided. */
  get allocation(): PartDetails | undefined {
    return this.#parts.get(ALLOCATION);
  }

  async addAllocation(details: PartDetails): Promise<void> {
    await this.#add(ALLOCATION, new Map(), details);
  }

  /** How ranks were shared out, once that is decided. */
  get ranks(): PartDetails | undefined {
    return this.#parts.get(RANKS);
  }

  /** Stores that, and drops the first pass. */
  async addRanks(details: PartDetails): Promise<void> {
    await this.#add(RANKS, new Map(), details);
    await rm(join(this.#folder, FIRST_PASS), { recursive: true, force: true });
  }

  /** The parts of a first pass over the same model, kept beside these until ranks are shared out. */
  async firstPass(): Promise<PartStore> {
    return await PartStore.open(join(this.#folder, FIRST_PASS), this.#recipeHash);
  }

  /** What a search for a budget stored under `name`, once it did. */
  finding(name: string): PartDetails | undefined {
    return this.#parts.get(findingPart(name));
  }

  async addFinding(name: string, details: PartDetails): Promise<void> {
    await this.#add(findingPart(name), new Map(), details);
  }

  /** The parts of one round of a search. */
  async round(index: number): Promise<PartStore> {
    return await PartStore.open(this.#roundFolder(index), this.#recipeHash);
  }

  /** Forgets the weights of a round that another has beaten. */
  async dropRound(index: number): Promise<void> {
    await rm(this.#roundFolder(index), { recursive: true, force: true });
  }

  #roundFolder(index: number): string {
    return join(this.#folder, `round-${index}`);
  }

  /** Every module stored so far. */
  get names(): readonly string[] {
    return [...this.#modules.keys()];
  }

  has(name: string): boolean {
    return this.#modules.has(name);
  }

  async readGrid(name: string): Promise<QuantizedGrid> {
    return this.#read(name, readPlanesGrid);
  }

  async read(name: string): Promise<QuantizedLinear> {
    return this.#read(name, readPlanes);
  }

  async #read<T extends QuantizedGrid>(
    name: string,
    reader: (source: TensorSource, name: string, entry: QuantizedModule) => Promise<T>,
  ): Promise<T> {
    const module = this.#modules.get(name);
    if (!module) throw new RangeError(`${this.#folder} holds no module "${name}"`);
    await using source = await openSafetensors(module.path);
    const read = await reader(source, name, module.entry);
    const [declared] = biasDeclaration(name, { outFeatures: module.entry.outFeatures, bias: source.tensors.get(`${name}.bias`) });
    return declared ? { ...read, bias: toFloat32('F32', await readExpected(source, declared)) } : read;
  }

  async #add(part: string, linears: ReadonlyMap<string, QuantizedLinear>, details: PartDetails): Promise<void> {
    if (this.#parts.has(part)) throw new Error(`${part} is stored twice`);
    const entries = new Map([...linears].map(([name, q]): [string, QuantizedModule] => [name, entryOf(name, q)]));
    const groupSize = [...entries.values()][0]?.groupSize ?? 1;
    const metadata = quantMetadata('planes', groupSize, entries)
      .set(RECIPE, this.#recipeHash)
      .set(DETAILS, JSON.stringify(details));
    const declarations = [...linears].flatMap(([name, q]) => [
      ...planesDeclarations(name, shapeOfGrid(q)),
      ...biasDeclaration(name, q),
    ]);
    await using sink = await createSafetensorsSink(this.#pathOf(part), declarations, metadata);
    for (const [name, q] of linears) {
      for (const tensor of encodePlanes(name, q)) await sink.write(tensor.name, tensor.data);
      if (q.bias) await sink.write(`${name}.bias`, asBytes(q.bias));
    }
    await sink.finalize();
    this.#remember(part, entries, details);
  }

  async #index(part: string): Promise<void> {
    const path = this.#pathOf(part);
    await using source = await openSafetensors(path);
    if (source.metadata.get(RECIPE) !== this.#recipeHash) {
      throw new RecipeError(
        `${path}: was made by another recipe or from other inputs. Repeat that recipe, or start again with --overwrite.`,
      );
    }
    this.#remember(part, parseQuantMetadata(path, source.metadata), parseDetails(path, source.metadata.get(DETAILS)));
  }

  #remember(part: string, entries: ReadonlyMap<string, QuantizedModule>, details: PartDetails): void {
    this.#parts.set(part, details);
    for (const [name, entry] of entries) this.#modules.set(name, { path: this.#pathOf(part), entry });
  }

  #pathOf(part: string): string {
    return join(this.#folder, part + SUFFIX);
  }
}

function findingPart(name: string): string {
  return `finding-${name}`;
}

function blockPart(index: number): string {
  return `block-${String(index).padStart(5, '0')}`;
}

/** A corrected bias is kept as it was computed; the checkpoint's dtype is the business of the artifacts. */
function biasDeclaration(name: string, q: { readonly outFeatures: number; readonly bias?: unknown }): TensorDeclaration[] {
  return q.bias ? [{ name: `${name}.bias`, dtype: 'F32', shape: [q.outFeatures] }] : [];
}

/** Every module stands for itself here, with its own copy of the order of its input. */
function entryOf(name: string, { outFeatures, inFeatures, groupSize, transform, lowRank }: QuantizedLinear): QuantizedModule {
  const rank = lowRank && { rank: lowRank.rank };
  const entry = { outFeatures, inFeatures, groupSize, input: name, transposed: false, ...rank };
  return transform ? { ...entry, transform: shapeOfTransform(transform) } : entry;
}

function parseDetails(path: string, text = '{}'): PartDetails {
  try {
    return JSON.parse(text) as PartDetails;
  } catch (cause) {
    throw new FormatError(path, 'part-details', 'its details are not JSON', { cause });
  }
}
