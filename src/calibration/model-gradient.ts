/**
 * Gradients of a whole model, a block at a time (gradients.md, section 5): forward keeps what enters each block, backward runs the blocks from
 * the last to the first, each making its forward pass again. Peak memory is one block with its gradients, and the kept states.
 */
import type { Engine, NdArray } from '../compute/engine.ts';
import { pruneModel } from '../graph/prune.ts';
import type { Block, LinearSite, Model, WeightReader } from '../model/model.ts';
import { BlockRunner } from './block-runner.ts';
import { embedTokens } from './embed.ts';
import { GradientSums } from './gradient-sums.ts';
import { dropPads, HiddenStates, padRows } from './hidden-states.ts';
import type { Spool, StateStore } from './state-store.ts';

export interface ModelGradientOptions {
  readonly model: Model;
  readonly engine: Engine;
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  readonly spool: Spool;
  /** Token windows, each at most the model's context long. */
  readonly windows: readonly Int32Array[];
  /** Tokens, pads included, that run at once. */
  readonly batchTokens: number;
  readonly signal?: AbortSignal | undefined;
  /** Names of the sites whose gradients are wanted; default: all. */
  readonly sites?: ReadonlySet<string>;
  /** What the evenness of experts counts in the loss; default 0. Of every batch by itself, by its part of the tokens. */
  readonly balance?: number;
}

/** Called before a block is gone through: may add to the cotangent of its output, (tokens, hiddenSize). */
export type BeforeBlock = (block: Block, cotangent: StateStore) => Promise<void>;

/**
 * Gets the gradient of every wanted site's W, (outFeatures, inFeatures), summed over all windows; of a site with experts, those of their tensors instead, by name.
 * The arrays are used again afterwards.
 */
export type OnGradients = (
  block: Block,
  gradients: ReadonlyMap<LinearSite, Float32Array>,
  experts: ReadonlyMap<string, Float32Array>,
) => Promise<void>;

/** What is done on the way back. */
export interface BackwardHooks {
  readonly before?: BeforeBlock;
  /** Gets the gradients of every batch of windows by itself, before their sum goes to `OnGradients`. */
  readonly each?: OnGradients;
}

/** One batch of windows: `forward`, then `backward` with the same weights. */
export class ModelGradient implements AsyncDisposable {
  readonly #options: ModelGradientOptions;
  readonly #runner: BlockRunner;
  readonly #states: HiddenStates;
  /** What enters each block. */
  readonly #entering: StateStore[] = [];
  /** Of one block after the other. */
  readonly #sums = new GradientSums();

  constructor(options: ModelGradientOptions) {
    const { model, engine, path, windows, batchTokens, spool } = options;
    this.#options = options;
    this.#runner = new BlockRunner(model, engine, path);
    this.#states = new HiddenStates(windows, model.shape.hiddenSize, batchTokens, spool);
  }

  /** Tokens of all windows. */
  get tokenCount(): number {
    return this.#states.tokenCount;
  }

