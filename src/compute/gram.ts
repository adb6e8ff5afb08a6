/** Sums of x x^T over tokens: fp32 products over at most 2048 tokens, fp64 beyond, and only the upper triangle. */
import type { GramAccumulator, Matrix } from './blas.ts';

/** Features of one strip of x, tokens of one fp32 product: a tile of the result and its operands stay in the cache. */
const STRIP = 256;
const TOKENS = 2048;

/** `sum += a^T b` for strips a (tokens, rows) and b (tokens, columns) and a tile of sums (rows, columns). */
export type TileProduct = (tile: {
  readonly a: Float32Array;
  readonly b: Float32Array;
  readonly sum: Float64Array;
  readonly tokens: number;
  readonly rows: number;
  readonly columns: number;
}) => Promise<void>;

/** Memory for the packed strips of one chunk, shared by accumulators: only one may use it at a time. */
export class Staging {
  #memory: Float32Array = new Float32Array(0);
  #turn: Promise<unknown> = Promise.resolve();

  /** Runs `task` when all earlier ones are through. */
  exclusively(task: (memory: (length: number) => Float32Array) => Promise<void>): Promise<void> {
    const run = this.#turn.then(() => task((length) => this.#take(length)));
    this.#turn = run.catch(() => undefined);
    return run;
  }

  #take(length: number): Float32Array {
    if (this.#memory.length < length) this.#memory = new Float32Array(length);
    return this.#memory.subarray(0, length);
  }
}

export class TiledGram implements GramAccumulator {
  readonly #features: number;
  readonly #strips: number;
  readonly #staging: Staging;
  readonly #product: TileProduct;
  /** Tiles (i, j >= i), row after row. */
  #tiles: Float64Array[] | undefined;
  #tokenCount = 0;

  constructor(features: number, staging: Staging, product: TileProduct) {
    this.#features = features;
    this.#strips = Math.ceil(features / STRIP);
    this.#staging = staging;
    this.#product = product;
    this.#tiles = [];
    for (let i = 0; i < this.#strips; i++) {
      for (let j = i; j < this.#strips; j++) this.#tiles.push(new Float64Array(this.#width(i) * this.#width(j)));
    }
  }

  get tokenCount(): number {
    return this.#tokenCount;
  }

  async add(x: Matrix, mask?: Uint8Array): Promise<void> {
    if (x.columns !== this.#features) throw new Error(`gram of ${this.#features} features cannot take rows of ${x.columns}`);
    if (mask !== undefined && mask.length !== x.rows) throw new Error(`a mask of ${mask.length} cannot go with ${x.rows} rows`);
    const rows: number[] = [];
    for (let row = 0; row < x.rows; row++) if (mask === undefined || mask[row] !== 0) rows.push(row);
    await this.#staging.exclusively(async (take) => {
      for (let start = 0; start < rows.length; start += TOKENS) {
        const chunk = rows.slice(start, start + TOKENS);
        await this.#addStrips(this.#pack(x, chunk, take(chunk.length * x.columns)), chunk.length);
      }
    });
    this.#tokenCount += rows.length;
  }

  finish(): Float64Array {
    const tiles = this.#tiles;
    if (tiles === undefined) throw new Error('this gram was finished before');
    this.#tiles = undefined;
    const n = this.#features;
    const gram = new Float64Array(n * n);
    // Divided, not multiplied by a reciprocal: sums of small integers over a count of tokens come out as a reader expects.
    const count = Math.max(1, this.#tokenCount);
    let next = 0;
    for (let i = 0; i < this.#strips; i++) {
      for (let j = i; j < this.#strips; j++) {
        this.#place(gram, tiles[next], i, j, count);
        tiles[next++] = new Float64Array(0);
      }
    }
    return gram;
  }

  #width(strip: number): number {
    return Math.min(STRIP, this.#features - strip * STRIP);
  }

  /** The chosen rows of x cut into strips, each (tokens, width) and contiguous, so that a product reads it in place. */
  #pack(x: Matrix, rows: readonly number[], memory: Float32Array): Float32Array[] {
    const strips: Float32Array[] = [];
    for (let j = 0; j < this.#strips; j++) {
      const width = this.#width(j);
      const strip = memory.subarray(j * STRIP * rows.length, (j * STRIP + width) * rows.length);
      for (let i = 0; i < rows.length; i++) {
        const from = rows[i] * x.columns + j * STRIP;
        strip.set(x.data.subarray(from, from + width), i * width);
      }
      strips.push(strip);
    }
    return strips;
  }

  async #addStrips(strips: readonly Float32Array[], tokens: number): Promise<void> {
    const tiles = this.#tiles;
    if (tiles === undefined) throw new Error('this gram was finished before');
    let next = 0;
    for (let i = 0; i < strips.length; i++) {
      for (let j = i; j < strips.length; j++) {
        const sum = tiles[next++];
        await this.#product({ a: strips[i], b: strips[j], sum, tokens, rows: this.#width(i), columns: this.#width(j) });
      }
    }
  }

  /** Writes a tile and its mirror image. A diagonal tile's lower half is overwritten by its upper half: exactly symmetric. */
  #place(gram: Float64Array, tile: Float64Array, i: number, j: number, count: number): void {
    const n = this.#features;
    const columns = this.#width(j);
    for (let r = 0; r < this.#width(i); r++) {
      const row = i * STRIP + r;
      for (let c = i === j ? r : 0; c < columns; c++) {
        const column = j * STRIP + c;
        const value = tile[r * columns + c] / count;
        gram[row * n + column] = value;
        gram[column * n + row] = value;
      }
    }
  }
}
