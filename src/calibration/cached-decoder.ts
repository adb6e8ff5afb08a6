/** A model that writes, a block at a time on an engine: rows of different lengths side by side, on a cache of keys and values. */
import type { Engine, NdArray } from '../compute/engine.ts';
import { FormatError } from '../errors.ts';
import type { Block, Model, WeightReader } from '../model/model.ts';
import { embedTokens } from './embed.ts';
import { HiddenStates, padRows } from './hidden-states.ts';
import { Spool } from './state-store.ts';

export interface CachedDecoderOptions {
  readonly model: Model;
  readonly engine: Engine;
  readonly weights: WeightReader;
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  readonly prompts: readonly Int32Array[];
  /** Most tokens that will be added to any of them. */
  readonly room: number;
}

const POSITIONS = 256;

interface Cache {
  readonly key: NdArray;
  readonly value: NdArray;
}

/** Bytes of keys and values of one token, all blocks together. */
export function cacheBytesPerToken({ shape, blocks }: Model): number {
  return 2 * 4 * shape.kvHeadCount * shape.headDim * blocks.length;
}

/**
 * Prompts of one batch: `begin`, then `next` as often as there is room. Both give the hidden states after the last block at the last token of each
 * row, (rows, hiddenSize). Keys of shorter rows leave holes in the cache, which nothing looks at: a key carries its position in itself.
 */
export class CachedDecoder {
  readonly #options: CachedDecoderOptions;
  /** By block. */
  readonly #caches: (Cache | undefined)[] = [];
  /** Positions of what is in the cache, (rows, columns) one row after the other; -1 for a hole. */
  #keyPositions: BigInt64Array = new BigInt64Array(0);
  #columns = 0;
  /** Tokens of each row so far. */
  readonly #lengths: number[];

  constructor(options: CachedDecoderOptions) {
    this.#options = options;
    this.#lengths = options.prompts.map(({ length }) => length);
  }

  /** Reads the prompts. Throws FormatError as `embedTokens` does. */
  async begin(): Promise<Float32Array> {
    const { model, weights, path, prompts } = this.#options;
    const { hiddenSize } = model.shape;
    await using spool = new Spool({ ramBytes: Number.MAX_SAFE_INTEGER });
    await using states = new HiddenStates(prompts, hiddenSize, Number.MAX_SAFE_INTEGER, spool);
    await embedTokens(model, weights, states, { path });
    const [batch] = states.batches;
    const hidden = padRows(batch, await states.store.read(0, states.tokenCount), hiddenSize);
    const columns = Array.from({ length: batch.sequence }, (_, i) => i);
    const out = await this.#advance(
      hidden,
      prompts.map(() => columns),
      prompts.map(({ length }) => columns.map((column) => (column < length ? column : -1))),
    );
    return this.#pick(
      out,
      prompts.map(({ length }) => length - 1),
      batch.sequence,
    );
  }

  /** Adds a token to every row. A row without one has ended: it stays as long as it is, and its states mean nothing from then on. */
  async next(tokens: readonly (number | undefined)[]): Promise<Float32Array> {
    const { hiddenSize } = this.#options.model.shape;
    const hidden = new Float32Array(tokens.length * hiddenSize);
    const keys: number[] = [];
    for (const [row, token] of tokens.entries()) {
      keys.push(token === undefined ? -1 : this.#lengths[row]++);
      if (token !== undefined) hidden.set(await this.#embed(token, keys[row]), row * hiddenSize);
    }
    const out = await this.#advance(
      hidden,
      this.#lengths.map((length) => [length - 1]),
      keys.map((key) => [key]),
    );
    return this.#pick(
      out,
      tokens.map(() => 0),
      1,
    );
  }

  /** The embedding of one token at its place. */
  async #embed(token: number, position: number): Promise<Float32Array> {
    const { model, weights } = this.#options;
    const row = (await weights.loadRows(model.tokenEmbedding, token, token + 1)).slice();
    if (model.positionEmbedding !== undefined) {
      const place = await weights.loadRows(model.positionEmbedding, position, position + 1);
      for (let i = 0; i < row.length; i++) row[i] += place[i];
    }
    return row;
  }

  /** Takes new columns through all blocks. @param queries positions of the new tokens by row @param keys the same, -1 where there is none */
  async #advance(hidden: Float32Array, queries: readonly number[][], keys: readonly number[][]): Promise<Float32Array> {
    const { model } = this.#options;
    const { hiddenSize } = model.shape;
    const [rows, added] = [queries.length, queries[0].length];
    const total = this.#columns + added;
    const keyPositions = new BigInt64Array(rows * total);
    for (let row = 0; row < rows; row++) {
      keyPositions.set(this.#keyPositions.subarray(row * this.#columns, (row + 1) * this.#columns), row * total);
      keyPositions.set(BigInt64Array.from(keys[row], BigInt), row * total + this.#columns);
    }
    const places: Record<string, NdArray> = {
      query_positions: { dtype: 'I64', shape: [rows, added], data: BigInt64Array.from(queries.flat(), BigInt) },
      key_positions: { dtype: 'I64', shape: [rows, total], data: keyPositions },
    };
    let states: NdArray = { dtype: 'F32', shape: [rows, added, hiddenSize], data: hidden };
    for (const block of model.blocks) states = await this.#run(block, states, places);
    this.#keyPositions = keyPositions;
    this.#columns = total;
    return states.data as Float32Array;
  }

  async #run(block: Block, hidden: NdArray, places: Readonly<Record<string, NdArray>>): Promise<NdArray> {
    const { model, engine, weights, path, prompts, room } = this.#options;
    const { kvHeadCount, headDim } = model.shape;
    const longest = prompts.reduce((most, { length }) => Math.max(most, length), 0) + room;
    // In steps, so that batches of other prompts find the same graph.
    const positions = POSITIONS * Math.ceil(longest / POSITIONS);
    const { model: graph, key, weights: sources } = model.blockStep(block, positions, weights.routed?.bind(weights));
    const program = await engine.compile(graph, { key, memoryArena: false });
    const none: NdArray = { dtype: 'F32', shape: [prompts.length, kvHeadCount, 0, headDim], data: new Float32Array() };
    const past = this.#caches[block.index];
    const feeds: Record<string, NdArray> = {
      ...places,
      hidden,
      past_key: past?.key ?? none,
      past_value: past?.value ?? none,
    };
    for (const { name, shape } of graph.graph.inputs) {
      const source = sources.get(name);
      if (source === undefined) continue;
      const data = typeof source === 'string' ? await weights.load(source) : await weights.loadSite(source);
      feeds[name] = { dtype: 'F32', shape: (shape ?? []).map(Number), data };
    }
    const made = await program.run(feeds, { outputs: ['hidden_out', 'present_key', 'present_value'] });
    this.#caches[block.index] = { key: made['present_key'], value: made['present_value'] };
    const out = made['hidden_out'];
    if (!(out.data as Float32Array).every(Number.isFinite))
      throw new FormatError(path, 'non-finite-activation', `${block.name} gives a number that is not finite`);
    return out;
  }

  /** The states of one column of each row. */
  #pick(states: Float32Array, columns: readonly number[], width: number): Float32Array {
    const { hiddenSize } = this.#options.model.shape;
    const picked = new Float32Array(columns.length * hiddenSize);
    columns.forEach((column, row) => {
      const from = (row * width + column) * hiddenSize;
      picked.set(states.subarray(from, from + hiddenSize), row * hiddenSize);
    });
    return picked;
  }
}
