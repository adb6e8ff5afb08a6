/** How far a block with other weights is from the float block, on the calibration text: what weights of a block are learned by. */
import type { Engine, NdArray, Program } from '../compute/engine.ts';
import { pruneModel } from '../graph/prune.ts';
import type { Block, BlockLoss, Model, WeightReader } from '../model/model.ts';
import { DEFAULT_BATCH_TOKENS } from './block-runner.ts';
import { GradientSums } from './gradient-sums.ts';
import type { HiddenStates } from './hidden-states.ts';
import type { StateStore } from './state-store.ts';

/** W of the block's sites, (outFeatures, inFeatures), by site name. */
export type SiteWeights = ReadonlyMap<string, Float32Array>;

/** The error of a block's output as a function of its weights. */
export interface BlockObjective {
  /** Calibration windows; the last ones, from `firstHeldOut` on, are for judging and not for learning. */
  readonly windowCount: number;
  readonly firstHeldOut: number;
  /** Mean squared error of the output over the tokens of `windows`, per token. */
  loss(weights: SiteWeights, windows: readonly number[]): Promise<number>;
  /** The same with its gradient by every W. The arrays are used again by the next call. */
  gradient(weights: SiteWeights, windows: readonly number[]): Promise<{ readonly loss: number; readonly gradients: SiteWeights }>;
}

export interface OutputErrorOptions {
  readonly model: Model;
  readonly engine: Engine;
  readonly block: Block;
  /** Of norms and biases, and of sites whose W is not given. */
  readonly weights: WeightReader;
  /** What enters the block. */
  readonly states: HiddenStates;
  /** What should leave it, row by row of `states`; owned. */
  readonly targets: StateStore;
  readonly signal?: AbortSignal | undefined;
}

/** One part in so many of the windows is held out, and at least one where there are two. */
const HELD_OUT_PART = 8;

/** Runs the block's loss graph on an engine, some windows at a time: one graph, whatever the batch; sums over windows are exact sums. */
export class OutputError implements BlockObjective, AsyncDisposable {
  readonly windowCount: number;
  readonly firstHeldOut: number;
  readonly #options: OutputErrorOptions;
  readonly #rowStarts: number[] = [];
  /** Windows that run together. */
  readonly #together: number;
  readonly #graph: BlockLoss;
  readonly #fixed = new Map<string, NdArray>();
  readonly #sums = new GradientSums();

  constructor(options: OutputErrorOptions) {
    this.#options = options;
    const { states } = options;
    let row = 0;
    for (const window of states.windows) {
      this.#rowStarts.push(row);
      row += window.length;
    }
    this.windowCount = states.windows.length;
    this.firstHeldOut = this.windowCount < 2 ? 0 : this.windowCount - Math.ceil(this.windowCount / HELD_OUT_PART);
    this.#together = Math.max(1, Math.min(this.windowCount, Math.floor(DEFAULT_BATCH_TOKENS / states.longest)));
    this.#graph = options.model.blockLoss(options.block, { batch: this.#together, sequence: states.longest });
  }

  async loss(weights: SiteWeights, windows: readonly number[]): Promise<number> {
    const graph = this.#graph;
    const program = await this.#options.engine.compile(pruneModel(graph.model, ['loss']), {
      key: `${graph.key} alone`,
      memoryArena: false,
    });
    let loss = 0;
    for await (const feeds of this.#batches(program, weights, windows)) {
      loss += Number((await program.run(feeds))['loss'].data[0]);
    }
    return loss;
  }

  async gradient(weights: SiteWeights, windows: readonly number[]) {
    const { engine, block } = this.#options;
    const graph = this.#graph;
    const sites = block.sites.filter(({ name }) => weights.has(name));
    const outputs = ['loss', ...sites.map(({ name }) => graph.sites.get(name)!)];
    const program = await engine.compile(pruneModel(graph.model, outputs), {
      key: `${graph.key} ${outputs.join(' ')}`,
      memoryArena: false,
    });
    let loss = 0;
    let first = true;
    for await (const feeds of this.#batches(program, weights, windows)) {
      const into: Record<string, NdArray> = {};
      for (const { name, outFeatures, inFeatures } of sites)
        into[graph.sites.get(name)!] = this.#sums.room(name, [outFeatures, inFeatures], first);
      loss += Number((await program.run(feeds, { outputs, into }))['loss'].data[0]);
      if (!first) this.#sums.add(sites.map(({ name }) => name));
      first = false;
    }
    return { loss, gradients: new Map(sites.map(({ name }) => [name, this.#sums.of(name)])) };
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#options.targets[Symbol.asyncDispose]();
  }

  async *#batches(program: Program, weights: SiteWeights, windows: readonly number[]): AsyncGenerator<Record<string, NdArray>> {
    const { states, targets, signal } = this.#options;
    const tokens = windows.reduce((sum, window) => sum + states.windows[window].length, 0);
    const [batch, sequence, size] = [this.#together, states.longest, states.hiddenSize];
    const given = await this.#weights(program, weights);
    for (let start = 0; start < windows.length; start += batch) {
      signal?.throwIfAborted();
      const hidden = new Float32Array(batch * sequence * size);
      const target = new Float32Array(hidden.length);
      const weight = new Float32Array(batch * sequence);
      // A place without a window is one token that counts for nothing: attention over none has no meaning.
      const lengths = new Int32Array(batch).fill(1);
      for (const [place, window] of windows.slice(start, start + batch).entries()) {
        const row = this.#rowStarts[window];
        const length = states.windows[window].length;
        hidden.set(await states.store.read(row, row + length), place * sequence * size);
        target.set(await targets.read(row, row + length), place * sequence * size);
        weight.fill(1 / tokens, place * sequence, place * sequence + length);
        lengths[place] = length;
      }
      const all: Record<string, NdArray> = {
        ...given,
        hidden: { dtype: 'F32', shape: [batch, sequence, size], data: hidden },
        target: { dtype: 'F32', shape: [batch, sequence, size], data: target },
        weight: { dtype: 'F32', shape: [batch, sequence, 1], data: weight },
        lengths: { dtype: 'I32', shape: [batch], data: lengths },
      };
      yield Object.fromEntries(program.inputNames.map((name) => [name, all[name]]));
    }
  }

  async #weights(program: Program, weights: SiteWeights): Promise<Record<string, NdArray>> {
    const graph = this.#graph;
    const shapes = new Map(graph.model.graph.inputs.map(({ name, shape }) => [name, (shape ?? []).map(Number)]));
    const feeds: Record<string, NdArray> = {};
    for (const name of program.inputNames) {
      const source = graph.weights.get(name);
      if (source === undefined) continue;
      const own = typeof source === 'string' ? undefined : weights.get(source.name);
      if (own) {
        feeds[name] = { dtype: 'F32', shape: shapes.get(name)!, data: own };
        continue;
      }
      let fixed = this.#fixed.get(name);
      if (fixed === undefined) {
        const { weights: reader } = this.#options;
        const data = typeof source === 'string' ? await reader.load(source) : await reader.loadSite(source);
        fixed = { dtype: 'F32', shape: shapes.get(name)!, data };
        this.#fixed.set(name, fixed);
      }
      feeds[name] = fixed;
    }
    return feeds;
  }
}