  /** Hidden states after the last block, (tokens, hiddenSize), windows one after the other. */
  async forward(weights: WeightReader): Promise<StateStore> {
    const { model, path, signal } = this.#options;
    await embedTokens(model, weights, this.#states, { path });
    for (const block of model.blocks) {
      signal?.throwIfAborted();
      await this.#keep(block);
      await this.#runner.advance(this.#states, block, weights);
    }
    return this.#states.store;
  }

  /** Hidden states after a block, once `forward` is done. */
  after(block: Block): StateStore {
    return this.#entering[block.index + 1] ?? this.#states.store;
  }

  /**
   * Goes back through the blocks, to the first whose gradients are wanted.
   * @param cotangent of the states after the last block; replaced by that of the states before the first that is gone through
   */
  async backward(weights: WeightReader, cotangent: StateStore, on: OnGradients, hooks: BackwardHooks = {}): Promise<void> {
    const { sites: wanted, model } = this.#options;
    const first = wanted ? model.blocks.findIndex(({ sites }) => sites.some(({ name }) => wanted.has(name))) : 0;
    for (const block of first < 0 ? [] : model.blocks.slice(first).toReversed()) {
      this.#options.signal?.throwIfAborted();
      await hooks.before?.(block, cotangent);
      await this.#back(block, weights, cotangent, on, hooks.each);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const store of this.#entering) await store[Symbol.asyncDispose]();
    await this.#states[Symbol.asyncDispose]();
  }

  async #keep(block: Block): Promise<void> {
    const { batches, store, tokenCount, hiddenSize } = this.#states;
    this.#entering[block.index] ??= this.#options.spool.allocate(tokenCount, hiddenSize);
    for (const { rowStart, rowEnd } of batches) {
      await this.#entering[block.index].write(rowStart, await store.read(rowStart, rowEnd));
    }
  }

  async #back(
    block: Block,
    weights: WeightReader,
    cotangent: StateStore,
    on: OnGradients,
    each: OnGradients | undefined,
  ): Promise<void> {
    const { model, engine, balance = 0, sites: wanted } = this.#options;
    const { hiddenSize, batches } = this.#states;
    const loaded = new Map<string, NdArray>();
    /** Outputs of the graphs of all batches. */
    let [sites, experts]: ReadonlyMap<string, string>[] = [new Map(), new Map()];
    for (const batch of batches) {
      const size = { batch: batch.lengths.length, sequence: batch.sequence };
      const gradient = model.blockGradient(block, size, weights.routed?.bind(weights));
      const { weights: sources } = gradient;
      sites = new Map([...gradient.sites].filter(([name]) => wanted?.has(name) ?? true));
      experts = gradient.experts;
      const sought = [...sites.values(), ...experts.values()];
      const outputs = ['hidden_cotangent', ...sought];
      const graph = pruneModel(gradient.model, outputs);
      const key = `${gradient.key} ${outputs.join(' ')}`;
      const program = await engine.compile(graph, { key, memoryArena: false });
      for (const { name, shape } of graph.graph.inputs) {
        const source = sources.get(name);
        if (source === undefined || loaded.has(name)) continue;
        const data = typeof source === 'string' ? await weights.load(source) : await weights.loadSite(source);
        loaded.set(name, { dtype: 'F32', shape: (shape ?? []).map(Number), data });
      }
      const rows = async (store: StateStore): Promise<NdArray> => {
        const data = padRows(batch, await store.read(batch.rowStart, batch.rowEnd), hiddenSize);
        return { dtype: 'F32', shape: [size.batch, size.sequence, hiddenSize], data };
      };
      const feeds: Record<string, NdArray> = {};
      const given: Record<string, NdArray> = {
        ...Object.fromEntries(loaded),
        hidden: await rows(this.#entering[block.index]),
        lengths: { dtype: 'I32', shape: [size.batch], data: batch.lengths },
        cotangent: await rows(cotangent),
        balance: {
          dtype: 'F32',
          shape: [1],
          data: Float32Array.of((balance * (batch.rowEnd - batch.rowStart)) / this.tokenCount),
        },
      };
      for (const name of program.inputNames) feeds[name] = given[name];
      const shapes = new Map(graph.graph.outputs.map(({ name, shape }) => [name, (shape ?? []).map(Number)]));
      const first = batch === batches[0];
      const into = Object.fromEntries(sought.map((name) => [name, this.#sums.room(name, shapes.get(name)!, first)]));
      const made = await program.run(feeds, { outputs, into });
      await cotangent.write(batch.rowStart, dropPads(batch, made['hidden_cotangent'].data as Float32Array, hiddenSize));
      const own = (name: string) => made[name].data as Float32Array;
      await each?.(block, bySite(block, sites, own), byName(experts, own));
      if (!first) this.#sums.add(sought);
    }
    const sum = (name: string) => this.#sums.of(name);
    await on(block, bySite(block, sites, sum), byName(experts, sum));
  }
}

function bySite(block: Block, outputs: ReadonlyMap<string, string>, of: (output: string) => Float32Array) {
  return new Map(
    block.sites.flatMap((site): [LinearSite, Float32Array][] => {
      const output = outputs.get(site.name);
      return output === undefined ? [] : [[site, of(output)]];
    }),
  );
}

function byName(outputs: ReadonlyMap<string, string>, of: (output: string) => Float32Array) {
  return new Map([...outputs].map(([name, output]) => [name, of(output)] as const));
}
